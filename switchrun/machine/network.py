"""How fast the Hub was, remembered for each address of a Hub."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from switchrun.machine import remembered

_HUB = "https://huggingface.co"
#: So many bytes are a fair measurement: what came before tells more of latency.
_SAMPLE_BYTES = 64_000_000


def remember_bandwidth(nbytes: int, seconds: float) -> None:
    """Keep how fast the Hub was, if so many bytes say that: `seconds` in which at least one read was under way."""
    if nbytes >= _SAMPLE_BYTES and seconds > 0:
        remembered.remember("network", _endpoint(), nbytes / seconds)


def known_bandwidth() -> float | None:
    """Return how fast the Hub was when it was last measured, in bytes per second."""
    return remembered.as_rate(remembered.recall("network", _endpoint()))


def _endpoint() -> str:
    # By HF_ENDPOINT itself: importing huggingface_hub takes longer than a plan. No user's name, no password, no query.
    try:
        address = urlsplit(os.environ.get("HF_ENDPOINT", "").strip() or _HUB)
    except ValueError:  # it is none, as the first request will say
        return ""
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path.rstrip('/')}"
