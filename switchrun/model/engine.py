"""The open model without its words: weights placed, cache and readers running; token ids in, token ids out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch

from switchrun import hardware
from switchrun._plan import Prepared
from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.experts import accelerator
from switchrun.experts.cache import ExpertCache
from switchrun.experts.levels import ExpertLevels
from switchrun.experts.module import RoutingContext
from switchrun.experts.probe import reading_way
from switchrun.experts.reader import WAYS, FileReader
from switchrun.model.ahead import CrossAttentionAhead
from switchrun.model.build import build_cache, build_model
from switchrun.model.dense import DenseWeights, check_gpus, drop_weights, input_device, place_dense_weights
from switchrun.model.gpu_memory import told_as_budget
from switchrun.model.preload import DensePreload
from switchrun.planning import Plan, memory
from switchrun.planning.fit import fit_to_runtime
from switchrun.planning.types import tier_name
from switchrun.store import BackgroundWriter, ExpertStore, open_checkpoint_store
from switchrun.units import format_count

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: So many bytes read are a fair measurement of the disk.
_BANDWIDTH_SAMPLE_BYTES = 256 * 1024**2


class Engine:
    """A Switch model at work; owns its cache, threads and files. A context manager and not thread-safe.

    Args:
        prepared: The checkpoint and its plan.
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
    levels: ExpertLevels
    device: torch.device
    context: RoutingContext

    def __init__(
        self,
        prepared: Prepared,
        on_dense_bytes: Callable[[int, int], None] = lambda _done, _total: None,
        warn: Callable[[str], None] | None = None,
        preload: DensePreload | None = None,
    ) -> None:
        self.checkpoint = checkpoint = prepared.checkpoint
        self._warn = warn or _log.warning
        self.context = RoutingContext()
        sizes = {
            name: memory.dense_bytes(name, tensor, prepared.plan.precision) for name, tensor in checkpoint.dense.items()
        }
        total = sum(use.dense_bytes for use in prepared.plan.tiers if use.tier != "disk")
        done = 0

        def note(name: str) -> None:
            """Count a weight, the first time that it is named: when it was read ahead, or else when it is placed."""
            nonlocal done
            if name in sizes:
                done += sizes.pop(name)
                on_dense_bytes(done, total)

        with ExitStack() as stack, told_as_budget(prepared.plan):
            preload = preload or DensePreload(prepared)
            stack.callback(preload.close)
            check_gpus(prepared.plan.gpus)
            self.device = input_device(prepared.plan.device_map)
            if prepared.plan.gpus:
                stack.callback(accelerator.release_unused)  # once all below is let go of
            for name in preload.names:
                preload.find(name)
                note(name)
            preload.end_reads()
            self.plan = plan = fit_to_runtime(prepared.plan, checkpoint, hardware.rss_bytes() - preload.nbytes)
            way = reading_way(checkpoint.experts) if memory.reads_directly(checkpoint) else WAYS[0]
            reader = FileReader(memory.reads_dense_directly(checkpoint, plan.device_map), way)
            stack.callback(reader.close)
            weights = DenseWeights(checkpoint.dense, plan.precision, reader, preload)
            weights.convert_staged()
            store = _open_store(prepared, warn)
            # Closed after the cache, whose threads offer it experts; then it writes what still waits.
            writer = None
            if store is not None:
                buffers = memory.writer_buffers(checkpoint, plan.precision)
                writer = stack.enter_context(BackgroundWriter(store, buffers))
            slots = preload.hand_over_slots(plan.tier("cpu").expert_slots)  # until here the preload closes them
            self.cache = stack.enter_context(build_cache(checkpoint, plan, way, slots, store, writer))
            self.levels = stack.enter_context(ExpertLevels(self.cache))
            self.model = build_model(checkpoint, plan.precision, self.levels, self.context)
            stack.callback(drop_weights, self.model)
            place_dense_weights(self.model, weights, plan.device_map, note)
            if not plan.gpus and all(weight.device.type == "cpu" for weight in self.model.decoder.parameters()):
                self.cache.meanwhile = CrossAttentionAhead(self.model).step
            for number in plan.gpus:
                self._add_level(number)
            self._stack = stack.pop_all()

    def _add_level(self, number: int) -> None:
        use, place = self.plan.tier(tier_name(number)), accelerator.device(number)
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
            use = self.plan.tier(tier_name(number))
            given_up = use.expert_slots - level.num_slots
            if not given_up:
                continue
            self._warn(
                f"{use.tier} ran out of memory: it holds {format_count(level.num_slots, 'expert')} from now on, "
                f"not {use.expert_slots} (a smaller --gpu-memory avoids this)"
            )
            smaller = replace(
                use,
                expert_slots=level.num_slots,
                expert_bytes=use.expert_bytes - given_up * use.slot_bytes,
                total_bytes=use.total_bytes - given_up * use.slot_bytes,
            )
            tiers = tuple(smaller if tier is use else tier for tier in self.plan.tiers)
            self.plan = replace(self.plan, tiers=tiers)

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
        if enough and self.cache.reads_past_page_cache and not hardware.is_sparse(file):
            hardware.remember_bandwidth(file, counters.load_bytes / counters.load_seconds)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_store(prepared: Prepared, warn: Callable[[str], None] | None) -> ExpertStore | None:
    """Open the store for a plan with packed experts; None if it has none, or has them in the checkpoint itself.

    Raises:
        CorruptCheckpointError: The folder belongs to something else.
    """
    checkpoint, packed = prepared.checkpoint, prepared.plan.precision.packed
    if packed is None or checkpoint.has_int8_experts:
        return None
    return open_checkpoint_store(
        prepared.offload.folder, checkpoint, packed.value, limit_bytes=prepared.offload.limit_bytes, warn=warn
    )
