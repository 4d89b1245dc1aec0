"""A session without a model, and the command with that session in the place of the real one.

Run as `python -m tests.cli.fakes fill …` it is the `switchrun` command with `FakeSession`, for tests of signals and
pipes that need a process of their own but no torch. `FAKE_DELAY` is the time that a fill takes, in seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import switchrun.cli.answering
from switchrun.checkpoint.locate import demo_folder
from switchrun.errors import BudgetError, InputError
from switchrun.model.records import (
    Alternative,
    ExpertCounts,
    FillResult,
    GenerateResult,
    GenerationOptions,
    LayerRouting,
    MemoryPeak,
    ModelInfo,
    Progress,
    ProgressCallback,
    Routing,
    ScoredSpan,
    ScoreResult,
    ScoreTiming,
    Span,
    Timing,
    TokenCounts,
)
from switchrun.model.sentinels import Filling, check_sentinels, fill_in, sentinel
from switchrun.model.tokenizer import Encoded, EncodedFilling, EncodedText
from switchrun.planning.options import OpenOptions
from switchrun.planning.plan import HubCost

REPAIR = "num_decoder_layers is 12, but there are 15 decoder blocks"
#: The answer to every sentinel.
WORD = "wörd\n[x]"
#: What the plan says of the Hub; tests put something in its place.
HUB_COST: HubCost | None = None
UNUSED = "gpu:0 is not used: a layer with experts needs 1234 MiB there, 512 MiB is allowed"


@dataclass(frozen=True)
class FakeCheckpoint:
    """What `fill` and `map` ask of a checkpoint."""

    repairs: tuple[str, ...] = (REPAIR,)
    path: Path = field(default_factory=demo_folder)
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = "f" * 64
    revision: str | None = None


@dataclass(frozen=True)
class FakePlan:
    """What `fill` and `map` ask of a plan."""

    notes: tuple[str, ...] = (UNUSED,)
    model_id: str = "google/switch-c-2048"
    dtype: str = "bf16"
    hub: HubCost | None = None


class FakeSession:
    """Answers every sentinel with `word`; keeps what it was asked for.

    A text with `TOO LONG` is refused by `encode`; one with `CRASH`, `OOM` or `BUDGET` makes `fill` fail.
    """

    def __init__(
        self,
        opening: OpenOptions,
        progress: ProgressCallback | None,
        warn: Callable[[str], None],
        on_plan: Callable[[Any], None],
    ) -> None:
        self.opening = opening
        self.progress = progress
        self.warn = warn
        self.checkpoint = FakeCheckpoint()
        self.plan = FakePlan(hub=HUB_COST)
        on_plan(self.plan)
        self.batches: list[list[str]] = []
        self.ids: list[int] = []
        self.options: list[GenerationOptions] = []
        self.closed = False

    def __enter__(self) -> FakeSession:
        self._tell(Progress("open", 1000, 2000, 0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True

    def encode(self, text: str) -> Encoded:
        """Refuse what the real session would refuse."""
        count = check_sentinels(text)
        if "TOO LONG" in text:
            raise InputError("the text has 600 tokens, there is memory for 512", "shorten it")
        return Encoded(text, (5, 1), tuple(range(32099, 32099 - count, -1)))

    def fill(
        self,
        encoded: Sequence[Encoded],
        options: GenerationOptions,
        *,
        ids: Sequence[int],
        on_results: Callable[[Sequence[FillResult]], None] = lambda _: None,
    ) -> list[FillResult]:
        """Answer each text, or fail as its words ask for."""
        size = self.opening.batch_size
        size = max(1, len(encoded)) if size == "auto" else size
        results: list[FillResult] = []
        for start in range(0, len(encoded), size):
            texts, numbers = [each.text for each in encoded[start : start + size]], ids[start : start + size]
            self.batches.append(texts)
            self.ids += numbers
            self.options.append(options)
            self._tell(Progress("decode", 3, 64, 5_000_000, ids=tuple(numbers)))
            time.sleep(float(os.environ.get("FAKE_DELAY", "0")))
            pairs = zip(texts, numbers, strict=True)
            answered = [self._detailed(self._answer(text, number), options) for text, number in pairs]
            on_results(answered)
            results += answered
        return results

    def encode_text(self, text: str, prefix: str) -> EncodedText:
        """Refuse what the real session would refuse."""
        if "TOO LONG" in text:
            raise InputError("the text has 600 tokens, there is memory for 512", "shorten it")
        return EncodedText(prefix + text, (5, 1))

    def own_options(self, **changes: Any) -> GenerationOptions:
        """Add what is given to 4 beams."""
        return GenerationOptions(**{"num_beams": 4} | changes)

    def generate(
        self,
        encoded: Sequence[EncodedText],
        options: GenerationOptions,
        *,
        ids: Sequence[int],
        on_results: Callable[[Sequence[GenerateResult]], None] = lambda _: None,
    ) -> list[GenerateResult]:
        """Answer each text by itself."""
        texts = [each.text for each in encoded]
        self.batches.append(texts)
        self.options.append(options)
        results = [self._generated(text, number) for text, number in zip(texts, ids, strict=True)]
        on_results(results)
        return results

    def _detailed(self, result: FillResult, options: GenerationOptions) -> FillResult:
        """Add what is asked for: two alternatives at the most, and a layer's routing with a dropped token."""
        if options.alternatives:
            spans = (ScoredSpan("<extra_id_0>", WORD, -1.0),)
            first = Alternative(result.text, result.raw, result.output_ids, spans, "stop", -1.5)
            second = replace(first, text="second\tone", raw="2", log_probability=-22.0)
            result = replace(result, alternatives=(first, second)[: options.alternatives])
        if options.explain:
            layer = LayerRouting("encoder", 1, (7, 3, 7, 7, 1, 2, 5, 6, 9), (0.5,) * 9, (3,))
            result = replace(result, routing=Routing(("a",) * 9, ("b",) * 3, (layer,)))
        return result

    def encode_filling(self, filling: Filling) -> EncodedFilling:
        """As `encode`."""
        return EncodedFilling(self.encode(filling.text), tuple(filling.spans), (32099, 5, 1))

    def score(
        self,
        encoded: Sequence[EncodedFilling],
        *,
        ids: Sequence[int],
        on_results: Callable[[Sequence[ScoreResult]], None] = lambda _: None,
    ) -> list[ScoreResult]:
        """Give each filling -3.5, and each span -1."""
        self.batches.append([each.text.text for each in encoded])
        results = [self._score(each, number) for each, number in zip(encoded, ids, strict=True)]
        on_results(results)
        return results

    def _score(self, filling: EncodedFilling, number: int) -> ScoreResult:
        spans = tuple(ScoredSpan(sentinel(at), span, -1.0) for at, span in enumerate(filling.spans))
        return ScoreResult(
            id=number,
            input=filling.text.text,
            text=fill_in(filling.text.text, spans),
            target_ids=filling.target,
            log_probability=-3.5,
            spans=spans,
            tokens=TokenCounts(6, 4, 0),
            timing=ScoreTiming(0.5, 0.2),
            experts=ExpertCounts(0, 0, 0, 0, 0.0),
            memory=MemoryPeak(10**9, None),
            model=ModelInfo(str(self.opening.model or "demo"), None, "bf16"),
        )

    def _generated(self, text: str, number: int) -> GenerateResult:
        return GenerateResult(
            id=number,
            input=text,
            text=text.replace("<extra_id_0>", ""),
            raw=f"<pad> {text}</s>",
            output_ids=(0, 5, 1),
            finish_reason="stop",
            tokens=TokenCounts(6, 2, 0),
            timing=Timing(0.5, 0.1, None, 0.2),
            experts=ExpertCounts(0, 0, 0, 0, 0.0),
            memory=MemoryPeak(10**9, None),
            model=ModelInfo(str(self.opening.model or "demo"), None, "bf16"),
        )

    def _tell(self, progress: Progress) -> None:
        if self.progress is not None:
            self.progress(progress)

    def _answer(self, text: str, number: int) -> FillResult:
        if "CRASH" in text:
            raise ZeroDivisionError("division by zero\nin the second line")
        if "OOM" in text:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        if "BUDGET" in text:
            raise BudgetError("this batch needs 2 GiB", "use --batch-size 1")
        return FillResult(
            id=number,
            input=text,
            text=text.replace("<extra_id_0>", WORD),
            raw=f"<pad> <extra_id_0> {WORD}</s>",
            output_ids=(0, 32099, 5, 1),
            spans=(Span("<extra_id_0>", WORD),),
            finish_reason="stop",
            tokens=TokenCounts(6, 4, 0),
            timing=Timing(0.5, 0.1, None, 0.2),
            experts=ExpertCounts(0, 0, 0, 0, 0.0),
            memory=MemoryPeak(10**9, None),
            model=ModelInfo(str(self.opening.model or "demo"), None, "bf16"),
        )


if __name__ == "__main__":
    from switchrun.cli.app import main

    switchrun.cli.answering.open_session = FakeSession  # type: ignore[assignment]
    main()
