"""Sizes and rates as people write them: `6GiB`, `512 MiB`, `1.8 GB/s`."""

from __future__ import annotations

import re

from switchrun.errors import UsageError

KIB = 1024
MIB = 1024**2
GIB = 1024**3
TIB = 1024**4

_FACTORS = {
    "": 1,
    "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": TIB, "tib": TIB, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Read a size: `6GiB`, `6G` (the same), `1.5GB` (decimal), `1048576` (bytes); UsageError if the text is none."""
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"'{text}' is not a size", "write it like 6GiB, 512MiB or 800MB")
    size = float(match[1]) * factor
    if size >= 1 << 63:
        raise UsageError(f"'{text[:40]}' is more than any machine has", "write it like 6GiB, 512MiB or 800MB")
    return int(size)


def format_bytes(size: float) -> str:
    """Write a size with a binary unit and three significant digits: `6 GiB`, `48.7 MiB`."""
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        # 0.9995 and not 1: what would be rounded to 1,000 of a unit is shown in the next one.
        if abs(size) >= factor * 0.9995:
            return f"{_three_digits(size / factor)} {unit}"
    return f"{size:.0f} B"


def mib_up(size: int) -> str:
    """Write a size that something needs in whole MiB, rounded up since less would be too little: `1215 MiB`."""
    return f"{-(-size // MIB)} MiB"


def format_rate(bytes_per_second: float) -> str:
    """Write a rate in decimal units, as disks are sold: `1.82 GB/s`."""
    if bytes_per_second >= 1e8:
        return f"{bytes_per_second / 1e9:.2f} GB/s"
    return f"{bytes_per_second / 1e6:.2f} MB/s"


def format_seconds(seconds: float) -> str:
    """Write a duration: `4.8 ms`, `2.31 s`, `3 min 20 s`, `2 h 05 min`."""
    # As in `format_bytes`: what would be rounded up to the next unit is shown in it.
    if seconds < 0.99995:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 119.995:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(count: int, noun: str, plural: str = "") -> str:
    """Write a number of things: `1 expert`, `2 experts`."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def _three_digits(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
