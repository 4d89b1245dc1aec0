"""One batch through the model: the encoder once, then transformers' own `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import MoEModelOutputWithPastAndCrossAttentions as EncoderOutput

from switchrun.experts.module import RoutingContext
from switchrun.model.control import RowControl
from switchrun.model.live_rows import CACHE_ARGUMENT, LiveRows
from switchrun.model.records import GenerationOptions, LayerRouting
from switchrun.model.routing import RouterRecorder
from switchrun.model.scoring import score_targets


@dataclass(frozen=True, slots=True)
class RawOutput:
    """What came out for one row of a batch; times are `time.perf_counter()`.

    `ids` are the start token, the generated ids, and the end of sequence if it was reached (`finished`); no padding.
    `dropped` are tokens over an expert's capacity.

    Of alternatives, this is the first, and `others` are all of them, in no order. `log_probabilities` are those of the
    ids after the start token, if they were asked for. `routing` is the decoder's, or if it is not one of several the
    encoder's and the decoder's.
    """

    ids: tuple[int, ...]
    finished: bool
    first_token_at: float
    last_token_at: float
    dropped: int = 0
    others: tuple[RawOutput, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    routing: tuple[LayerRouting, ...] = ()


class _Watch(StoppingCriteria):
    """Sees every step: notes its time, where rows end, and which go on, in `rows`; beams have none.

    Stops where `stop` does, if that is given, and as the `controls` of the rows say; transformers itself sees to `eos`.
    """

    def __init__(
        self,
        rows: LiveRows | None,
        eos: torch.Tensor,
        on_token: Callable[[int], None],
        stop: StoppingCriteria | None,
        controls: Sequence[RowControl | None],
    ) -> None:
        self.times: list[float] = []
        #: The length with which a row was stopped, or cut short.
        self.ends: dict[int, int] = {}
        self.cuts: dict[int, int] = {}
        self._controls = controls
        self._rows = rows
        self._eos = eos
        self._on_token = on_token
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **__: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        stopped = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        if self._stop is not None:
            stopped = stopped | self._stop(input_ids, scores)
        if self._rows is not None:
            for row in stopped.nonzero().flatten().tolist():
                self.ends.setdefault(row, input_ids.shape[1])
            stopped = self._controlled(input_ids, stopped)
            # The start token is left out: it may be the padding or even the end token.
            ended = torch.isin(input_ids[:, 1:], self._eos.to(input_ids.device)).any(dim=1).tolist()
            self._rows.live = [
                not end and row not in self.ends and row not in self.cuts for row, end in enumerate(ended)
            ]
        elif any(control is not None and control.stopped for control in self._controls):
            stopped = torch.ones_like(stopped)
        self._on_token(len(self.times))
        return stopped

    def _controlled(self, input_ids: torch.Tensor, stopped: torch.Tensor) -> torch.Tensor:
        for row, control in enumerate(self._controls):
            if control is None or row in self.ends or row in self.cuts:
                continue
            if control.on_tokens is not None:
                control.on_tokens(input_ids[row].tolist())
            if control.stopped or len(self.times) == control.max_new_tokens:
                self.cuts[row] = input_ids.shape[1]
                stopped[row] = True
        return stopped


@torch.no_grad()
def generate_batch(
    model: Any,
    context: RoutingContext,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    options: GenerationOptions,
    on_token: Callable[[int], None],
    *,
    min_new_tokens: int = 0,
    seeds: Sequence[int] = (),
    stop: StoppingCriteria | None = None,
    closings: Sequence[int | None] = (),
    controls: Sequence[RowControl | None] = (),
) -> list[RawOutput]:
    """Generate for one batch.

    Beam search and sampling run row by row after a common encoder step. transformers goes on with the beams of a
    finished row until all rows are finished, and each of their tokens would load experts for nothing. What is drawn
    for a row must not depend on the others: each has its own of the `seeds`. Alternatives end with the row's own of
    the `closings`, too.

    `context` is shared by the model's sparse layers. `input_ids` is `[rows, tokens]`, padded on the right, and
    `attention_mask` the same, 0 for padding. `on_token` is called with the number of tokens generated so far. With
    `min_new_tokens` the end of sequence cannot come before as many; for measurements of equal length. `stop` ends
    sequences too, and each row's own of the `controls` may.
    """
    rows, width = input_ids.shape
    groups, widths = [slice(0, rows)], [width]
    limits = [None if each is None else each.max_new_tokens for each in controls] or [None] * rows
    one_by_one = options.one_by_one or _looks_at_input(model.generation_config)
    if one_by_one or (any(limits) and _looks_at_limit(model.generation_config)):
        groups, widths = [slice(row, row + 1) for row in range(rows)], attention_mask.sum(dim=1).tolist()
    settings = _settings(options) | ({"min_new_tokens": min_new_tokens} if min_new_tokens else {})
    eos = _eos_ids(model.generation_config)
    outputs: list[RawOutput] = []
    context.live = attention_mask.bool().tolist()
    dropped = context.dropped = [0] * rows
    recording = RouterRecorder(model) if options.explain else nullcontext()
    try:
        with (
            recording as recorder,
            torch.random.fork_rng(_gpus_of(model) if options.sample else (), enabled=options.sample),
        ):
            encoded = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            context.dropped = None
            routing = recorder.take(attention_mask.sum(dim=1).tolist()) if recorder else [()] * rows
            for group, width in zip(groups, widths, strict=True):
                if any(control is not None and control.stopped for control in controls[group]) and len(groups) > 1:
                    now = time.perf_counter()
                    outputs.append(RawOutput((model.config.decoder_start_token_id,), False, now, now))
                    continue
                if len(groups) > 1 or rows == 1:
                    settings["max_new_tokens"] = limits[group.start] or options.max_new_tokens
                if options.sample:
                    torch.manual_seed(seeds[group.start])
                context.live = None
                closing = closings[group.start] if options.alternatives else None
                ending = stop if closing is None else _Closing(closing, stop)
                place = group, slice(0, width)
                draws = len(input_ids[group]) * max(1, options.alternatives)
                live = LiveRows(draws, context, leave=recorder is None) if options.beams == 1 else None
                watch = _Watch(live, eos, on_token=on_token, stop=ending, controls=controls[group])
                with live.attached(model) if live is not None else nullcontext():
                    sequences = model.generate(
                        input_ids[place],
                        attention_mask=attention_mask[place],
                        encoder_outputs=EncoderOutput(last_hidden_state=encoded[place]),
                        stopping_criteria=StoppingCriteriaList([watch]),
                        # It grows as needed; transformers' own has as many layers as the encoder.
                        **{CACHE_ARGUMENT: EncoderDecoderCache(DynamicCache(), DynamicCache())},
                        **settings,
                    )
                if options.beams > 1 and ending is not None:
                    watch.ends = {row: end for row, ids in enumerate(sequences) if (end := _stopped_at(ids, ending))}
                found = [
                    _row(ids, eos.tolist(), watch.times, watch.ends.get(row), watch.cuts.get(row))
                    for row, ids in enumerate(sequences.tolist())
                ]
                found = [_ended(output, closing, eos) for output in found]
                if options.scored:
                    if recorder:
                        recorder.take(())  # what the search tried
                    answers = [output.ids for output in found]
                    scores = score_targets(
                        model,
                        context,
                        encoded[place].expand(len(found), -1, -1),
                        attention_mask[place].expand(len(found), -1),
                        answers,
                    )
                    found = [replace(each, log_probabilities=score) for each, score in zip(found, scores, strict=True)]
                if recorder:
                    steps = recorder.take([len(output.ids) - 1 for output in found])
                    found = [replace(each, routing=choices) for each, choices in zip(found, steps, strict=True)]
                outputs += [replace(found[0], others=tuple(found))] if options.alternatives else found
    finally:
        context.live = context.dropped = None
    return [
        replace(output, dropped=count, routing=choices + output.routing)
        for output, count, choices in zip(outputs, dropped, routing, strict=True)
    ]


class _Closing(StoppingCriteria):
    """Stops at a token, and where other criteria do."""

    def __init__(self, token: int, others: StoppingCriteria | None) -> None:
        self._token = token
        self._others = others

    def __call__(self, input_ids: torch.Tensor, scores: Any, **__: Any) -> torch.Tensor:
        stopped = input_ids[:, -1] == self._token
        return stopped if self._others is None else stopped | self._others(input_ids, scores)


def _stopped_at(ids: torch.Tensor, stop: StoppingCriteria) -> int | None:
    """Return the length with which a sequence was stopped; what fills it up comes after that."""
    return next((end for end in range(2, len(ids) + 1) if stop(ids[None, :end], None).all()), None)


def _gpus_of(model: Any) -> list[int]:
    """Return the numbers of the GPUs that a model has weights on; torch would ask, and wake, every GPU there is."""
    return sorted({weight.device.index for weight in model.parameters() if weight.device.type not in ("cpu", "meta")})


def _settings(options: GenerationOptions) -> dict[str, Any]:
    """Return the options as transformers' `generate` takes them."""
    returned = options.alternatives if options.sample else options.beams
    sampling = {"temperature": float(options.temperature), "top_p": options.top_p, "top_k": options.top_k}
    return {
        "max_new_tokens": options.max_new_tokens,
        "num_beams": options.beams,
        "do_sample": options.sample,
        # Whatever the checkpoint's own generation settings say: rows of ids are wanted, as many for each input, and
        # alternatives are the likeliest as a whole.
        "num_return_sequences": returned if options.alternatives else 1,
        **({"length_penalty": 0.0} if options.alternatives and not options.sample else {}),
        "return_dict_in_generate": False,
        "use_cache": True,
        **(sampling if options.sample else {}),
    }


