"""The first half of opening a model: all that needs no torch, up to the plan."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.generation import generation_file, own_options
from switchrun.checkpoint.locate import hub_id
from switchrun.checkpoint.steps import NO_STEPS, Steps
from switchrun.checkpoint.types import ExpertKey, HubWay, SwitchCheckpoint
from switchrun.dtypes import resolve_dtype
from switchrun.errors import BudgetError, check_count
from switchrun.machine import disks, network, ram
from switchrun.planning.budgets import parse_rate, resolve_budgets
from switchrun.planning.memory import PYTHON_BYTES, RUNTIME_BYTES, max_input_tokens
from switchrun.planning.options import OpenOptions
from switchrun.planning.plan import ASSUMED_BANDWIDTH, ASSUMED_NETWORK, Bandwidth, BatchSize, HubState, Plan, sure_rows
from switchrun.planning.planner import make_plan
from switchrun.store import ExpertStore, expert_path, open_checkpoint_store, open_kept_stores, stored_experts
from switchrun.store.dense_file import DenseFile
from switchrun.units import format_seconds

if TYPE_CHECKING:
    from switchrun.checkpoint.remote import HubRanges

T = TypeVar("T")

_log = logging.getLogger(__name__)

#: Tokens that fill a sentence, of those that it may take: what a session expects to generate from the Hub.
EXPECTED_NEW_TOKENS = 12
#: Experts that are read at most to measure a disk.
_SAMPLE = 200


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A checkpoint, what it is opened with, and the plan made for it.

    `own_bytes` is what the caller's process held before, besides Python and the libraries. `hub` reads the weights from
    the Hub, if they come from there: whoever opens the model closes it, and who only plans calls `close`.
    """

    options: OpenOptions
    checkpoint: SwitchCheckpoint
    plan: Plan
    own_bytes: int = 0
    hub: HubRanges | None = None

    def close(self) -> None:
        """End all reads from the Hub."""
        if self.hub is not None:
            self.hub.close()


def plan_model(
    options: OpenOptions,
    *,
    input_tokens: int = 24,
    disk_bandwidth: str | float | None = None,
    hub_output_tokens: int | None = None,
    headers_only: bool = False,
    own_bytes: int | None = None,
    warn: Callable[[str], None] | None = None,
    steps: Steps = NO_STEPS,
) -> PlannedModel:
    """Open a checkpoint's headers and plan for it.

    The disk's bandwidth, for the estimate, is in bytes per second or like `1.8GB/s`, or `measure` to read experts for
    half a second; None is what was last measured on that disk, else an assumption. `hub_output_tokens` is how many
    tokens are expected of a fill that reads from the Hub, if it may generate more. With `headers_only` no weights
    are downloaded, whatever the options say, but the plan counts them. `own_bytes` is what `held_bytes` said before
    anything was done to open the model; None is what it says now. `warn` gets warnings, and `steps` what is being done,
    from any thread.

    Raises:
        SwitchrunError: One of its kinds; see `switchrun.errors`.
    """
    check_count("input_tokens", input_tokens)
    rate = None if disk_bandwidth == "measure" else parse_rate("disk_bandwidth", disk_bandwidth)
    own_bytes = held_bytes() if own_bytes is None else own_bytes
    budgets = resolve_budgets(options.cpu_bytes, options.gpu_bytes)
    way = HubWay.RANGES if headers_only else HubWay(options.hub)
    checkpoint, hub = open_model(options, warn, steps, way)
    with ExitStack() as stack:
        if hub is not None:
            stack.callback(hub.close)
        steps("plan")
        kept = find_kept(checkpoint, options)
        if disk_bandwidth == "measure":
            measure_disk(checkpoint, kept)
        asked = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
        resolved = own_options(checkpoint, asked | {"sample": False})
        num_beams, output_tokens = resolved["num_beams"], resolved["max_new_tokens"]
        try:
            plan = make_plan(
                checkpoint,
                budgets,
                dtype=options.dtype,
                batch_size=options.batch_size,
                num_beams=num_beams,
                device_map=options.tiers,
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                bandwidth=Bandwidth(rate, "given") if rate else disk_of(checkpoint, options.folder),
                stored_share=min(1.0, len(kept.files) / len(checkpoint.experts)),
                hub=None if hub is None else _hub_state(checkpoint, options, kept, hub),
                hub_output_tokens=None if hub_output_tokens is None else min(hub_output_tokens, output_tokens),
            )
        except BudgetError as error:
            # So much is reserved in any case.
            least = {"num_beams": sure_rows(options.batch_size), "max_new_tokens": max_input_tokens(checkpoint)}
            own = [name for name in asked if asked[name] is None and resolved[name] > least[name]]
            if not own:
                raise
            things = {"num_beams": "beams", "max_new_tokens": "new tokens"}
            wishes = " and ".join(f"{resolved[name]} {things[name]}" for name in own)
            flags = " or ".join(f"--{name.replace('_', '-')}" for name in own)
            raise BudgetError(
                f"{error.message}; {generation_file(checkpoint.path)} asks for {wishes}",
                ", or ".join(filter(None, (error.hint, f"use a smaller {flags}"))),
            ) from error
        stack.pop_all()
    return PlannedModel(options, checkpoint, plan, own_bytes, hub)


