"""The open model without its words: weights placed, cache and readers running; token ids in, token ids out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import torch

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.errors import BudgetError
from switchrun.experts import accelerator
from switchrun.experts.cache import ExpertCache
from switchrun.experts.module import RoutingContext
from switchrun.experts.probe import reading_way
from switchrun.experts.reader import WAYS, FileReader
from switchrun.experts.tiers import ExpertTiers
from switchrun.machine import disks, ram
from switchrun.model.build import build_cache, build_model
from switchrun.model.dense import DenseWeights, check_gpus, drop_weights, input_device, place_dense_weights
from switchrun.model.generate import RawOutput, generate_batch
from switchrun.model.preload import DensePreload
from switchrun.model.records import GenerationOptions, MemoryPeak
from switchrun.planning import memory
from switchrun.planning.opening import PlannedModel
from switchrun.planning.plan import DISK, Plan, TierUse, gpu_tier
from switchrun.planning.planner import fit_to_runtime
from switchrun.store import BackgroundWriter, ExpertStore, open_checkpoint_store
from switchrun.units import MIB, format_bytes, format_count

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: So many bytes read are a fair measurement of the disk.
_BANDWIDTH_SAMPLE_BYTES = 256 * 1024**2


class Engine:
    """A Switch model at work; owns its cache, threads and files. A context manager and not thread-safe.

    Args:
        planned: The checkpoint and its plan.
        on_dense_bytes: Called after each dense weight that was read, with the bytes done and in all.
        warn: Called with what the user should know of the offload folder, a sentence each, from any thread. Without
            it, that is logged.
        preload: Dense weights that are being read already; None starts reading now. The engine closes it.

    Attributes:
        checkpoint: The checkpoint.
        plan: What went where.
        model: transformers' model, its experts replaced.
        cache: Where its experts come from: the level in CPU memory.
        levels: The same and those on GPUs.
        device: Where the model wants token ids.
        context: What its sparse layers share.

    Raises:
        SwitchrunError: One of its kinds; see `switchrun.errors`.
    """

    checkpoint: SwitchCheckpoint
    plan: Plan
    model: Any
    cache: ExpertCache
    levels: ExpertTiers
    device: torch.device
    context: RoutingContext

    def __init__(
        self,
        planned: PlannedModel,
        on_dense_bytes: Callable[[int, int], None] = lambda _done, _total: None,
        warn: Callable[[str], None] | None = None,
        preload: DensePreload | None = None,
    ) -> None:
        self.checkpoint = checkpoint = planned.checkpoint
        self._warn = warn or _log.warning
        self.context = RoutingContext()
        sizes = {
            name: memory.dense_bytes(name, tensor, planned.plan.precision) for name, tensor in checkpoint.dense.items()
        }
        total = sum(use.dense_bytes for use in planned.plan.tiers if use.tier != DISK)
        done = 0

        def note(name: str) -> None:
            """Count a weight, the first time that it is named: when it was read ahead, or else when it is placed."""
            nonlocal done
            if name in sizes:
                done += sizes.pop(name)
                on_dense_bytes(done, total)

        with ExitStack() as stack, told_as_budget(planned.plan):
            preload = preload or DensePreload(checkpoint, planned.plan)
            stack.callback(preload.close)
            check_gpus(planned.plan.gpus)
            self.device = input_device(planned.plan.device_map)
            if planned.plan.gpus:
                stack.callback(accelerator.release_unused)  # once all below is let go of
            for name in (*preload.kept, *preload.staged):
                preload.find(name)
                note(name)
            preload.close()  # ends the reads; what was read stays
            rss_bytes = ram.rss_bytes() - preload.nbytes
            self.plan = plan = fit_to_runtime(planned.plan, checkpoint, rss_bytes, planned.own_bytes)
            way = reading_way(checkpoint.experts) if memory.reads_directly(checkpoint) else WAYS[0]
            reader = FileReader(memory.reads_dense_directly(checkpoint, plan.device_map), way)
            stack.callback(reader.close)
            weights = DenseWeights(checkpoint.dense, plan.precision, reader, preload)
            weights.convert_staged()
            store = _open_store(planned, warn)
            # Closed after the cache, whose threads offer it experts; then it writes what still waits.
            writer = None
            if store is not None:
                buffers = memory.writer_buffers(checkpoint, plan.precision)
                writer = stack.enter_context(BackgroundWriter(store, buffers))
            self.cache = stack.enter_context(build_cache(checkpoint, plan, way, store, writer))
            self.levels = stack.enter_context(ExpertTiers(self.cache))
            self.model = build_model(checkpoint, plan.precision, self.levels, self.context)
            stack.callback(drop_weights, self.model)
            place_dense_weights(self.model, weights, plan.device_map, note)
            for number in plan.gpus:
                self._add_level(number)
            self._stack = stack.pop_all()

    def _add_level(self, number: int) -> None:
        use, place = self.plan.tier(gpu_tier(number)), accelerator.device(number)
        if not use.expert_slots:
            return  # no sparse layer computes there
        size = memory.gpu_expert_bytes(self.checkpoint, self.plan.precision)
        try:
            self.levels.add(place, use.expert_slots, size)
            return
        except RuntimeError as error:
            if use.expert_slots == 1 or not accelerator.is_out_of_memory(error):
                raise
        # Only here has the error let go of the slots that there was room for.
        accelerator.release_unused()
        self.levels.add(place, use.expert_slots // 2, size)
        self._note_fewer_slots()

    def generate(
        self,
        rows: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        pad_id: int,
        seed: int,
        on_layer: Callable[[int, int], None],
        on_token: Callable[[int], None],
    ) -> list[RawOutput]:
        """Generate for one batch; if the memory of a GPU runs out, once more with half of the GPUs' slots.

        Args:
            rows: Token ids of each input.
            options: How to generate.
            pad_id: What shorter rows are filled up with.
            seed: Seed of the draws, if there are any.
            on_layer: Called after each sparse layer of the encoder, with their number so far and in all.
            on_token: Called with the number of tokens generated so far.

        Raises:
            CorruptCheckpointError: An expert cannot be read.
            BudgetError: The memory of a GPU runs out again.
        """
        width = max(map(len, rows))
        input_ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
        mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
        layers = len(self.checkpoint.sparse_blocks["encoder"])
        passed = 0

        def count_layer() -> None:
            nonlocal passed
            passed += 1
            if passed <= layers:
                on_layer(passed, layers)

        self.context.on_layer = count_layer
        return self.run(
            lambda: generate_batch(
                self.model,
                self.context,
                input_ids.to(self.device),
                mask.long().to(self.device),
                options,
                on_token=on_token,
                seed=seed,
            )
        )

    def memory_peak(self) -> MemoryPeak:
        """Return the peaks of this process so far, those of the GPUs that it uses added up: no other is asked."""
        gpus = self.plan.gpus
        return MemoryPeak(ram.peak_rss_bytes(), sum(map(accelerator.peak_bytes, gpus)) if gpus else None)

    def run(self, work: Callable[[], T]) -> T:
        """Let the model do some work; if the memory of a GPU runs out, do it anew with half of the GPUs' slots, if any.

        Args:
            work: Can be done twice.

        Raises:
            BudgetError: The memory runs out again.
        """
        if not self.plan.gpus:
            return work()
        try:
            return work()
        except RuntimeError as error:
            if not accelerator.is_out_of_memory(error):
                raise
        # Only here has the error let go of what had been computed.
        with told_as_budget(self.plan):
            if self.levels.shrink():
                self._note_fewer_slots()
            accelerator.release_unused()
            return work()

    def _note_fewer_slots(self) -> None:
        """Warn of what GPUs have given up, and put it into the plan."""
        for number, level in self.levels.gpus.items():
            use = self.plan.tier(gpu_tier(number))
            given_up = use.expert_slots - level.num_slots
            if not given_up:
                continue
            self._warn(
                f"{use.tier} ran out of memory: it holds {format_count(level.num_slots, 'expert')} from now on, "
                f"not {use.expert_slots} (a smaller --gpu-memory avoids this)"
            )
            self.plan = self.plan.with_use(use.with_slots(level.num_slots))

    def close(self) -> None:
        """Close files, end threads and give the memory back; closing twice does nothing."""
        try:
            with suppress(OSError):  # the checkpoint may be gone by now
                self._remember_bandwidth()
        finally:
            self._stack.close()

    def _remember_bandwidth(self) -> None:
        """Keep what the reads tell of the disk, for the estimates of `switchrun plan`."""
        if self.plan.precision.packed is not None:
            return  # these may have been read from another disk
        counters = self.cache.counters()
        file = next(iter(self.checkpoint.experts.values())).wi.file
        enough = counters.load_bytes >= _BANDWIDTH_SAMPLE_BYTES and counters.load_seconds > 0
        if enough and self.cache.reads_past_page_cache and not disks.is_sparse(file):
            disks.remember_bandwidth(file, counters.load_bytes / counters.load_seconds)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_store(planned: PlannedModel, warn: Callable[[str], None] | None) -> ExpertStore | None:
    """Open the store for a plan with packed experts; None if it has none, or has them in the checkpoint itself.

    Raises:
        CorruptCheckpointError: The folder belongs to something else.
    """
    checkpoint, packed = planned.checkpoint, planned.plan.precision.packed
    if packed is None or checkpoint.has_int8_experts:
        return None
    return open_checkpoint_store(
        planned.options.folder, checkpoint, packed.value, limit_bytes=planned.options.limit_bytes, warn=warn
    )


#: Of what this process could have on a GPU, and of a budget that was too large, this share is tried next.
_OF_AVAILABLE = 0.9
_OF_BUDGET = 0.75


@contextlib.contextmanager
def told_as_budget(plan: Plan) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into one that says what to do.

    Raises:
        BudgetError: The memory of a GPU ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if not plan.gpus or not accelerator.is_out_of_memory(error):
            raise
        raise _out_of_memory({number: plan.tier(gpu_tier(number)) for number in plan.gpus}) from error


def _out_of_memory(uses: Mapping[int, TierUse]) -> BudgetError:
    """Name the GPU that has the least left, and smaller budgets than the plan's."""
    found = {}
    with contextlib.suppress(RuntimeError):  # a driver without memory may not even tell how much it has
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