def _row(ids: list[int], eos: list[int], times: list[float], stopped: int | None, cut: int | None) -> RawOutput:
    ends = [at + 1 for at in range(1, len(ids)) if ids[at] in eos][:1] + ([] if stopped is None else [stopped])
    end, cut = min(ends, default=len(ids)), len(ids) if cut is None else cut
    kept = ids[: min(end, cut)]
    last = max(0, min(len(kept) - 1, len(times)) - 1)
    return RawOutput(tuple(kept), bool(ends) and end <= cut, times[0], times[last])


def _ended(output: RawOutput, closing: int | None, eos: torch.Tensor) -> RawOutput:
    """Return an output that stopped at the closing sentinel with the end of sequence, which belongs to every answer."""
    ends = output.ids[-1] == closing and len(eos) > 0
    return replace(output, ids=(*output.ids, int(eos[0]))) if ends else output


def _looks_at_input(generation_config: Any) -> bool:
    """Whether the logits depend on which tokens are in the input: they must not see padding there."""
    penalty = generation_config.encoder_repetition_penalty
    return bool(generation_config.encoder_no_repeat_ngram_size) or penalty not in (None, 1.0)


def _looks_at_limit(generation_config: Any) -> bool:
    """Whether the logits depend on how long the answer may become: rows of several limits cannot share a batch."""
    return generation_config.forced_eos_token_id is not None


def _eos_ids(generation_config: Any) -> torch.Tensor:
    eos = generation_config.eos_token_id
    return torch.tensor([] if eos is None else eos, dtype=torch.long).flatten()
