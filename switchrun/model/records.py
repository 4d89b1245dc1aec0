"""What a fill is asked for and what it gives back, as plain values without torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from switchrun.errors import UsageError, check_count

if TYPE_CHECKING:
    from switchrun.planning.plan import TierUse

SCHEMA_VERSION = 1

FinishReason = Literal["stop", "length"]
Stage = Literal["open", "encode", "decode"]


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How to generate; greedy by default.

    Attributes:
        max_new_tokens: Most tokens to generate, end of sequence included.
        num_beams: Beams kept; 1 is no beam search.
        sample: Draw tokens instead of taking the likeliest.
        temperature: Divides the logits before drawing.
        top_p: Draw from the likeliest tokens that together have this probability.
        top_k: Draw from this many likeliest tokens; 0 is all of them.
        seed: Seed of the draws; the id of a batch's first input is added to it.

    Raises:
        UsageError: A value that makes no sense; its `option` names the field.
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            check_count(name, getattr(self, name))
        for name, least, most in (("top_k", 0, 2**31), ("seed", -(2**63), 2**63)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < most:
                raise UsageError(f"{name}: {value!r} is not a whole number from {least} to {most - 1}", option=name)
        for name, highest, hint in (
            ("temperature", math.inf, "1 leaves the probabilities as they are"),
            ("top_p", 1.0, "1 draws from all tokens"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= highest or value == math.inf:
                limit = "above 0" if highest == math.inf else f"above 0 and at most {highest:g}"
                raise UsageError(f"{name} must be {limit}, not {value}", hint, option=name)


@dataclass(frozen=True, slots=True)
class Span:
    """The text that the model gave for one sentinel; None if it gave none."""

    sentinel: str
    text: str | None


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of one input: `dropped` were over an expert's capacity, summed over the layers."""

    input: int
    output: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds; `ttft` is request to first token, `itl` the mean time of each later token (None if there is none)."""

    open_seconds: float
    ttft_seconds: float
    itl_seconds: float | None
    total_seconds: float


@dataclass(frozen=True, slots=True)
class TierCounts:
    """What one level of the expert cache did.

    Attributes:
        tier: `gpu:0` or `cpu`.
        requests: Experts asked for; what a GPU has not is asked of `cpu`.
        hits: Of those, the ones that were there.
        loads: Experts brought in: copied from CPU memory to a GPU, read from disk into CPU memory.
        load_bytes: Bytes brought in for them.
    """

    tier: str
    requests: int
    hits: int
    loads: int
    load_bytes: int

    @property
    def hit_rate(self) -> float | None:
        """Hits ÷ requests; None if nothing was requested."""
        return self.hits / self.requests if self.requests else None


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """What the expert cache did, all levels together: a hit was in some memory, a load was read from disk.

    `tiers` has the levels, fast to slow.
    """

    requests: int
    hits: int
    loads: int
    load_bytes: int
    load_seconds: float
    tiers: tuple[TierCounts, ...] = ()

    @property
    def hit_rate(self) -> float | None:
        """Hits ÷ requests; None if nothing was requested."""
        return self.hits / self.requests if self.requests else None


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """The process's peaks so far; `peak_gpu_bytes`, of the GPUs in use, is None without one."""

    peak_rss_bytes: int
    peak_gpu_bytes: int | None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model answered."""

    id: str
    revision: str | None
    dtype: str


@dataclass(frozen=True, slots=True)
class FillResult:
    """One filled input. `as_record` gives the JSON of `docs/schemas/fill.schema.json`."""

    id: int
    input: str
    text: str
    raw: str
    output_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    finish_reason: FinishReason
    tokens: TokenCounts
    timing: Timing
    experts: ExpertCounts
    memory: MemoryPeak
    model: ModelInfo

    def as_record(self) -> dict[str, Any]:
        """Give the result as a JSON-ready dict."""
        record = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        record["experts"]["hit_rate"] = self.experts.hit_rate
        record["experts"]["tiers"] = [asdict(tier) | {"hit_rate": tier.hit_rate} for tier in self.experts.tiers]
        return record


@dataclass(frozen=True, slots=True)
class SessionStats:
    """What a session took so far; sums over its fills.

    Attributes:
        tiers: What each tier holds, as planned.
        memory: The process's peaks.
        open_seconds: From the start of `Session.open` to ready.
        inputs: Inputs answered.
        output_tokens: Tokens generated for them.
        fill_seconds: Time spent on filling.
        ttft_seconds: Mean time to the first token; None before the first fill.
        itl_seconds: Mean time of each later token; None if there was none.
        experts: Counters of the expert cache.
        wait_seconds: Time in which the model stood still for a read, or for a copy to a GPU.
    """

    tiers: tuple[TierUse, ...]
    memory: MemoryPeak
    open_seconds: float
    inputs: int
    output_tokens: int
    fill_seconds: float
    ttft_seconds: float | None
    itl_seconds: float | None
    experts: ExpertCounts
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Told while a session works: the stage, what is done of it, and the expert bytes loaded so far.

    Attributes:
        stage: `open` (done and total in bytes of dense weights), `encode` (in sparse layers), `decode` (in tokens).
        done: How much of the stage is done.
        total: How much there is, at most.
        load_bytes: Expert bytes brought from disk since the session was opened.
    """

    stage: Stage
    done: int
    total: int
    load_bytes: int


ProgressCallback = Callable[[Progress], None]
