"""Whether what was read of a tensor is that tensor: by the local header before it, and the zip's own checksum."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from switchrun.checkpoint.types import RemoteFile, TensorSlice
from switchrun.checkpoint.zip_offsets import local_header_bytes
from switchrun.errors import CorruptCheckpointError


def check_range(tensor: TensorSlice, data: memoryview, position: int) -> None:
    """Check a whole tensor that was read to `position`, its header before it.

    The checksum is only compared for what came from the Hub, before it is kept: of a local file, that would take longer
    than reading it.

    Raises:
        CorruptCheckpointError: It is not the tensor.
    """
    check_header(tensor, data, position)
    if isinstance(tensor.file, RemoteFile):
        check_checksum(tensor, [data[position : position + tensor.nbytes]])


def check_header(tensor: TensorSlice, data: memoryview, position: int) -> None:
    """Check the local header that ends at `position`; errors are those of `check_range`."""
    length = tensor.header_bytes
    if length and local_header_bytes(bytes(data[position - length : position])) != length:
        raise CorruptCheckpointError(
            f"{tensor.file}: the archive's entries are not where its directory says", "download it again"
        )


def check_checksum(tensor: TensorSlice, chunks: Iterable[memoryview | bytes]) -> None:
    """Check a tensor's bytes, given in pieces, by the checksum of a zip; errors are those of `check_range`."""
    if tensor.crc is None:
        return
    checksum = 0
    for chunk in chunks:
        checksum = zlib.crc32(chunk, checksum)
    if checksum != tensor.crc:
        raise CorruptCheckpointError(
            f"{tensor.file}: what the Hub sent of it does not have the checksum that the file states",
            "if HF_ENDPOINT names a mirror, try without it",
        )
