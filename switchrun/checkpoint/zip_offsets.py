"""Where the data of a torch zip's entries begins, computed from the central directory.

A zip's directory says where an entry's local header lies, but not how long that is: torch pads it, so that the data
begins at a multiple of 64. To read the headers takes one read an entry, 123,171 of them for switch-c-2048. The padding
can be computed, as torch's writer does (`getPadding` in caffe2/serialize/inline_container.cc), and the next entry's
header tells the same from the other side.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

#: What torch aligns to, unless its entry `.storage_alignment` names another number.
ALIGNMENT = 64

_LOCAL = struct.Struct("<4s5H3L2H")
_LOCAL_MAGIC = b"PK\x03\x04"
#: A size or an offset from here on stands in an extra field of 64 bits.
_ZIP64_FROM = 0xFFFFFFFF
_HAS_DESCRIPTOR = 0x08


class Entry(NamedTuple):
    """What the directory says of an entry: `place` is its local header's, `end` that of the next one."""

    name: bytes
    flags: int
    method: int
    crc: int
    nbytes: int
    place: int
    end: int

    @property
    def header_bytes(self) -> int:
        """Bytes of the local header that `stated_offset` needs."""
        return _LOCAL.size + len(self.name)


def computed_offset(entry: Entry, alignment: int = ALIGNMENT) -> int | None:
    """Return where an entry's data begins; None if the local header must be read to know it.

    That is if the padding and the next entry do not agree: another program than torch wrote the file, or aligned it to
    another number.
    """
    # The padding is an extra field of its own, with 4 bytes before it.
    start = entry.place + entry.header_bytes + 4
    if _is_zip64(entry):
        start += 4
        if entry.nbytes >= _ZIP64_FROM:
            start += 16
        if entry.place >= _ZIP64_FROM:
            start += 8
    start = -(-start // alignment) * alignment
    # An empty entry has no descriptor.
    descriptor = (24 if _is_zip64(entry) else 16) if entry.flags & _HAS_DESCRIPTOR else 0
    return start if start + entry.nbytes + descriptor == entry.end else None


def stated_offset(entry: Entry, header: bytes) -> int | None:
    """Return where an entry's data begins by its local header, of which the first bytes are given; None if it is none.

    It is the fallback of `computed_offset`.
    """
    length = local_header_bytes(header)
    if length is None or header[_LOCAL.size : entry.header_bytes] != entry.name:
        return None
    return entry.place + length


def local_header_bytes(header: bytes) -> int | None:
    """Return how long a local header is by its first bytes; None if it is none.

    So `computed_offset` is checked when data is read together with the header before it.
    """
    if len(header) < _LOCAL.size:
        return None
    magic, *_, name_bytes, extra_bytes = _LOCAL.unpack_from(header)
    return _LOCAL.size + int(name_bytes) + int(extra_bytes) if magic == _LOCAL_MAGIC else None


def _is_zip64(entry: Entry) -> bool:
    return entry.nbytes >= _ZIP64_FROM or entry.place >= _ZIP64_FROM
