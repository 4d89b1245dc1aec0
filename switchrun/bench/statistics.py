"""Medians, extremes and percentiles of a few samples, and whether they are too far apart to be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

#: Samples whose range is more than this share of their median are called noisy.
NOISE = 0.2

Summary = dict[str, Any]


def summarise(samples: Sequence[float | None]) -> Summary | None:
    """Give median, minimum, maximum and the samples themselves; None if nothing was measured."""
    known = [sample for sample in samples if sample is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known), "samples": known}


def percentile(samples: Sequence[float], share: float) -> float | None:
    """Give the value below which a share (0 to 1) of the samples lies, interpolated; None without samples."""
    if not samples:
        return None
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def divide(upper: float | None, lower: float | None) -> float | None:
    """Give a ratio; None where it has none."""
    return upper / lower if upper is not None and lower else None


def noisy(metrics: Mapping[str, Summary | None]) -> list[str]:
    """Name the times and rates whose samples are too far apart."""
    return [
        name
        for name, summary in metrics.items()
        if summary
        and name.endswith(("seconds", "per_second"))
        and summary["median"] > 0
        and (summary["max"] - summary["min"]) / summary["median"] > NOISE
    ]