def held_bytes() -> int:
    """Return what this process holds now, besides Python and the libraries: the caller's own data."""
    return max(0, ram.rss_bytes() - (RUNTIME_BYTES if "torch" in sys.modules else PYTHON_BYTES))


def open_model(
    options: OpenOptions,
    warn: Callable[[str], None] | None = None,
    steps: Steps = NO_STEPS,
    way: HubWay | None = None,
) -> tuple[SwitchCheckpoint, HubRanges | None]:
    """Open a checkpoint's headers, and what reads its weights from the Hub, which the caller closes; None if local.

    `warn` gets warnings, and `steps` what is being done; both from any thread. `way` takes the place of that of the
    options.

    Raises:
        SwitchrunError: Those of `open_checkpoint`.
    """
    model = None if options.model is None else str(options.model)
    way, cache_dir = way or HubWay(options.hub), options.folder / "index"
    if hub_id(model) is None:
        return open_checkpoint(model, cache_dir=cache_dir, way=way, steps=steps), None
    from switchrun.checkpoint.remote import HubRanges

    def on_wait(seconds: float) -> None:
        (warn or _log.warning)(f"the Hub asks to wait {format_seconds(seconds)}")

    def on_silence(reason: str) -> None:
        (warn or _log.warning)(f"the Hub does not answer ({reason}); trying again")

    with ExitStack() as stack:
        ranges = stack.enter_context(HubRanges(on_wait=on_wait, on_silence=on_silence))
        steps.reads(ranges)
        checkpoint = open_checkpoint(model, cache_dir=cache_dir, way=way, ranges=ranges, steps=steps)
        if checkpoint.hub is None:
            return checkpoint, None
        stack.pop_all()
    return checkpoint, ranges


@dataclass(frozen=True, slots=True)
class KeptExperts:
    """What the offload folder holds of a model's experts: files and their sizes, and what one more would take."""

    files: Mapping[ExpertKey, tuple[Path, int]]
    file_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files.values())


def find_kept(checkpoint: SwitchCheckpoint, options: OpenOptions) -> KeptExperts:
    """Find the experts that are kept packed in the dtype that is asked for, or from the Hub as stored.

    What is kept there for something else is refused, as a session would refuse it.
    """
    packed = resolve_dtype(options.dtype, checkpoint.stored_dtype, checkpoint.plain_dtype).packed
    stores: list[ExpertStore] = []
    if packed is not None and not checkpoint.reads_int8_in_place:
        stores.append(open_checkpoint_store(options.folder, checkpoint, packed, read_only=True))
    if checkpoint.hub is not None and checkpoint.stored_dtype != "I8":
        stores += open_kept_stores(options.folder, checkpoint, read_only=True).values()
    files: dict[ExpertKey, tuple[Path, int]] = {}
    for store in reversed(stores):
        for key, status in stored_experts(store.folder):
            files[key] = expert_path(store.folder, key), status.st_size
    return KeptExperts(files, stores[0].file_bytes if stores else 0)


