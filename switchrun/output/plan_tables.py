"""A plan as tables to read."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table

from switchrun.output.consoles import make_list, make_table, render
from switchrun.output.tier_table import tier_table
from switchrun.planning.plan import Estimate, Placement, Plan
from switchrun.units import format_bytes, format_count, format_rate, format_seconds, mib_up

_BLOCK = re.compile(r"((?:encoder|decoder)\.block)\.(\d+)(?:\..*)?")


def render_plan(plan: Plan) -> str:
    """Give a plan as lines for stdout, with colours if stdout is a terminal."""
    parts: list[RenderableType] = [
        _model(plan),
        tier_table(plan.tiers),
        _memory(plan),
        _placements(plan.placements),
        _estimate(plan.estimate, plan.batch_size),
    ]
    for title, sentences in (("Notes", plan.notes), ("Repairs of the checkpoint", plan.repairs)):
        if sentences:
            parts.append("\n".join([title, *(f"- {sentence}" for sentence in sentences)]))
    return render(sys.stdout, parts)


def _model(plan: Plan) -> Table:
    table = make_list("Model")
    table.add_row("model", plan.model_id)
    if plan.revision:
        table.add_row("revision", plan.revision)
    table.add_row("folder", plan.path)
    table.add_row("size", format_bytes(plan.total_bytes))
    table.add_row("experts", f"{plan.num_experts} of {format_bytes(plan.expert_bytes)}")
    computed = "" if plan.dtype == plan.precision.compute.value else f"computed in {plan.precision.compute.value}, "
    table.add_row("dtype", f"{plan.dtype} ({computed}stored as {plan.stored_dtype})")
    return table


def _memory(plan: Plan) -> Table:
    table = make_list("Memory that this model can use")
    table.add_row("least --cpu-memory that works", _at_least(plan.minimum_cpu_bytes))
    table.add_row("--cpu-memory that holds every weight", _at_least(plan.resident_cpu_bytes))
    return table


def _placements(placements: Iterable[Placement]) -> Table:
    table = make_table("Dense weights", "weights", "tier", "why", "bytes", text_columns=3)
    groups: dict[tuple[str, str, str], list[Placement]] = {}
    for placement in placements:
        block = _BLOCK.fullmatch(placement.module)
        name = block[1] if block else placement.module
        groups.setdefault((name, placement.tier, placement.reason), []).append(placement)
    for (name, tier, reason), members in groups.items():
        numbers = {int(block[2]) for member in members if (block := _BLOCK.fullmatch(member.module))}
        label = f"{name} {_ranges(sorted(numbers))}" if numbers else name
        table.add_row(label, tier, reason, format_bytes(sum(member.bytes for member in members)))
    return table


def _estimate(estimate: Estimate, batch_size: int) -> Table:
    inputs = "one input" if batch_size == 1 else f"{batch_size} inputs"
    tokens = format_count(estimate.input_tokens, "token")
    table = make_list(f"First fill of {inputs}: {tokens} in, {estimate.output_tokens} out")
    loads = f"{estimate.encoder_expert_loads} in the encoder, {estimate.decoder_expert_loads} in the decoder"
    table.add_row("expert loads", loads)
    table.add_row("experts read", format_bytes(estimate.load_bytes))
    table.add_row("dense weights read again", format_bytes(estimate.dense_disk_bytes))
    if estimate.gpu_load_bytes:
        copied = format_count(estimate.gpu_expert_loads, "expert")
        table.add_row("copied to GPUs", f"{format_bytes(estimate.gpu_load_bytes)}, {copied}")
    rate = format_rate(estimate.bandwidth_bytes_per_second)
    table.add_row("disk", f"{rate} ({estimate.bandwidth_source})")
    table.add_row("reading takes", format_seconds(estimate.read_seconds))
    return table


def _at_least(size: int) -> str:
    """Write a size that can be given as an option: rounded up, since less would be too little."""
    return f"{mib_up(size)} ({format_bytes(size)})"


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers with runs shortened: `0-3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
