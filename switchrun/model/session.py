"""A session: an open model with its cache, threads and files, which fills texts until it is closed.

Nothing of torch is imported before the dense weights are on their way into memory.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from switchrun.checkpoint.generation import generation_file, own_options
from switchrun.checkpoint.locate import hub_id
from switchrun.errors import BudgetError, InputError, ModelError, UsageError
from switchrun.experts.bookkeeping import CacheCounters, since, total
from switchrun.model.batching import WINDOW, batches_of, one_or_many
from switchrun.model.control import RowControl
from switchrun.model.opening import ImportLibraries, fetch_dense_weights, import_model, read_while_importing
from switchrun.model.preload import DensePreload
from switchrun.model.records import (
    Alternative,
    ExpertCounts,
    FillResult,
    GenerateResult,
    GenerationOptions,
    HubCounts,
    ModelInfo,
    ProgressCallback,
    Routing,
    ScoredSpan,
    ScoreResult,
    ScoreTiming,
    SessionStats,
    Span,
    TierCounts,
    Timing,
    TokenCounts,
)
from switchrun.model.reporting import Reporter
from switchrun.model.sentinels import Filling, fill_in, parse_spans, sentinel, span_places
from switchrun.model.tokenizer import Encoded, EncodedFilling, EncodedText, Tokenizer
from switchrun.model.tokenizer_files import TokenizerFiles, find_tokenizer, locate_tokenizer
from switchrun.planning import Plan
from switchrun.planning.memory import BatchShape, has_room, longest_input, max_output_tokens
from switchrun.planning.opening import EXPECTED_NEW_TOKENS, PlannedModel, held_bytes, plan_model
from switchrun.planning.options import OpenOptions
from switchrun.planning.plan import BatchSize

if TYPE_CHECKING:
    from switchrun.model.generate import RawOutput
    from switchrun.model.scoring import RawScore

_Text = TypeVar("_Text", bound=EncodedText)
_Result = TypeVar("_Result", bound=GenerateResult)
_Input = TypeVar("_Input")
_Answer = TypeVar("_Answer")


class Session:
    """An open Switch model. Make one with `Session.open`; it is a context manager and serves one thread at a time.

    Attributes:
        checkpoint: The checkpoint, with the repairs that it needed.
        plan: What went where.
        open_seconds: How long opening took.
        engine: The model itself, for measurements; not part of the public API.
    """

    def __init__(
        self,
        planned: PlannedModel,
        *,
        tokenizer: TokenizerFiles | None = None,
        preload: DensePreload | None = None,
        report: Reporter | None = None,
        warn: Callable[[str], None] | None = None,
        started: float | None = None,
    ) -> None:
        """Build what was planned; `Session.open` and `open_session` are the usual ways."""
        from switchrun.model.engine import Engine
        from switchrun.model.settings import check_settings

        started = time.perf_counter() if started is None else started
        self._report = report = report or Reporter()
        self._hub = planned.hub
        self._checked = {(planned.plan.num_beams > 1, False)}
        check_settings(planned.checkpoint, beams=planned.plan.num_beams > 1)
        files = tokenizer or find_tokenizer(planned.checkpoint.path, planned.options.tokenizer)
        self._tokenizer = Tokenizer.load(planned.checkpoint, files)
        stop_strings = planned.checkpoint.generation.get("stop_strings")
        self._stop = None if stop_strings is None else self._tokenizer.stop_criteria(stop_strings)
        self.engine = engine = Engine(planned, partial(report, "open"), warn, preload)
        report.read_bytes = lambda: engine.cache.read_bytes
        self.checkpoint, self.plan = engine.checkpoint, engine.plan
        self._most_tokens = longest_input(self.checkpoint, self.plan)
        self._totals = _Totals()
        self._busy = threading.Lock()
        self._closed = False
        self.open_seconds = time.perf_counter() - started

    @classmethod
    def open(
        cls,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        cpu_memory: str | int | None = None,
        gpu_memory: str | int | None = None,
        offload_folder: str | Path | None = None,
        offload_limit: str | int | None = None,
        device_map: str | Path | Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        hub: str = "auto",
        network_bandwidth: str | float | None = None,
        batch_size: BatchSize = 1,
        num_beams: int | None = 1,
        max_new_tokens: int | None = 64,
        progress: ProgressCallback | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> Session:
        """Open a model: read its headers, plan, place the dense weights. No expert is read.

        The arguments are those of `OpenOptions`; `progress` is called at each step of the session's work, and twice a
        second while one takes longer, and `warn` with warnings; both from any thread. Without it warnings are logged.

        Raises:
            SwitchrunError: One of its kinds; see `switchrun.errors`.
        """
        options = OpenOptions(
            model=model,
            dtype=dtype,
            cpu_memory=cpu_memory,
            gpu_memory=gpu_memory,
            offload_folder=offload_folder,
            offload_limit=offload_limit,
            device_map=device_map,
            tokenizer=tokenizer,
            hub=hub,
            network_bandwidth=network_bandwidth,
            batch_size=batch_size,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
        )
        return open_session(options, progress=progress, warn=warn)

    def encode(self, text: str) -> Encoded:
        """Make a text ready to be filled.

        Raises:
            InputError: It has no sentinels, or not in order, or the vocabulary has fewer, or there is no memory for
                its length.
        """
        return self._tokenizer.encode(text, self._most_tokens)

    @overload
    def fill(  # type: ignore[overload-overlap] # a text is a collection of texts, too
        self,
        texts: str | Encoded,
        options: GenerationOptions | None = None,
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[FillResult]], None] | None = None,
    ) -> FillResult: ...
    @overload
    def fill(
        self,
        texts: Collection[str | Encoded],
        options: GenerationOptions | None = None,
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[FillResult]], None] | None = None,
    ) -> list[FillResult]: ...
    @overload
    def fill(
        self,
        texts: Iterator[str | Encoded],
        options: GenerationOptions | None = None,
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[FillResult]], None] | None = None,
    ) -> Iterator[FillResult]: ...
    def fill(self, texts: Any, options: Any = None, *, ids: Any = None, on_results: Any = None) -> Any:
        """Fill texts with sentinels `<extra_id_0>`, `<extra_id_1>`, …, or what `encode` returned for them.

        One text has one result, a list has a list. An iterator, such as a generator or an open file, has an iterator,
        which takes the next texts when it is asked for their results. Give all texts that there are: they are filled in
        batches of like length, as large as the session's batch size. Generation is greedy by default. The results are
        in the order of the texts, their ids from 0 on, or `ids`. `on_results` is called with the results of each batch
        as soon as they are there.

        Raises:
            InputError: A text cannot be filled.
            ModelError: The model's own settings do not go with sampling, or with beams.
            BudgetError: More beams or tokens are asked for than memory was reserved for, or a GPU's memory runs out.
            UsageError: Another thread is filling with this session, it is closed, or an argument is of another kind.
        """
        options = GenerationOptions() if options is None else options
        answer = partial(self._answer, Encoded, self.encode, options, self._filled, on_results)
        return one_or_many(texts, (str, Encoded), ids, self._window, answer)

    def own_options(self, **changes: Any) -> GenerationOptions:
        """Return how the model's own settings have it generate, changed; the changes are fields of `GenerationOptions`.

        Raises:
            ModelError: A setting of the model's makes no sense, and no change takes its place.
            UsageError: A change makes no sense.
        """
        GenerationOptions(**changes)
        try:
            return GenerationOptions(**own_options(self.checkpoint, changes))
        except UsageError as error:
            file, flag = generation_file(self.checkpoint.path), error.option.replace("_", "-")
            raise ModelError(f"{file}: {error.message}", f"use --{flag} with --sample, or --no-sample") from error

    def encode_text(self, text: str, prefix: str = "") -> EncodedText:
        """Make any text ready for `generate`, with a prefix before it.

        Raises:
            InputError: There is no memory for its length, or the tokenizer does not take it.
        """
        return self._tokenizer.encode_text(text, prefix, self._most_tokens)

    @overload
    def generate(  # type: ignore[overload-overlap] # a text is a collection of texts, too
        self,
        texts: str | EncodedText,
        options: GenerationOptions | None = None,
        *,
        prefix: str = "",
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[GenerateResult]], None] | None = None,
    ) -> GenerateResult: ...
    @overload
    def generate(
        self,
        texts: Collection[str | EncodedText],
        options: GenerationOptions | None = None,
        *,
        prefix: str = "",
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[GenerateResult]], None] | None = None,
    ) -> list[GenerateResult]: ...
    @overload
    def generate(
        self,
        texts: Iterator[str | EncodedText],
        options: GenerationOptions | None = None,
        *,
        prefix: str = "",
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[GenerateResult]], None] | None = None,
    ) -> Iterator[GenerateResult]: ...
    def generate(
        self, texts: Any, options: Any = None, *, prefix: str = "", ids: Any = None, on_results: Any = None
    ) -> Any:
        """Answer texts with a model that was fine-tuned to: with summaries, or translations.

        A `prefix` is put before each text, but not before what `encode_text` returned. Without `options`, the model's
        own settings decide: `own_options`. Results, batches, order and ids are as of `fill`.

        Raises:
            SwitchrunError: As `fill`; ModelError also for settings that make no sense.
        """
        options = self.own_options() if options is None else options
        if isinstance(options, GenerationOptions) and options.alternatives:
            raise UsageError("alternatives: only fill has them", option="alternatives")
        encode = partial(self.encode_text, prefix=prefix)
        answer = partial(self._answer, EncodedText, encode, options, self._generated, on_results)
        return one_or_many(texts, (str, EncodedText), ids, self._window, answer)

    @property
    def _window(self) -> int:
        return WINDOW if self.plan.batch_size == "auto" else self.plan.batch_size

    def _answer(
        self,
        kind: type[_Text],
        encode: Callable[[str], _Text],
        options: GenerationOptions,
        result: Callable[..., _Result],
        on_results: Callable[[Sequence[_Result]], None] | None,
        texts: Sequence[str | _Text],
        ids: Sequence[int],
    ) -> list[_Result]:
        """Answer texts, or what `encode` made of them, a `kind`; `result` makes one of what came out."""
        if not isinstance(options, GenerationOptions):
            raise UsageError(f"options: {options!r} is no GenerationOptions", option="options")
        with self._one_thread():
            self._check_open()
            encoded = [text if isinstance(text, kind) else encode(str(text)) for text in texts]
            self.check_options(options)
            self._check_way(options)
            return _in_batches(
                encoded,
                self._batches(encoded, options),
                lambda batch, numbers: self._answer_batch(batch, options, result, numbers),
                ids,
                on_results,
            )

    def encode_filling(self, filling: Filling) -> EncodedFilling:
        """Make a filling ready to be scored.

        Raises:
            InputError: As `encode`, or there is no memory for the length of its spans.
        """
        encoded = self._tokenizer.encode_filling(filling, self._most_tokens)
        tokens, target = len(encoded.text.ids), len(encoded.target)
        if not has_room(self.checkpoint, self.plan, BatchShape(1, tokens, 0, target=target)):
            raise InputError(
                f"there is no memory to score {target} tokens of spans in a text of {tokens}",
                "score shorter ones, or reserve more with a larger --batch-size",
            )
        return encoded

    @overload
    def score(
        self,
        fillings: Filling | EncodedFilling,
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[ScoreResult]], None] | None = None,
    ) -> ScoreResult: ...
    @overload
    def score(
        self,
        fillings: Collection[Filling | EncodedFilling],
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[ScoreResult]], None] | None = None,
    ) -> list[ScoreResult]: ...
    @overload
    def score(
        self,
        fillings: Iterator[Filling | EncodedFilling],
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[ScoreResult]], None] | None = None,
    ) -> Iterator[ScoreResult]: ...
    def score(self, fillings: Any, *, ids: Any = None, on_results: Any = None) -> Any:
        """Return how likely fillings are, or what `encode_filling` returned for them.

        A batch takes one pass of the encoder and one of the decoder, each expert read once. Results, batches, order and
        ids are as of `fill`.

        Raises:
            InputError: A filling cannot be scored.
            ModelError: The model's scores are no numbers.
            BudgetError: A GPU's memory runs out.
            UsageError: Another thread is using this session, it is closed, or an argument is of another kind.
        """
        kinds = (Filling, EncodedFilling)
        return one_or_many(fillings, kinds, ids, self._window, partial(self._score, on_results))

    def _score(
        self,
        on_results: Callable[[Sequence[ScoreResult]], None] | None,
        fillings: Sequence[Filling | EncodedFilling],
        ids: Sequence[int],
    ) -> list[ScoreResult]:
        with self._one_thread():
            self._check_open()
            encoded = [each if isinstance(each, EncodedFilling) else self.encode_filling(each) for each in fillings]
            return _in_batches(encoded, self._score_batches(encoded), self._score_batch, ids, on_results)

    def check_options(self, options: GenerationOptions) -> None:
        """Raise what answering with these options would raise, whatever the text.

        Raises:
            BudgetError: More beams or tokens are asked for than memory was reserved for.
        """
        beams = self.plan.num_beams if options.scored else max(self.plan.num_beams, self.plan.sure_rows)
        if options.sequences > beams:
            raise BudgetError(
                f"{options.sequences} beams are asked for, memory is reserved for {self.plan.num_beams}",
                f"open the session with num_beams={options.sequences}",
            )
        most = self.plan.estimate.output_tokens
        if not options.scored:
            most = max_output_tokens(self.checkpoint, most)
        if options.max_new_tokens > most:
            raise BudgetError(
                f"{options.max_new_tokens} new tokens are asked for, memory is reserved for {most}",
                f"open the session with max_new_tokens={options.max_new_tokens}",
            )

    def spans_of(self, text: Encoded, ids: Sequence[int]) -> tuple[Span, ...]:
        """Return the spans of a text's answer, or of what there is of it so far."""
        return parse_spans(ids, text.sentinels, self._tokenizer.decode, text.closing)

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, without special tokens."""
        return self._tokenizer.decode(ids).strip()

    def together(self, inputs: Sequence[EncodedText | EncodedFilling], options: GenerationOptions) -> list[int]:
        """Return which of some inputs, all to be answered in the same way, make a batch with the first one."""
        fillings = [each for each in inputs if isinstance(each, EncodedFilling)]
        texts = [each for each in inputs if isinstance(each, EncodedText)]
        batches = self._score_batches(fillings) if fillings else self._batches(texts, options)
        return sorted(next(batch for batch in batches if 0 in batch))

    def answer_batch(
        self,
        inputs: Sequence[EncodedText | EncodedFilling],
        options: GenerationOptions,
        ids: Sequence[int],
        controls: Sequence[RowControl],
    ) -> Sequence[GenerateResult | ScoreResult]:
        """Answer one batch of what `encode`, `encode_text` or `encode_filling` returned: for who makes batches himself.

        Others may limit and stop each row by its own of the `controls`.

        Raises:
            SwitchrunError: As `fill` and `score`.
        """
        with self._one_thread():
            self._check_open()
            fillings = [each for each in inputs if isinstance(each, EncodedFilling)]
            if fillings:
                return self._score_batch(fillings, ids, controls)
            self.check_options(options)
            self._check_way(options)
            to_fill = [each for each in inputs if isinstance(each, Encoded)]
            if to_fill:
                return self._answer_batch(to_fill, options, self._filled, ids, controls)
            texts = [each for each in inputs if isinstance(each, EncodedText)]
            return self._answer_batch(texts, options, self._generated, ids, controls)

    def stats(self) -> SessionStats:
        """Return what the session took so far."""
        tiers, totals = self.engine.tiers.counters(), self._totals
        return SessionStats(
            tiers=self.engine.plan.tiers,
            memory=self.engine.memory_peak(),
            open_seconds=self.open_seconds,
            inputs=totals.inputs,
            output_tokens=totals.output_tokens,
            fill_seconds=totals.fill_seconds,
            ttft_seconds=totals.ttft_seconds / totals.fills if totals.fills else None,
            itl_seconds=totals.later_seconds / totals.later_tokens if totals.later_tokens else None,
            experts=_expert_counts(tiers),
            wait_seconds=total(tiers).wait_seconds,
            hub=self._hub_counts(),
        )

    def _hub_counts(self) -> HubCounts | None:
        if self._hub is None:
            return None
        traffic = self._hub.traffic
        return HubCounts(traffic.bytes, traffic.requests + traffic.resolves, traffic.retries, traffic.seconds)

    def close(self) -> None:
        """Close files, end threads and give the memory back; closing twice does nothing. Not while it fills."""
        with self._one_thread():
            self._closed = True
            self.engine.close()

    def __repr__(self) -> str:
        return f"<Session of {self.checkpoint.id}, {self.plan.dtype}{', closed' if self._closed else ''}>"

    def __enter__(self) -> Session:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        """Keep other threads out: cache and readers serve one at a time."""
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                "another thread is using this session", "let threads take turns with a lock, or open a session for each"
            )
        try:
            yield
        finally:
            self._busy.release()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this session is closed", "open another one")

    def _check_way(self, options: GenerationOptions) -> None:
        """Try the model's own settings in a way to generate that they have not been tried in."""
        from switchrun.model.settings import check_settings

        beams, sample = way = options.beams > 1, options.sample
        if way not in self._checked:
            check_settings(self.checkpoint, beams=beams, sample=sample)
            self._checked.add(way)

    def _batches(self, texts: Sequence[EncodedText], options: GenerationOptions) -> list[list[int]]:
        """Divide texts into batches; a long one takes the place of several."""
        most = len(texts) if self.plan.batch_size == "auto" else self.plan.batch_size
        together, target = not options.one_by_one, options.max_new_tokens + 1 if options.scored else 0

        def fits(rows: int, tokens: int) -> bool:
            shape = BatchShape(rows, tokens, options.max_new_tokens, options.sequences, together, target)
            return rows <= most and has_room(self.checkpoint, self.plan, shape)

        return batches_of([len(text.ids) for text in texts], fits)

    def _score_batches(self, fillings: Sequence[EncodedFilling]) -> list[list[int]]:
        """The same for fillings; the spans of one may be longer than its text."""
        most = len(fillings) if self.plan.batch_size == "auto" else self.plan.batch_size
        longest = max((len(each.target) for each in fillings), default=0)

        def fits(rows: int, tokens: int) -> bool:
            shape = BatchShape(rows, tokens, 0, target=min(tokens, longest))
            return rows <= most and has_room(self.checkpoint, self.plan, shape)

        return batches_of([max(len(each.text.ids), len(each.target)) for each in fillings], fits)

    def _score_batch(
        self, batch: Sequence[EncodedFilling], ids: Sequence[int], controls: Sequence[RowControl] = ()
    ) -> list[ScoreResult]:
        start = time.perf_counter()
        before = self.engine.tiers.counters()
        with self._report.working(tuple(ids)):
            scores = self.engine.score(
                [each.text.ids for each in batch],
                [each.target for each in batch],
                controls=controls,
                on_layer=partial(self._report, "score"),
            )
        experts = _expert_counts(since(self.engine.tiers.counters(), before))
        timing = ScoreTiming(self.open_seconds, time.perf_counter() - start)
        self._totals.fill_seconds += timing.total_seconds
        self._totals.inputs += len(batch)
        return [
            self._score_result(number, filling, score, timing, experts)
            for number, filling, score in zip(ids, batch, scores, strict=True)
        ]

    def _score_result(
        self, number: int, filling: EncodedFilling, score: RawScore, timing: ScoreTiming, experts: ExpertCounts
    ) -> ScoreResult:
        given = [Span(sentinel(at), span) for at, span in enumerate(filling.spans)]
        spans = _scored(given, filling.text, filling.target, score.log_probabilities)
        return ScoreResult(
            id=number,
            input=filling.text.text,
            text=fill_in(filling.text.text, spans),
            target_ids=filling.target,
            log_probability=math.fsum(score.log_probabilities),
            spans=spans,
            tokens=TokenCounts(len(filling.text.ids), len(filling.target), score.dropped),
            timing=timing,
            experts=experts,
            memory=self.engine.memory_peak(),
            model=self._model_info(),
        )

    def _answer_batch(
        self,
        batch: Sequence[_Text],
        options: GenerationOptions,
        make: Callable[..., _Result],
        ids: Sequence[int],
        controls: Sequence[RowControl] = (),
    ) -> list[_Result]:
        start = time.perf_counter()
        before = self.engine.tiers.counters()
        with self._report.working(tuple(ids)):
            outputs = self.engine.generate(
                [text.ids for text in batch],
                options,
                # Else the same text on two lines would get the same answer twice.
                seeds=[options.seed + number for number in ids],
                stop=self._stop,
                closings=[text.closing if isinstance(text, Encoded) else None for text in batch],
                controls=controls,
                on_layer=partial(self._report, "encode"),
                on_token=lambda step: self._report("decode", step, options.max_new_tokens),
            )
        end = time.perf_counter()
        experts = _expert_counts(since(self.engine.tiers.counters(), before))
        self._totals.fill_seconds += end - start
        results = []
        for number, text, output in zip(ids, batch, outputs, strict=True):
            extra: dict[str, Any] = {}
            if options.alternatives and isinstance(text, Encoded):
                extra["alternatives"], output = self._alternatives(text, output, options)
            if options.explain:
                pieces = self._tokenizer.pieces
                extra["routing"] = Routing(pieces(text.ids), pieces(output.ids[1:]), output.routing)
            later = len(output.ids) - 2
            itl = (output.last_token_at - output.first_token_at) / later if later > 0 else None
            timing = Timing(self.open_seconds, output.first_token_at - start, itl, end - start)
            result = make(
                text,
                output.ids,
                id=number,
                input=text.text,
                raw=self._tokenizer.decode(output.ids, special=True),
                output_ids=output.ids,
                finish_reason="stop" if output.finished else "length",
                tokens=TokenCounts(len(text.ids), len(output.ids) - 1, output.dropped),
                timing=timing,
                experts=experts,
                memory=self.engine.memory_peak(),
                model=self._model_info(),
                **extra,
            )
            self._totals.add(result)
            results.append(result)
        return results

    def _alternatives(
        self, text: Encoded, output: RawOutput, options: GenerationOptions
    ) -> tuple[tuple[Alternative, ...], RawOutput]:
        """Return the alternatives that an output has, best first, and the output with the best one in its place.

        Of those of a search that say the same, the likeliest stays; draws all do.
        """
        found: dict[object, tuple[Alternative, RawOutput]] = {}
        for each in sorted(output.others, key=lambda other: -math.fsum(other.log_probabilities)):
            spans = parse_spans(each.ids, text.sentinels, self._tokenizer.decode, text.closing)
            alternative = Alternative(
                text=fill_in(text.text, spans),
                raw=self._tokenizer.decode(each.ids, special=True),
                output_ids=each.ids,
                spans=_scored(spans, text, each.ids[1:], each.log_probabilities),
                finish_reason="stop" if each.finished else "length",
                log_probability=math.fsum(each.log_probabilities),
            )
            found.setdefault(len(found) if options.sample else alternative.text, (alternative, each))
        best = list(found.values())[: options.alternatives]
        if best:
            first = best[0][1]
            encoder = tuple(layer for layer in output.routing if layer.stack == "encoder")
            output = replace(first, dropped=output.dropped, routing=encoder + first.routing)
        return tuple(alternative for alternative, _ in best), output

    def _filled(self, text: Encoded, ids: Sequence[int], **rest: Any) -> FillResult:
        spans = self.spans_of(text, ids)
        return FillResult(text=fill_in(text.text, spans), spans=spans, **rest)

    def _generated(self, _text: EncodedText, ids: Sequence[int], **rest: Any) -> GenerateResult:
        return GenerateResult(text=self.text_of(ids), **rest)

    def _model_info(self) -> ModelInfo:
        return ModelInfo(self.checkpoint.id, self.checkpoint.revision, self.plan.dtype)


