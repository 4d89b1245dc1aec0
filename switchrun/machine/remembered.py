"""What was measured of this machine and may be lost, kept from one run to the next in the cache folder as JSON."""

from __future__ import annotations

import json
from typing import Any

from switchrun.machine.folders import cache_folder, read_cache_file, write_cache_file

#: Beyond these, in bytes per second, it is no disk and no network that was measured.
_SLOWEST, _FASTEST = 1e3, 1e13
#: Enough for thousands of filesystems.
_MOST_BYTES = 1 << 20


def remember(what: str, of: str, value: Any) -> None:
    """Keep something as JSON, such as the `bandwidth` of a filesystem."""
    known = _remembered(what) | {of: value}
    write_cache_file(cache_folder() / f"{what}.json", json.dumps(known).encode())


def recall(what: str, of: str) -> Any:
    """Return what was kept; None if nothing was."""
    return _remembered(what).get(of)


def as_rate(value: Any) -> float | None:
    """Return what was kept if it is a rate in bytes per second."""
    return float(value) if type(value) in (int, float) and _SLOWEST < value < _FASTEST else None


def _remembered(what: str) -> dict[str, Any]:
    try:
        known = json.loads(read_cache_file(cache_folder() / f"{what}.json", _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    # Nothing deeper was ever kept, and what is read here is written again.
    return {key: value for key, value in known.items() if _is_flat(value)} if isinstance(known, dict) else {}


def _is_flat(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else [value]
    return not any(isinstance(each, dict | list) for each in inner)
