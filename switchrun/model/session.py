"""A session: an open model with its cache, threads and files, which fills texts until it is closed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from switchrun._plan import Prepared, prepare
from switchrun.errors import BudgetError, InputError
from switchrun.experts.levels import since
from switchrun.model.engine import Engine
from switchrun.model.generate import RawOutput, generate_batch
from switchrun.model.preload import DensePreload
from switchrun.model.records import (
    ExpertCounts,
    FillResult,
    GenerationOptions,
    ModelInfo,
    Progress,
    ProgressCallback,
    SessionStats,
    Stage,
    Timing,
    TokenCounts,
)
from switchrun.model.sentinels import check_sentinels, fill_in, parse_spans, sentinel
from switchrun.model.tokenizer import load_tokenizer
from switchrun.model.totals import Totals, expert_counts, memory_peak
from switchrun.planning.memory import max_input_tokens, max_output_tokens

#: No vocabulary has longer words by far; a text that is longer than this cannot fit.
_MAX_CHARACTERS_PER_TOKEN = 64


class Session:
    """An open Switch model. Make one with `Session.open`; it is a context manager and not thread-safe.

    Attributes:
        checkpoint: The checkpoint, with the repairs that it needed.
        plan: What went where.
        open_seconds: How long opening took.
        engine: The model itself, for measurements; not part of the public API.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        tokenizer: str | None = None,
        progress: ProgressCallback | None = None,
        started: float | None = None,
        warn: Callable[[str], None] | None = None,
        preload: DensePreload | None = None,
    ) -> None:
        """Build what was planned; `Session.open` is the usual way.

        Args:
            prepared: The checkpoint and its plan.
            tokenizer: A folder or a Hub id, for checkpoints without a tokenizer.
            progress: Called while the session works.
            started: `time.perf_counter()` when opening began; now if None.
            warn: Called with warnings, from any thread; they are logged if it is None.
            preload: Dense weights that are being read already; the session closes it.

        Raises:
            SwitchrunError: One of its kinds; see `switchrun.errors`.
        """
        started = time.perf_counter() if started is None else started
        self._progress = progress
        self._tokenizer = load_tokenizer(prepared.checkpoint, tokenizer)
        self.engine = engine = Engine(prepared, self._tell_open, warn, preload)
        self.checkpoint, self.plan, self._levels = engine.checkpoint, engine.plan, engine.levels
        self._totals = Totals()
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
        batch_size: int = 1,
        num_beams: int = 1,
        max_new_tokens: int = 64,
        progress: ProgressCallback | None = None,
    ) -> Session:
        """Open a model: read its headers, plan, place the dense weights. No expert is read.

        Args:
            model: A folder, a Hub id with an optional `@revision`, or None for the demo model.
            dtype: `auto` (as stored), `fp32`, `bf16`, `int8` or `nf4`.
            cpu_memory: What the process may take, such as `6GiB`; most of what is available if None.
            gpu_memory: What may be taken on GPUs, such as `6GiB` (of the first one) or `0=6GiB,1=20GiB`; 0 is no GPU,
                None what is free on all GPUs less a reserve.
            offload_folder: Where switchrun writes; see `switchrun.folders.offload_folder` for the default.
            offload_limit: What packed experts may take there, such as `200GB`; without it, as much as they need.
            device_map: A device map, or a file with one; None or `auto` lets the planner decide.
            tokenizer: A folder or a Hub id, for checkpoints without a tokenizer.
            batch_size: Most inputs to run together; memory is reserved for as many.
            num_beams: Most beams that fills will ask for.
            max_new_tokens: Most tokens that fills will generate for an input.
            progress: Called while the session works.

        Raises:
            SwitchrunError: One of its kinds; see `switchrun.errors`.
        """
        started = time.perf_counter()
        prepared = prepare(
            model,
            dtype=dtype,
            cpu_memory=cpu_memory,
            gpu_memory=gpu_memory,
            offload_folder=offload_folder,
            offload_limit=offload_limit,
            device_map=device_map,
            batch_size=batch_size,
            num_beams=num_beams,
            output_tokens=max_new_tokens,
        )
        return cls(prepared, tokenizer=tokenizer, progress=progress, started=started)

    def check(self, text: str) -> None:
        """Check that a text can be filled.

        Raises:
            InputError: It has no sentinels, or not in order, or it is too long, or the vocabulary has fewer.
        """
        count = check_sentinels(text)
        last = self._tokenizer.convert_tokens_to_ids(sentinel(count - 1))
        if last is None or last == self._tokenizer.unk_token_id:
            raise InputError(f"the vocabulary of this model has no {sentinel(count - 1)}", "use fewer sentinels")
        limit = max_input_tokens(self.checkpoint)
        if len(text) > limit * _MAX_CHARACTERS_PER_TOKEN:
            # Not tokenised: that takes memory which is not reserved.
            raise InputError(f"the text has {len(text)} characters, the model takes {limit} tokens", "split it")
        length = len(self._tokenizer(text).input_ids)
        if length > limit:
            raise InputError(f"the text has {length} tokens, the model takes {limit}", "shorten or split it")

    def fill(
        self, texts: Sequence[str], options: GenerationOptions | None = None, *, first_id: int = 0
    ) -> list[FillResult]:
        """Fill the sentinels of texts.

        Args:
            texts: Texts with sentinels `<extra_id_0>`, `<extra_id_1>`, …
            options: How to generate; greedy by default.
            first_id: The id of the first result; the others follow.

        Returns:
            One result for each text, in order.

        Raises:
            InputError: A text cannot be filled.
            BudgetError: More beams or tokens are asked for than memory was reserved for, or a GPU's memory runs out.
        """
        options = options or GenerationOptions()
        for text in texts:
            self.check(text)
        if options.num_beams > max(self.plan.num_beams, self.plan.batch_size):
            raise BudgetError(
                f"{options.num_beams} beams are asked for, memory is reserved for {self.plan.num_beams}",
                "open the session with num_beams",
            )
        most = max_output_tokens(self.checkpoint, self.plan.estimate.output_tokens)
        if options.max_new_tokens > most:
            raise BudgetError(
                f"{options.max_new_tokens} new tokens are asked for, memory is reserved for {most}",
                "open the session with max_new_tokens",
            )
        results: list[FillResult] = []
        for start in range(0, len(texts), self.plan.batch_size):
            batch = texts[start : start + self.plan.batch_size]
            results += self._fill_batch(batch, options, first_id + start)
        return results

    def stats(self) -> SessionStats:
        """Give what the session took so far."""
        return self._totals.stats(self.engine.plan, self.open_seconds, self._levels.counters())

    def close(self) -> None:
        """Close files, end threads and give the memory back; closing twice does nothing."""
        self.engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill_batch(self, texts: Sequence[str], options: GenerationOptions, first_id: int) -> list[FillResult]:
        start = time.perf_counter()
        before = self._levels.counters()
        encoded = self._tokenizer(list(texts), padding=True, return_tensors="pt")
        layers = len(self.checkpoint.sparse_blocks["encoder"])
        passed = 0

        def on_layer() -> None:
            nonlocal passed
            passed += 1
            if passed <= layers:
                self._tell("encode", passed, layers)

        self.engine.context.on_layer = on_layer
        outputs = self.engine.run(
            lambda: generate_batch(
                self.engine.model,
                self.engine.context,
                encoded.input_ids.to(self.engine.device),
                encoded.attention_mask.to(self.engine.device),
                options,
                on_token=lambda step: self._tell("decode", step, options.max_new_tokens),
                # Else the same text on two lines would get the same answer twice.
                seed=options.seed + first_id,
            )
        )
        end = time.perf_counter()
        experts = expert_counts(since(self._levels.counters(), before))
        results = []
        for row, (text, output) in enumerate(zip(texts, outputs, strict=True)):
            tokens = TokenCounts(int(encoded.attention_mask[row].sum()), len(output.ids) - 1, output.dropped)
            later = tokens.output - 1
            itl = (output.last_token_at - output.first_token_at) / later if later > 0 else None
            timing = Timing(self.open_seconds, output.first_token_at - start, itl, end - start)
            results.append(self._result(first_id + row, text, output, tokens, timing, experts))
            self._totals.add(tokens, timing)
        self._totals.fill_seconds += end - start
        return results

    def _result(
        self, number: int, text: str, output: RawOutput, tokens: TokenCounts, timing: Timing, experts: ExpertCounts
    ) -> FillResult:
        count = check_sentinels(text)
        sentinel_ids = [self._tokenizer.convert_tokens_to_ids(sentinel(n)) for n in range(count)]
        spans = parse_spans(
            output.ids, sentinel_ids, lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=True))
        )
        return FillResult(
            id=number,
            input=text,
            text=fill_in(text, spans),
            raw=self._tokenizer.decode(list(output.ids)),
            output_ids=output.ids,
            spans=spans,
            finish_reason="stop" if output.finished else "length",
            tokens=tokens,
            timing=timing,
            experts=experts,
            memory=memory_peak(self.plan.gpus),
            model=ModelInfo(self.checkpoint.id, self.checkpoint.revision, self.plan.dtype),
        )

    def _tell_open(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(Progress("open", done, total, load_bytes=0))

    def _tell(self, stage: Stage, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(Progress(stage, done, total, self._levels.cpu.counters().load_bytes))