def _hub_state(checkpoint: SwitchCheckpoint, options: OpenOptions, kept: KeptExperts, hub: HubRanges) -> HubState:
    from switchrun.checkpoint.hub import cache_folder
    from switchrun.checkpoint.hub_ways import download_bytes

    downloaded = 0 if checkpoint.hub is None else download_bytes(checkpoint.hub, HubWay(options.hub))
    if downloaded:
        folder = cache_folder() or options.folder
        return HubState(
            str(folder), disks.free_bytes(folder), network=network_of(options), download_bytes=downloaded,
            index_bytes=hub.traffic.bytes,
        )  # fmt: skip
    dense = DenseFile(options.folder, checkpoint)
    return HubState(
        folder=str(options.folder.absolute()),
        free_bytes=disks.free_bytes(options.folder),
        kept_experts=len(kept.files),
        kept_bytes=kept.nbytes,
        kept_dense_bytes=0 if dense.slices() is None else dense.file_bytes,
        file_bytes=kept.file_bytes,
        limit_bytes=options.limit_bytes,
        network=network_of(options),
        index_bytes=hub.traffic.bytes,
    )


def network_of(options: OpenOptions) -> Bandwidth:
    """Return how fast the Hub is: as given, as last measured, else an assumption."""
    if options.network_rate is not None:
        return Bandwidth(options.network_rate, "given")
    measured = network.known_bandwidth()
    return ASSUMED_NETWORK if measured is None else Bandwidth(measured, "measured")


def disk_of(checkpoint: SwitchCheckpoint, offload: Path) -> Bandwidth:
    """Return the read bandwidth of the disk that experts are read from: as last measured, else an assumption.

    That is the checkpoint's disk, or the offload folder's for a checkpoint on the Hub.
    """
    measured = disks.known_bandwidth(checkpoint.experts_file or offload)
    return Bandwidth(measured, "measured") if measured else ASSUMED_BANDWIDTH


def measure_disk(checkpoint: SwitchCheckpoint, kept: KeptExperts) -> None:
    """Read experts here and there for half a second, and remember how fast that was.

    Those of a checkpoint on the Hub are read where they are kept; if none is, nothing is measured.
    """
    if checkpoint.hub is None:
        parts = [each for slices in _some(checkpoint.experts) for each in slices]
        ranges = [(each.file, each.offset, each.nbytes) for each in parts if isinstance(each.file, Path)]
    else:
        ranges = [(path, 0, size) for path, size in _some(kept.files)]
    rate = disks.measure_read_bandwidth(ranges)
    if rate is not None and not disks.is_sparse(ranges[0][0]):
        disks.remember_bandwidth(ranges[0][0], rate)


def _some(experts: Mapping[ExpertKey, T]) -> list[T]:
    return [experts[key] for key in random.sample(list(experts), min(len(experts), _SAMPLE))]


def plan(
    model: str | Path | None = None,
    *,
    dtype: str = "auto",
    cpu_memory: str | int | None = None,
    gpu_memory: str | int | None = None,
    offload_folder: str | Path | None = None,
    device_map: str | Path | Mapping[str, Any] | None = None,
    batch_size: BatchSize = 1,
    num_beams: int = 1,
    input_tokens: int = 24,
    output_tokens: int = 12,
    disk_bandwidth: str | float | None = None,
    hub: str = "auto",
    network_bandwidth: str | float | None = None,
) -> Plan:
    """Return which weights of a model would go where and what a fill would cost; no weights are read or downloaded.

    The arguments are those of `OpenOptions` and `plan_model`; `output_tokens` is `max_new_tokens` there.

    Raises:
        SwitchrunError: One of its kinds; see `switchrun.errors`.
    """
    options = OpenOptions(
        model=model,
        dtype=dtype,
        cpu_memory=cpu_memory,
        gpu_memory=gpu_memory,
        offload_folder=offload_folder,
        device_map=device_map,
        batch_size=batch_size,
        num_beams=num_beams,
        max_new_tokens=output_tokens,
        hub=hub,
        network_bandwidth=network_bandwidth,
    )
    planned = plan_model(options, input_tokens=input_tokens, disk_bandwidth=disk_bandwidth, headers_only=True)
    planned.close()
    return planned.plan
