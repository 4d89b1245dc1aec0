"""What limits a model here, and what would help, in a few short sentences that records bear out."""

from __future__ import annotations

from collections.abc import Sequence

from switchrun.bench.records import SPARSE, Record, failure, label, median
from switchrun.dtypes import STORED_ITEMSIZE, WEIGHT_DTYPES
from switchrun.units import format_bytes, format_count

#: From this share of a fill, or of its reads, something is said to limit it.
_LIMITS = 0.5
#: From so many times a fill on, the time to open is long.
_LONG = 5
#: Bytes of a weight in the dtype to try next, by the one that experts are kept in.
_FEWER_BYTES = {"fp32": ("int8", 1.0), "bf16": ("int8", 1.0), "int8": ("nf4", 0.5625)}


def verdict(records: Sequence[Record]) -> str:
    """Return what limits the fastest cell, and what would help; or why nothing was measured."""
    measured = [(number, record) for number, record in enumerate(records, 1) if record["status"] == "ok"]
    failed = len(records) - len(measured)
    if not measured:
        return f"Nothing was measured: {failure(records[0])}."
    number, best = max(measured, key=lambda each: median(each[1], "sequences_per_second"))
    sentences = []
    if len(measured) > 1:
        rate = median(best, "sequences_per_second")
        sentences.append(f"Cell {number} is the fastest ({label(best)}): {rate:.3g} inputs/s.")
    sentences += _judge(best)
    times = median(best, "open_seconds") / median(best, "fill_seconds")
    if times > _LONG:
        sentences.append(f"Opening takes {times:.0f} times as long as a fill: give all inputs to one command.")
    if failed:
        sentences.append(f"{format_count(failed, 'cell')} of {len(records)} failed.")
    return " ".join(sentences)


def _judge(record: Record) -> list[str]:
    fill = median(record, "fill_seconds")
    waiting = min(median(record, "wait_seconds") / fill, 1.0)
    sparse = [note for note in record["notes"] if SPARSE in note]
    if waiting < _LIMITS and sparse:
        return [f"What limits here cannot be said: {sparse[0]}."]
    if waiting < _LIMITS:
        experts = median(record, "expert_seconds") / fill
        return [
            f"Computing limits: {_percent(1 - waiting)} of a fill, {_percent(experts)} for experts and "
            f"{_percent(1 - waiting - experts)} for all else.",
            f"A faster disk or more memory would save {_percent(waiting)} at most.",
        ]
    read, loads = median(record, "load_bytes"), median(record, "expert_loads")
    fetched = median(record, "hub_bytes")
    if fetched > _LIMITS * read:
        return [
            f"The network limits: {_percent(waiting)} of a fill was waiting, and {format_bytes(fetched)} came from the "
            "Hub.",
            "They are kept: the same fill would fetch nothing the next time.",
        ]
    plan = record["plan"]
    used = median(record, "distinct_expert_bytes") / plan["expert_bytes"]
    again = max(loads - used, 0) / loads if loads else 0.0
    if again > _LIMITS:
        what = f"Memory is too small: {_percent(again)} of the reads were of experts that the same fill had read before"
        sentences = [f"{what}, and {_percent(waiting)} of the fill was waiting for the disk."]
    else:
        sentences = [f"The disk limits: {_percent(waiting)} of a fill was waiting for it."]
    helps = [*_memory(record, used, again), *_dtype(record, read, loads)]
    return [*sentences, f"{'; '.join(helps or [f'A disk twice as fast would save {_percent(waiting / 2)}'])}."]


def _memory(record: Record, used: float, again: float) -> list[str]:
    """Return how much more memory would keep what is read more than once."""
    plan = record["plan"]
    if again > 0:
        missing, what = used - plan["expert_slots"], "every expert that a fill uses"
    else:
        missing, what = plan["num_experts"] - plan["expert_slots"], "every expert for the next fills"
    size = missing * plan["slot_bytes"]
    possible = 0 < size < record["environment"]["memory_bytes"]
    return [f"{format_bytes(size)} more memory would keep {what}"] if possible else []


def _dtype(record: Record, read: float, loads: float) -> list[str]:
    """Return how much less another dtype would read."""
    plan = record["plan"]
    if not loads or plan["dtype"] not in _FEWER_BYTES or plan["stored_dtype"] not in WEIGHT_DTYPES:
        return []
    dtype, weight_bytes = _FEWER_BYTES[plan["dtype"]]
    share = weight_bytes * plan["expert_bytes"] / STORED_ITEMSIZE[plan["stored_dtype"]] * loads / read
    return [f"{dtype} would read {_percent(share)} of the bytes"] if share < 1 else []


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