def open_session(
    options: OpenOptions,
    *,
    progress: ProgressCallback | None = None,
    warn: Callable[[str], None] | None = None,
    started: float | None = None,
    import_libraries: ImportLibraries = import_model,
    on_plan: Callable[[Plan], object] = lambda _plan: None,
) -> Session:
    """Open a model; torch and transformers are imported while its dense weights are being read.

    `progress` is called at each step, and twice a second while one takes longer; `warn` with warnings; both from any
    thread. Without it warnings are logged.
    `started` is `time.perf_counter()` when opening began, None now; `import_libraries` imports in the caller's own way;
    `on_plan` is called with the plan before a weight is read.

    Raises:
        SwitchrunError: One of its kinds. A wrong model, tokenizer or budget is noticed before torch is imported.
    """
    started = time.perf_counter() if started is None else started
    report = Reporter(progress)
    with report.working():
        own_bytes = held_bytes()
        model = None if options.model is None else str(options.model)
        if hub_id(options.tokenizer or model) is not None:
            report("ask")
        folder = locate_tokenizer(model, options.tokenizer)
        planned = plan_model(
            options, hub_output_tokens=EXPECTED_NEW_TOKENS, own_bytes=own_bytes, warn=warn, steps=report
        )
        try:
            tokenizer = find_tokenizer(planned.checkpoint.path, options.tokenizer, folder)
            on_plan(planned.plan)
        except BaseException:
            planned.close()
            raise
        planned = fetch_dense_weights(planned, report)
        with read_while_importing(planned, import_libraries, report) as preload:
            return Session(planned, tokenizer=tokenizer, preload=preload, report=report, warn=warn, started=started)


