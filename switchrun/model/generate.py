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
from switchrun.model.live_rows import CACHE_ARGUMENT, LiveRows
from switchrun.model.records import GenerationOptions


@dataclass(frozen=True, slots=True)
class RawOutput:
    """What came out for one row of a batch; times are `time.perf_counter()`.

    `ids` are the start token, the generated ids, and the end of sequence if it was reached (`finished`); no padding.
    `dropped` are tokens over an expert's capacity.
    """

    ids: tuple[int, ...]
    finished: bool
    first_token_at: float
    last_token_at: float
    dropped: int


class _Watch(StoppingCriteria):
    """Sees every step: notes its time, where rows end, and which go on, in `rows`; beams have none.

    Stops where `stop` does, if that is given; transformers itself sees to `eos`.
    """

    def __init__(
        self,
        rows: LiveRows | None,
        eos: torch.Tensor,
        on_token: Callable[[int], None],
        stop: StoppingCriteria | None,
    ) -> None:
        self.times: list[float] = []
        #: The length with which a row was stopped.
        self.ends: dict[int, int] = {}
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
            # The start token is left out: it may be the padding or even the end token.
            ended = torch.isin(input_ids[:, 1:], self._eos.to(input_ids.device)).any(dim=1).tolist()
            self._rows.live = [not end and row not in self.ends for row, end in enumerate(ended)]
        self._on_token(len(self.times))
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
) -> list[RawOutput]:
    """Generate for one batch.

    Beam search and sampling run row by row after a common encoder step. transformers goes on with the beams of a
    finished row until all rows are finished, and each of their tokens would load experts for nothing. What is drawn
    for a row must not depend on the others: each has its own of the `seeds`.

    `context` is shared by the model's sparse layers. `input_ids` is `[rows, tokens]`, padded on the right, and
    `attention_mask` the same, 0 for padding. `on_token` is called with the number of tokens generated so far. With
    `min_new_tokens` the end of sequence cannot come before as many; for measurements of equal length. `stop` ends
    sequences too.
    """
    rows, width = input_ids.shape
    groups, widths = [slice(0, rows)], [width]
    if options.num_beams > 1 or options.sample or _looks_at_input(model.generation_config):
        groups, widths = [slice(row, row + 1) for row in range(rows)], attention_mask.sum(dim=1).tolist()
    settings = _settings(options) | ({"min_new_tokens": min_new_tokens} if min_new_tokens else {})
    eos = _eos_ids(model.generation_config)
    outputs: list[RawOutput] = []
    context.live = attention_mask.bool().tolist()
    dropped = context.dropped = [0] * rows
    try:
        encoded = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        context.dropped = None
        with torch.random.fork_rng(_gpus_of(model) if options.sample else (), enabled=options.sample):
            for group, width in zip(groups, widths, strict=True):
                if options.sample:
                    torch.manual_seed(seeds[group.start])
                context.live = None
                live = LiveRows(len(input_ids[group]), context) if options.num_beams == 1 else None
                watch = _Watch(live, eos, on_token=on_token, stop=stop)
                place = group, slice(0, width)
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
                if options.num_beams > 1 and stop is not None and stop(sequences, None).all():
                    watch.ends[0] = sequences.shape[1]
                for row, ids in enumerate(sequences.tolist()):
                    outputs.append(_row(ids, eos.tolist(), watch.times, watch.ends.get(row)))
    finally:
        context.live = context.dropped = None
    return [replace(output, dropped=count) for output, count in zip(outputs, dropped, strict=True)]


def _gpus_of(model: Any) -> list[int]:
    """Return the numbers of the GPUs that a model has weights on; torch would ask, and wake, every GPU there is."""
    return sorted({weight.device.index for weight in model.parameters() if weight.device.type not in ("cpu", "meta")})


def _settings(options: GenerationOptions) -> dict[str, Any]:
    """Return the options as transformers' `generate` takes them."""
    sampling = {"temperature": float(options.temperature), "top_p": options.top_p, "top_k": options.top_k}
    return {
        "max_new_tokens": options.max_new_tokens,
        "num_beams": options.num_beams,
        "do_sample": options.sample,
        # Whatever the checkpoint's own generation settings say: rows of ids are wanted, one for each input.
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "use_cache": True,
        **(sampling if options.sample else {}),
    }


def _row(ids: list[int], eos: list[int], times: list[float], stopped: int | None) -> RawOutput:
    ends = [at + 1 for at in range(1, len(ids)) if ids[at] in eos][:1] + ([] if stopped is None else [stopped])
    kept = ids[: min(ends, default=len(ids))]
    last = max(0, min(len(kept) - 1, len(times)) - 1)
    return RawOutput(tuple(kept), bool(ends), times[0], times[last], dropped=0)


def _looks_at_input(generation_config: Any) -> bool:
    """Whether the logits depend on which tokens are in the input: they must not see padding there."""
    penalty = generation_config.encoder_repetition_penalty
    return bool(generation_config.encoder_no_repeat_ngram_size) or penalty not in (None, 1.0)


def _eos_ids(generation_config: Any) -> torch.Tensor:
    eos = generation_config.eos_token_id
    return torch.tensor([] if eos is None else eos, dtype=torch.long).flatten()
