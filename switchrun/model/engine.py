"""The open model without its words: weights placed, cache and readers running; token ids in, token ids out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

import torch
from transformers import StoppingCriteria

from switchrun.errors import BudgetError
from switchrun.experts import accelerator
from switchrun.experts.module import RoutingContext
from switchrun.experts.reader import FileReader
from switchrun.experts.tiers import ExpertTiers
from switchrun.experts.ways import reading_way
from switchrun.kernels import libraries
from switchrun.machine import disks, network, ram
from switchrun.model.build import build_model, open_cache
from switchrun.model.control import RowControl
from switchrun.model.dense import DenseWeights, drop_weights, input_device, place_dense_weights
from switchrun.model.generate import RawOutput, generate_batch
from switchrun.model.preload import DensePreload
from switchrun.model.records import GenerationOptions, MemoryPeak
from switchrun.model.scoring import RawScore, score_batch
from switchrun.planning import memory
from switchrun.planning.opening import PlannedModel
from switchrun.planning.plan import DISK, Plan, TierUse, gpu_tier
from switchrun.planning.planner import fit_to_runtime
from switchrun.units import MIB, format_bytes, format_count

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

#: So many bytes read are a fair measurement of the disk.
_BANDWIDTH_SAMPLE_BYTES = 256 * 1024**2
#: Of what this process could have on a GPU, and of a budget that was too large, this share is tried next.
_OF_AVAILABLE = 0.9
_OF_BUDGET = 0.75
#: Read when the first product in bfloat16 is computed: for how many shapes oneDNN, and torch's way to it, keep code.
_KEPT_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


class Engine:
    """A Switch model at work; owns its cache, threads and files. A context manager and not thread-safe.

    `on_dense_bytes` is called after each dense weight that was read, with the bytes done and in all; `warn` with what
    the user should know, a sentence each, from any thread. Without it, that is logged. `preload` reads dense weights
    already; the engine closes it.

    Attributes:
        plan: What went where.
        model: transformers' model, its experts replaced.
        cache: Its experts in CPU memory.
        tiers: Those, and the ones on GPUs.
        device: Where the model wants token ids.
        context: What its sparse layers share.
    """

    def __init__(
        self,
        planned: PlannedModel,
        on_dense_bytes: Callable[[int, int], None] = lambda _done, _total: None,
        warn: Callable[[str], None] | None = None,
        preload: DensePreload | None = None,
    ) -> None:
        self.checkpoint = checkpoint = planned.checkpoint
        self._warn = warn or _log.warning
        if planned.plan.precision.few_bits and not libraries.paths():
            dtype = planned.plan.dtype
            self._warn(f"switchrun's kernels are not built here, so {dtype} is slow; switchrun doctor says what to do")
        self.context = RoutingContext()
        note_read = _dense_progress(planned, on_dense_bytes)
        for name in _KEPT_KERNELS:
            os.environ.setdefault(name, str(memory.KEPT_KERNELS))
        with ExitStack() as stack, gpu_memory_as_budget(planned.plan):
            if planned.hub is not None:
                stack.callback(planned.hub.close)
            # 1. Begin to read dense weights, unless the caller has, and wake the GPUs meanwhile.
            preload = preload or DensePreload(checkpoint, planned.plan)
            stack.callback(preload.close)
            accelerator.check_gpus(planned.plan.gpus)
            self.device = input_device(planned.plan.device_map)
            if planned.plan.gpus:
                stack.callback(accelerator.release_unused)  # once all below has been given up

            # 2. Wait for them.
            for name, landing in preload.landings.items():
                landing.wait()
                note_read(name)
            preload.close()  # ends the reads; what was read stays

            # 3. The plan is final: libraries take what they take, and experts get the rest.
            rss_bytes = ram.rss_bytes() - preload.nbytes
            self.plan = plan = fit_to_runtime(planned.plan, checkpoint, rss_bytes, planned.own_bytes)

            # 4. The cache, in slots that are filled later.
            direct = memory.reads_directly(checkpoint)
            way = reading_way(checkpoint.experts, planned.options.folder) if direct else None
            self.cache = open_cache(planned, plan, way, warn, stack)
            self.tiers = stack.enter_context(ExpertTiers(self.cache))

            # 5. The model, its dense weights placed; then what GPUs have left is for experts.
            reader = FileReader(memory.reads_dense_directly(checkpoint, plan.device_map), way)
            stack.callback(reader.close)
            self.model = build_model(checkpoint, plan.precision, self.tiers, self.context)
            stack.callback(drop_weights, self.model)
            weights = DenseWeights(checkpoint.dense, plan.precision, reader, preload)
            place_dense_weights(self.model, weights, plan.device_map, note_read)
            for number in plan.gpus:
                self._add_gpu_cache(number)
            self._hub = planned.hub
            self._before = None if self._hub is None else self._hub.traffic
            self._stack = stack.pop_all()

    def _add_gpu_cache(self, number: int) -> None:
        use, place = self.plan.tier(gpu_tier(number)), accelerator.device(number)
        if not use.expert_slots:
            return  # no sparse layer computes there
        size = memory.gpu_expert_bytes(self.checkpoint, self.plan.precision)
        try:
            self.tiers.add(place, use.expert_slots, size)
            return
        except RuntimeError as error:
            if use.expert_slots == 1 or not accelerator.is_out_of_memory(error):
                raise
        # Only here has the error given up the slots that there was room for.
        accelerator.release_unused()
        self.tiers.add(place, use.expert_slots // 2, size)
        self._note_fewer_slots()

    def generate(
        self,
        rows: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        seeds: Sequence[int],
        stop: StoppingCriteria | None = None,
        closings: Sequence[int | None] = (),
        controls: Sequence[RowControl | None] = (),
        on_layer: Callable[[int, int], None],
        on_token: Callable[[int], None],
    ) -> list[RawOutput]:
        """Generate for one batch of token ids.

        `on_layer` is called at first and after each sparse layer of the encoder, with their number so far and in all;
        `on_token` with the number of tokens generated so far; `stop` ends sequences, beside the end tokens, and each
        row's own of the `closings` its alternatives. Each row draws with its own of the `seeds`; by its own of the
        `controls` others may stop it.
        """

        def generate(input_ids: torch.Tensor, mask: torch.Tensor) -> list[RawOutput]:
            return generate_batch(
                self.model,
                self.context,
                input_ids,
                mask,
                options,
                on_token,
                seeds=seeds,
                stop=stop,
                closings=closings,
                controls=controls,
            )

        return self._run(rows, generate, len(self.checkpoint.sparse_blocks["encoder"]), on_layer, controls)

    def score(
        self,
        rows: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        *,
        controls: Sequence[RowControl | None] = (),
        on_layer: Callable[[int, int], None],
    ) -> list[RawScore]:
        """Score a target for each row of token ids; `on_layer` is called after each sparse layer of both stacks."""
        layers = sum(map(len, self.checkpoint.sparse_blocks.values()))

        def score(input_ids: torch.Tensor, mask: torch.Tensor) -> list[RawScore]:
            return score_batch(self.model, self.context, input_ids, mask, targets)

        return self._run(rows, score, layers, on_layer, controls)

    def _run(
        self,
        rows: Sequence[Sequence[int]],
        work: Callable[[torch.Tensor, torch.Tensor], _Result],
        layers: int,
        on_layer: Callable[[int, int], None],
        controls: Sequence[RowControl | None] = (),
    ) -> _Result:
        """Work on padded rows and their mask; if the memory of a GPU runs out, once more with half of the GPUs' slots.

        `on_layer` is called before the first of the sparse `layers`, and after each of them.
        """
        width = max(map(len, rows))
        # The padding may be any id: the mask hides it.
        input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
        passed = 0

        def count_layer() -> None:
            nonlocal passed
            passed += 1
            if passed <= layers:
                on_layer(passed, layers)
                for row, control in enumerate(controls):
                    if control is not None and control.stopped and self.context.live is not None:
                        self.context.live[row] = [False] * len(self.context.live[row])

        def once() -> _Result:
            return work(input_ids.to(self.device), mask.long().to(self.device))

        self.context.on_layer = count_layer
        on_layer(0, layers)
        ram.give_back_freed()  # other batches have left holes that this one may not fit
        try:
            return once()
        except RuntimeError as error:
            if not self.plan.gpus or not accelerator.is_out_of_memory(error):
                raise
        # Only here has the error given up what had been computed.
        with gpu_memory_as_budget(self.plan):
            if self.tiers.shrink():
                self._note_fewer_slots()
            accelerator.release_unused()
            return once()

    def memory_peak(self) -> MemoryPeak:
        """Return the peaks of this process so far, those of the GPUs that it uses added up: no other is asked."""
        gpus = self.plan.gpus
        return MemoryPeak(ram.peak_rss_bytes(), sum(map(accelerator.peak_bytes, gpus)) if gpus else None)

    def _note_fewer_slots(self) -> None:
        """Warn of what GPUs have given up, and put it into the plan."""
        for number, cache in self.tiers.gpus.items():
            use = self.plan.tier(gpu_tier(number))
            if cache.num_slots == use.expert_slots:
                continue
            self._warn(
                f"{use.tier} ran out of memory: it holds {format_count(cache.num_slots, 'expert')} from now on, "
                f"not {use.expert_slots} (a smaller --gpu-memory avoids this)"
            )
            self.plan = self.plan.with_use(use.with_slots(cache.num_slots))

    def close(self) -> None:
        """Close files, end threads and give the memory back; closing twice does nothing."""
        try:
            with suppress(OSError):  # the checkpoint may be gone by now
                self._remember_bandwidth()
        finally:
            self._stack.close()

    def _remember_bandwidth(self) -> None:
        """Keep how fast the disk was, and the Hub, for the estimates of `switchrun plan`."""
        if self._hub is not None and self._before is not None:
            now = self._hub.traffic
            network.remember_bandwidth(now.bytes - self._before.bytes, now.seconds - self._before.seconds)
        if self.plan.precision.packed is not None:
            return  # these may have been read from another disk
        counters = self.cache.counters()
        file = self.checkpoint.experts_file
        if file is None:
            return
        enough = counters.load_bytes >= _BANDWIDTH_SAMPLE_BYTES and counters.load_seconds > 0
        if enough and self.cache.reads_past_page_cache and not disks.is_sparse(file):
            disks.remember_bandwidth(file, counters.load_bytes / counters.load_seconds)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _dense_progress(planned: PlannedModel, on_dense_bytes: Callable[[int, int], None]) -> Callable[[str], None]:
    """Return what counts a weight when it is first named: when it was read ahead, or else when it is placed."""
    precision = planned.plan.precision
    sizes = {name: memory.dense_bytes(name, each, precision) for name, each in planned.checkpoint.dense.items()}
    total = sum(use.dense_bytes for use in planned.plan.tiers if use.tier != DISK)
    done = 0

    def note_read(name: str) -> None:
        nonlocal done
        if name in sizes:
            done += sizes.pop(name)
            on_dense_bytes(done, total)

    return note_read


@contextmanager
def gpu_memory_as_budget(plan: Plan) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into a `BudgetError` that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not plan.gpus or not accelerator.is_out_of_memory(error):
            raise
        raise _out_of_memory({number: plan.tier(gpu_tier(number)) for number in plan.gpus}) from error


def _out_of_memory(uses: Mapping[int, TierUse]) -> BudgetError:
    """Name the GPU that has the least left, and smaller budgets than the plan's."""
    found = {}
    with suppress(RuntimeError):  # a driver without memory may not even say how much it has
        found = {number: accelerator.memory_in_use(number) for number in uses}
    budgets = {number: use.budget_bytes or use.total_bytes for number, use in uses.items()}
    if not found:
        return BudgetError("a GPU is out of memory", _try({n: int(size * _OF_BUDGET) for n, size in budgets.items()}))
    number, (allocated, free) = min(found.items(), key=lambda item: item[1][1])
    smaller = int(min((allocated + free) * _OF_AVAILABLE, budgets[number] * _OF_BUDGET))
    return BudgetError(
        f"gpu:{number} is out of memory: of the {format_bytes(budgets[number])} that are allowed, switchrun has "
        f"{format_bytes(allocated)}, and {format_bytes(free)} are free",
        _try(budgets | {number: smaller}),
    )


def _try(budgets: Mapping[int, int]) -> str:
    sizes = [f"{number}={size // MIB}MiB" for number, size in sorted(budgets.items()) if size >= MIB]
    return f"try --gpu-memory {','.join(sizes) or '0'}, or close other programs that use the GPU"
