"""Where the data of a torch zip's entries begins, computed from the central directory.

A zip's directory says where an entry's local header lies, but not how long that is: torch pads it, so that the data
begins at a multiple of 64. To read the headers takes one read an entry, 123,171 of them for switch-c-2048. The padding
can be computed, as torch's writer does (`getPadding` in caffe2/serialize/inline_container.cc), and the next entry's
header tells the same from the other side.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from zipfile import ZipInfo

#: Bytes of a local header before its name, which `data_offset` needs.
LOCAL_HEADER_BYTES = 30
#: What torch aligns to, unless its entry `.storage_alignment` names another number.
ALIGNMENT = 64

_LOCAL_MAGIC = b"PK\x03\x04"
#: A size or an offset from here on stands in an extra field of 64 bits.
_ZIP64_FROM = 0xFFFFFFFF
_HAS_DESCRIPTOR = 0x08
_UTF8_NAME = 0x800


def stored_offsets(entries: Sequence[ZipInfo], directory: int, alignment: int = ALIGNMENT) -> list[int | None]:
    """Return where each entry's data begins; None for one whose local header must be read to know it.

    That is one for which the padding and the next entry do not agree: another program than torch wrote the file.

    Args:
        entries: All entries of the archive, in any order; the answer has the same order.
        directory: Where the central directory begins, and so the last entry ends.
        alignment: What the file's entry `.storage_alignment` says; above 0.
    """
    order = sorted(range(len(entries)), key=lambda i: entries[i].header_offset)
    ends = [*(entries[i].header_offset for i in order), directory]
    found: list[int | None] = [None] * len(entries)
    for i, (_, end) in zip(order, pairwise(ends), strict=True):
        padded = _padded(entries[i], alignment)
        # Files are not to be trusted: a damaged directory can name places before the file.
        if entries[i].header_offset >= 0 and padded + entries[i].compress_size + _descriptor_bytes(entries[i]) == end:
            found[i] = padded
    return found


def data_offset(header_offset: int, header: bytes) -> int | None:
    """Return where an entry's data begins by its local header, of which the first bytes are given; None if it is none.

    It is the fallback of `stored_offsets`, and checks it when an entry is read together with its header.
    """
    if len(header) < LOCAL_HEADER_BYTES or header[:4] != _LOCAL_MAGIC:
        return None
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
    return header_offset + LOCAL_HEADER_BYTES + int(name_bytes) + int(extra_bytes)


def _padded(entry: ZipInfo, alignment: int) -> int:
    # The padding is an extra field of its own, with 4 bytes before it.
    start = entry.header_offset + LOCAL_HEADER_BYTES + _name_bytes(entry) + 4
    if _is_zip64(entry):
        start += 4
        if entry.file_size >= _ZIP64_FROM:
            start += 16
        if entry.header_offset >= _ZIP64_FROM:
            start += 8
    return -(-start // alignment) * alignment


def _descriptor_bytes(entry: ZipInfo) -> int:
    # An empty entry has none.
    return (24 if _is_zip64(entry) else 16) if entry.flag_bits & _HAS_DESCRIPTOR else 0


def _is_zip64(entry: ZipInfo) -> bool:
    return entry.file_size >= _ZIP64_FROM or entry.header_offset >= _ZIP64_FROM


def _name_bytes(entry: ZipInfo) -> int:
    name = entry.orig_filename
    return len(name) if name.isascii() else len(name.encode("utf-8" if entry.flag_bits & _UTF8_NAME else "cp437"))