def _in_batches(
    inputs: Sequence[_Input],
    batches: Sequence[Sequence[int]],
    answer: Callable[[Sequence[_Input], Sequence[int]], Sequence[_Answer]],
    ids: Sequence[int],
    on_results: Callable[[Sequence[_Answer]], None] | None,
) -> list[_Answer]:
    """Return the answers to inputs in their order; `batches` are their indices."""
    results: dict[int, _Answer] = {}
    for batch in batches:
        answers = answer([inputs[at] for at in batch], [ids[at] for at in batch])
        results |= zip(batch, answers, strict=True)
        if on_results is not None:
            on_results(answers)
    return [results[at] for at in range(len(inputs))]


def _scored(
    spans: Sequence[Span], text: Encoded, ids: Sequence[int], log_probabilities: Sequence[float]
) -> tuple[ScoredSpan, ...]:
    """Return the spans of an answer with what their tokens add up to."""
    places = span_places(ids, text.sentinels, text.closing)
    return tuple(
        ScoredSpan(
            span.sentinel,
            span.text,
            math.fsum(log_probabilities[place] for place in places[number]) if number in places else None,
        )
        for number, span in enumerate(spans)
    )


class _Totals:
    """Sums over the inputs that a session answered."""

    def __init__(self) -> None:
        #: Of the inputs, `fills` were generated for.
        self.inputs = self.fills = self.output_tokens = self.later_tokens = 0
        self.fill_seconds = self.ttft_seconds = self.later_seconds = 0.0

    def add(self, result: GenerateResult) -> None:
        self.inputs += 1
        self.fills += 1
        self.output_tokens += result.tokens.output
        self.ttft_seconds += result.timing.ttft_seconds
        if result.timing.itl_seconds is not None:
            self.later_tokens += result.tokens.output - 1
            self.later_seconds += result.timing.itl_seconds * (result.tokens.output - 1)


def _expert_counts(tiers: Mapping[str, CacheCounters]) -> ExpertCounts:
    """Return the counters that a record has; see `ExpertTiers.counters`."""
    together = total(tiers)
    return ExpertCounts(
        requests=together.requests,
        hits=together.hits,
        loads=together.loads,
        load_bytes=together.load_bytes,
        load_seconds=together.load_seconds,
        tiers=tuple(TierCounts(tier, c.requests, c.hits, c.loads, c.load_bytes) for tier, c in tiers.items()),
        hub_loads=together.hub_loads,
        hub_bytes=together.hub_bytes,
    )
