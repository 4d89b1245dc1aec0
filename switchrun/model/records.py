"""What a session is asked for and what it gives back, as plain values without torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from switchrun.checkpoint.types import Stack
from switchrun.errors import UsageError, check_count, printable

if TYPE_CHECKING:
    from switchrun.checkpoint.steps import Stage
    from switchrun.planning.plan import TierUse

SCHEMA_VERSION = 1

#: What is less about the answer than about how it came to be, at the end of a record, and what was asked for besides.
_LAST_KEYS = ("finish_reason", "tokens", "timing", "experts", "memory", "model", "alternatives", "routing")

FinishReason = Literal["stop", "length"]

_Result = TypeVar("_Result", bound="GenerateResult | ScoreResult")


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
        seed: Seed of the draws; an input's id is added to it.
        alternatives: So many answers for each input, best first, with their log-probabilities: the best different ones
            of a beam search, or so many draws. 0 is one answer without them. Each ends with the sentinel that follows
            the input's own and the end of sequence, if not before. Only to fill.
        explain: Say which expert each token went to, in each sparse layer.

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
    alternatives: int = 0
    explain: bool = False

    @property
    def beams(self) -> int:
        """Beams that the search keeps: for alternatives twice as many, since some say the same."""
        return self.num_beams if self.sample else max(self.num_beams, 2 * self.alternatives)

    @property
    def sequences(self) -> int:
        """What `num_beams` a session must be opened with."""
        return max(self.num_beams, 2 * self.alternatives)

    @property
    def one_by_one(self) -> bool:
        """Whether the decoder has one input at a time."""
        return self.beams > 1 or self.sample

    @property
    def scored(self) -> bool:
        """Whether the decoder goes over the answers once more: a step of beam search does not say whose it was."""
        return self.alternatives > 0 or (self.explain and self.beams > 1)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            check_count(name, getattr(self, name))
        for name in ("sample", "explain"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}: {getattr(self, name)!r} is neither True nor False", option=name)
        for name, least, most in (("top_k", 0, 2**31), ("seed", -(2**63), 2**63), ("alternatives", 0, 2**31)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < most:
                raise UsageError(f"{name}: {value!r} is not a whole number from {least} to {most - 1}", option=name)
        for name, highest, hint in (
            ("temperature", sys.float_info.max, "1 leaves the probabilities as they are"),
            ("top_p", 1.0, "1 draws from all tokens"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= highest:
                limit = f"above 0 and at most {highest:g}" if highest == 1 else "above 0"
                raise UsageError(f"{name} must be {limit}, not {value}", hint, option=name)
        if self.alternatives and self.sample and self.num_beams > 1:
            raise UsageError("alternatives: with sampling they are draws, which have no beams", option="alternatives")


@dataclass(frozen=True, slots=True)
class Span:
    """The text that the model gave for one sentinel; None if it gave none."""

    sentinel: str
    text: str | None


@dataclass(frozen=True, slots=True)
class ScoredSpan(Span):
    """A span and the sum of its tokens' log-probabilities, in nats: 0 if it has none, None if there is no span."""

    log_probability: float | None


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of one input: `dropped` were over an expert's capacity, summed over the layers."""

    input: int
    output: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Timing:
    """`ttft` is from the request to the first token, `itl` the mean time of each later token, None if there is none."""

    open_seconds: float
    ttft_seconds: float
    itl_seconds: float | None
    total_seconds: float


@dataclass(frozen=True, slots=True)
class TierCounts:
    """What the expert cache of a tier, `gpu:0` or `cpu`, did.

    What a GPU has not is asked of `cpu`. Loads are copies from CPU memory to a GPU, or reads from disk into CPU memory.
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
    """What the expert caches did, all tiers together: a hit was in some memory, a load was read from disk.

    `tiers` are the tiers, fast to slow. Of the loads, `hub_loads` came from the Hub, with `hub_bytes`.
    """

    requests: int
    hits: int
    loads: int
    load_bytes: int
    load_seconds: float
    tiers: tuple[TierCounts, ...] = ()
    hub_loads: int = 0
    hub_bytes: int = 0

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
class Alternative:
    """One of several answers; `log_probability` is the sum over all of `output_ids` but the start token, in nats."""

    text: str
    raw: str
    output_ids: tuple[int, ...]
    spans: tuple[ScoredSpan, ...]
    finish_reason: FinishReason
    log_probability: float

    def __repr__(self) -> str:
        return f"<Alternative: {self.log_probability:.3f}, {_short(self.text)}>"


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """The experts that a sparse layer's router chose, the probability of each, and which tokens were dropped.

    `dropped` are positions: these tokens were over the capacity of the expert that is named.
    """

    stack: Stack
    block: int
    experts: tuple[int, ...]
    probabilities: tuple[float, ...]
    dropped: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the tokens of one input went: layers of the encoder have an expert for each of the input's tokens.

    Those of the decoder have one for each generated token, as which the step ended that the expert was chosen in.
    """

    input_tokens: tuple[str, ...]
    output_tokens: tuple[str, ...]
    layers: tuple[LayerRouting, ...]

    def __repr__(self) -> str:
        tokens = f"{len(self.input_tokens)} + {len(self.output_tokens)} tokens"
        return f"<Routing of {tokens} in {len(self.layers)} layers>"


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """One answered input. `as_record` returns the JSON of `docs/schemas/generate.schema.json`.

    `routing` is None unless it was asked for.
    """

    id: int
    input: str
    text: str
    raw: str
    output_ids: tuple[int, ...]
    finish_reason: FinishReason
    tokens: TokenCounts
    timing: Timing
    experts: ExpertCounts
    memory: MemoryPeak
    model: ModelInfo
    routing: Routing | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {_short(self.text)}>"

    def as_record(self) -> dict[str, Any]:
        """Return the result as a JSON-ready dict."""
        record = _record(self)
        for name in _LAST_KEYS:
            if (value := record.pop(name, None)) is not None:
                record[name] = value
        return record


@dataclass(frozen=True, slots=True, repr=False)
class FillResult(GenerateResult):
    """One filled input: its `text` with the `spans` in it. Its JSON is that of `docs/schemas/fill.schema.json`.

    `alternatives` is None unless they were asked for; then the answer is the first of them.
    """

    spans: tuple[Span, ...]
    alternatives: tuple[Alternative, ...] | None = None


@dataclass(frozen=True, slots=True)
class ScoreTiming:
    """Opening the model, and the batch that the input ran in."""

    open_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """How likely one filling is. `as_record` returns the JSON of `docs/schemas/score.schema.json`.

    `log_probability` is the sum over all of `target_ids`, in nats; `text` is the input, filled in.
    """

    id: int
    input: str
    text: str
    target_ids: tuple[int, ...]
    log_probability: float
    spans: tuple[ScoredSpan, ...]
    tokens: TokenCounts
    timing: ScoreTiming
    experts: ExpertCounts
    memory: MemoryPeak
    model: ModelInfo

    def __repr__(self) -> str:
        return f"<ScoreResult {self.id}: {self.log_probability:.3f}, {_short(self.text)}>"

    def as_record(self) -> dict[str, Any]:
        """Return the result as a JSON-ready dict."""
        return _record(self)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def _record(result: GenerateResult | ScoreResult) -> dict[str, Any]:
    record = {"schema_version": SCHEMA_VERSION, **asdict(result)}
    record["experts"]["hit_rate"] = result.experts.hit_rate
    record["experts"]["tiers"] = [asdict(tier) | {"hit_rate": tier.hit_rate} for tier in result.experts.tiers]
    return record


def read_record(kind: type[_Result], record: object) -> _Result:
    """Return the result that `as_record` made a record of, or somebody else, who may have added keys.

    Raises:
        ValueError: It is no such record.
    """
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"it is no record of version {SCHEMA_VERSION}")
    result: _Result = _read(kind, record, "")
    return result


def _read(kind: Any, value: Any, name: str) -> Any:
    """Return a value of JSON as what a field's type says."""
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        given = {}
        for each in fields(kind):
            path = f"{name}.{each.name}".removeprefix(".")
            if each.name in value:
                given[each.name] = _read(_types(kind)[each.name], value[each.name], path)
            elif each.default is MISSING:
                raise ValueError(f"{path} is missing")
        return kind(**given)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(parts[0], each, name) for each in value)
    if origin is Literal and value in parts:
        return value
    if type(None) in parts:
        return None if value is None else _read(parts[0], value, name)
    # Larger numbers cannot be reckoned with.
    if kind is float and type(value) in (int, float) and abs(value) < 2**63 and not math.isnan(value):
        return float(value)
    if (kind is int and type(value) is int and abs(value) < 2**63) or (kind is str and type(value) is str):
        return value
    raise ValueError(f"{name} is {printable(repr(value), 100)}")


@cache
def _types(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, which are written as text."""
    return get_type_hints(kind)


@dataclass(frozen=True, slots=True)
class HubCounts:
    """What a session asked of the Hub: headers, dense weights and experts.

    `requests` are for ranges and for files' URLs, `retries` those that were repeated; in `seconds` at least one read
    was under way.
    """

    bytes: int
    requests: int
    retries: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SessionStats:
    """What a session took so far; sums over its fills, `ttft_seconds` and `itl_seconds` means.

    `tiers` is what each tier holds, as planned; in `wait_seconds` the model stood still for a read or a copy to a GPU.
    `hub` is None unless weights are read from the Hub.
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
    hub: HubCounts | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a session is, handed to its `progress`.

    `done` of `total` counts bytes of whole files from the Hub (`download`), files whose headers are read (`index`),
    bytes of dense weights from the Hub (`fetch`) or into memory (`open`), sparse layers (`encode`, `score`) or tokens,
    at most (`decode`); nothing while the Hub is asked what it has (`ask`), in `plan`, and while libraries are imported
    (`import`). `load_bytes` are the expert bytes read since the session was opened, `hub_bytes` all that came from the
    Hub, and `ids` those of the inputs that are answered together.
    """

    stage: Stage
    done: int
    total: int
    load_bytes: int
    hub_bytes: int = 0
    ids: tuple[int, ...] = ()


ProgressCallback = Callable[[Progress], None]
