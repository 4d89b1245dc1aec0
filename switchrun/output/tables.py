"""Tables to read: a plan, what a session took, a preparation, stored experts, doctor's checks."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from switchrun import __version__
from switchrun.errors import printable
from switchrun.output.consoles import Table, make_list, make_table, render, whole
from switchrun.units import format_bytes, format_count, format_rate, format_seconds, mib_up

if TYPE_CHECKING:
    from switchrun.doctor import Check
    from switchrun.model.records import HubCounts, Routing, SessionStats
    from switchrun.planning.plan import Bandwidth, Estimate, HubCost, Placement, Plan, TierUse
    from switchrun.planning.preparation import Preparation
    from switchrun.store import ExpertStore, StoreInfo, VerifyReport

_BLOCK = re.compile(r"((?:encoder|decoder)\.block)\.(\d+)(?:\..*)?")
_STATUS_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}

#: Of a layer, so many experts are named.
_MOST_EXPERTS = 5

_Rows = Iterator[tuple[str, str | Text]]


def render_plan(plan: Plan) -> str:
    """Return a plan as lines for stdout, with colours if stdout is a terminal."""
    inputs = "one input" if plan.sure_rows == 1 else f"{plan.sure_rows} inputs"
    tokens = format_count(plan.estimate.input_tokens, "token")
    memory = (
        ("least --cpu-memory that works", _at_least(plan.minimum_cpu_bytes)),
        ("--cpu-memory that holds every weight", _at_least(plan.resident_cpu_bytes)),
    )
    parts: list[Table | str] = [
        make_list("Model", _model(plan)),
        _tiers(plan.tiers),
        make_list("Memory that this model can use", memory),
        _placements(plan.placements),
        make_list(f"First fill of {inputs}: {tokens} in, {plan.estimate.output_tokens} out", _estimate(plan.estimate)),
    ]
    if plan.hub is not None:
        parts.append(make_list("From the Hub, before or during that fill", _hub(plan.hub)))
    for title, sentences in (("Notes", plan.notes), ("Repairs of the checkpoint", plan.repairs)):
        if sentences:
            parts.append("\n".join([title, *(f"- {sentence}" for sentence in sentences)]))
    return render(sys.__stdout__, parts)


def _model(plan: Plan) -> _Rows:
    yield "model", whole(plan.model_id)
    if plan.revision:
        yield "revision", plan.revision
    local = plan.hub is None or plan.hub.downloads
    yield "folder", whole(plan.path if local else f"{plan.path} (its weights stay on the Hub)")
    yield "size", format_bytes(plan.total_bytes)
    yield "experts", f"{plan.num_experts} of {format_bytes(plan.expert_bytes)}"
    computed = "" if plan.dtype == plan.precision.compute.value else f"computed in {plan.precision.compute.value}, "
    yield "dtype", f"{plan.dtype} ({computed}stored as {plan.stored_dtype})"


def _at_least(size: int) -> str:
    return f"{mib_up(size)} ({format_bytes(size)})"


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


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers with runs shortened: `0-3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _estimate(estimate: Estimate) -> _Rows:
    yield (
        "expert loads",
        f"{estimate.encoder_expert_loads} in the encoder, {estimate.decoder_expert_loads} in the decoder",
    )
    yield "experts read", format_bytes(estimate.load_bytes)
    yield "dense weights read again", format_bytes(estimate.dense_disk_bytes)
    if estimate.gpu_load_bytes:
        copied = format_count(estimate.gpu_expert_loads, "expert")
        yield "copied to GPUs", f"{format_bytes(estimate.gpu_load_bytes)}, {copied}"
    yield "disk", f"{format_rate(estimate.bandwidth_bytes_per_second)} ({estimate.bandwidth_source})"
    yield "reading takes", format_seconds(estimate.read_seconds)


def _hub(cost: HubCost) -> _Rows:
    yield "index", f"{format_bytes(cost.index_bytes)} read for this plan" if cost.index_bytes else "known"
    if cost.downloads:
        yield "to download, all of it", format_bytes(cost.fetch_bytes)
    else:
        share = f"{format_bytes(cost.kept_bytes)}, {cost.kept_share:.1%} of the experts"
        yield "dense weights to fetch, once", format_bytes(cost.dense_bytes)
        yield "experts to fetch", f"{format_bytes(cost.expert_bytes)}, {format_count(cost.expert_loads, 'expert')}"
        yield "kept already", share if cost.kept_bytes else "nothing"
    yield "kept in", whole(cost.folder)
    yield "disk needed there", f"{format_bytes(cost.disk_bytes)} of {format_bytes(cost.free_bytes)} free"
    yield "network", f"{format_rate(cost.bandwidth_bytes_per_second)} ({cost.bandwidth_source})"
    yield "fetching takes", format_seconds(cost.seconds)


def _tiers(uses: Iterable[TierUse]) -> Table:
    """Return what each tier holds, of a plan or a session; 80 columns hold it."""
    columns = ("tier", "dense", "experts", "slots", "activations", "overhead", "total", "budget")
    table = make_table("Memory of each tier", *columns)
    for use in uses:
        table.add_row(
            use.tier,
            format_bytes(use.dense_bytes),
            format_bytes(use.expert_bytes),
            str(use.expert_slots) if use.expert_slots else "",
            format_bytes(use.activation_bytes),
            format_bytes(use.overhead_bytes),
            format_bytes(use.total_bytes),
            "" if use.budget_bytes is None else format_bytes(use.budget_bytes),
        )
    return table


def render_stats(stats: SessionStats) -> str:
    """Return a session's statistics as lines for stderr, with colours if stderr is a terminal."""
    lists = {"Peak memory": _peaks(stats), "Time": _times(stats), "Experts": _experts(stats)}
    if stats.hub is not None:
        lists["From the Hub"] = _hub_counts(stats.hub)
    return render(sys.stderr, [_tiers(stats.tiers), *(make_list(title, rows) for title, rows in lists.items())])


def render_routing(routing: Routing, name: str) -> str:
    """Return the experts that the tokens of an input went to, as lines for stderr, those of most tokens first."""
    table = make_table(f"Experts of {name}", "layer", "most used: expert × tokens", "tokens", "dropped", text_columns=2)
    for layer in routing.layers:
        used = Counter(layer.experts)
        most = ", ".join(f"{expert} × {count}" for expert, count in used.most_common(_MOST_EXPERTS))
        more = len(used) - _MOST_EXPERTS
        place = f"{layer.stack}.block.{layer.block}"
        tokens, dropped = str(len(layer.experts)), str(len(layer.dropped) or "")
        table.add_row(place, f"{most}, and {more} more" if more > 0 else most, tokens, dropped)
    return render(sys.stderr, [table])


def _peaks(stats: SessionStats) -> _Rows:
    yield "process", format_bytes(stats.memory.peak_rss_bytes)
    if stats.memory.peak_gpu_bytes is not None:
        yield "GPU", format_bytes(stats.memory.peak_gpu_bytes)


def _times(stats: SessionStats) -> _Rows:
    yield "open", format_seconds(stats.open_seconds)
    yield f"fill, {format_count(stats.inputs, 'input')}", format_seconds(stats.fill_seconds)
    if stats.ttft_seconds is not None:
        yield "time to first token, mean", format_seconds(stats.ttft_seconds)
    if stats.itl_seconds is not None:
        yield "time per token, mean", format_seconds(stats.itl_seconds)
    if stats.fill_seconds > 0:
        rate = stats.output_tokens / stats.fill_seconds
        yield "output", f"{format_count(stats.output_tokens, 'token')}, {rate:.3g} tokens/s"


def _experts(stats: SessionStats) -> _Rows:
    experts = stats.experts
    rate = "" if experts.hit_rate is None else f", {experts.hit_rate:.1%} in memory"
    yield "requests", f"{experts.requests}{rate}"
    read = f"{experts.loads}, {format_bytes(experts.load_bytes)}"
    if experts.load_seconds > 0:
        read += f" in {format_seconds(experts.load_seconds)}, {format_rate(experts.load_bytes / experts.load_seconds)}"
    yield "loads", read
    if experts.hub_loads:
        yield "of them from the Hub", f"{experts.hub_loads}, {format_bytes(experts.hub_bytes)}"
    for tier in experts.tiers:
        if tier.tier != "cpu":
            rate = "" if tier.hit_rate is None else f", {tier.hit_rate:.1%} there"
            yield f"requests on {tier.tier}", f"{tier.requests}{rate}"
            yield f"copies to {tier.tier}", f"{tier.loads}, {format_bytes(tier.load_bytes)}"
    yield "waiting for experts", format_seconds(stats.wait_seconds)


def _hub_counts(counts: HubCounts) -> _Rows:
    rate = f", {format_rate(counts.bytes / counts.seconds)}" if counts.seconds > 0 else ""
    yield "fetched", f"{format_bytes(counts.bytes)} in {format_seconds(counts.seconds)}{rate}"
    yield "requests", f"{counts.requests}, {format_count(counts.retries, 'retry', 'retries')}"


def render_preparation(
    store: ExpertStore,
    preparation: Preparation,
    jobs: int,
    memory_bytes: int,
    disk: Bandwidth,
    packing_seconds: float,
    network: Bandwidth | None = None,
) -> str:
    """Return what `switchrun prepare` would do, as lines for stdout.

    Args:
        store: Where the experts would go.
        preparation: What would be done.
        jobs: How many experts would be worked on side by side.
        memory_bytes: What that takes.
        disk: How fast the disk is.
        packing_seconds: What quantising takes for one expert, with all jobs at work.
        network: How fast the Hub is, if experts come from there.
    """
    work: list[tuple[str, str | Text]] = [
        ("model", whole(store.manifest.model)),
        ("dtype", store.manifest.dtype),
        ("folder", whole(str(store.folder))),
        ("experts to write", f"{len(preparation.todo)} of {format_bytes(preparation.file_bytes)}"),
        ("stored already", str(len(preparation.stored))),
        *([("left out by --limit", str(preparation.left_out))] if preparation.left_out else []),
        ("bytes to write", format_bytes(preparation.write_bytes)),
        ("free on the disk", format_bytes(preparation.free_bytes)),
        ("jobs", f"{jobs}, in {format_bytes(memory_bytes)} of memory"),
        ("disk", f"{format_rate(disk.bytes_per_second)} ({disk.source})"),
        *([("network", f"{format_rate(network.bytes_per_second)} ({network.source})")] if network else []),
    ]
    estimate = preparation.estimate(disk, packing_seconds, network)
    least, most = format_seconds(estimate.least), format_seconds(estimate.most)
    times: list[tuple[str, str | Text]] = [
        ("reading from the Hub" if network else "reading", format_seconds(estimate.reading)),
        ("quantising", f"{format_seconds(estimate.packing)} (measured for half a second)"),
        ("writing", f"{format_seconds(estimate.writing)} (if as fast as reading)"),
        ("all of it", most if jobs == 1 else f"{least} to {most}"),
    ]
    tables = {"What switchrun prepare would do": work, "How long it would take, estimated": times}
    return render(sys.__stdout__, [make_list(title, rows) for title, rows in tables.items()])


def render_stores(offload: Path, stores: Sequence[StoreInfo]) -> str:
    """Return the stores of an offload folder as lines for stdout."""
    if not stores:
        return f"{printable(offload)} holds no stored experts\n"
    table = make_table(whole(f"Stored experts in {offload}"), "model", "dtype", "experts", "bytes", text_columns=2)
    for info in stores:
        table.add_row(whole(_owner(info)), info.folder.name, str(info.experts), format_bytes(info.nbytes))
    problems = [f"{_owner(info)}, {info.folder.name}: {printable(info.problem)}" for info in stores if info.problem]
    return render(sys.__stdout__, [table, *problems])


def render_models(record: Mapping[str, Any]) -> str:
    """Return what `switchrun models` found as lines for stdout."""
    cache, offload = record["hub_cache"], record["offload"]
    sections = {
        "With switchrun": _models([record["demo"]]),
        f"In the Hub's local cache, {cache['folder']}": _models(cache["models"]),
        f"Kept in the offload folder, {offload['folder']}": _models(offload["models"]),
    }
    if record["aliases"]:
        sections["Aliases"] = _aliases((each["alias"], each["model"]) for each in record["aliases"])
    for title, table in sections.items():
        table.title = whole(title)
    return render(sys.__stdout__, [table for table in sections.values() if table.rows])


def _models(models: Sequence[Mapping[str, Any]]) -> Table:
    problems = any(each["problem"] for each in models)
    kept = any("num_experts" in each for each in models)
    columns = ["model", "dtype", *(["problem"] if problems else []), *(["experts"] if kept else []), "size"]
    table = make_table("", *columns, text_columns=3 if problems else 2)
    for each in models:
        dtypes = each["dtypes"] if kept else [each["dtype"] or ""]
        table.add_row(
            printable(each["model"], 200),
            ", ".join(dtypes),
            *([printable(each["problem"] or "", 200)] if problems else []),
            *([str(each["num_experts"])] if kept else []),
            format_bytes(each["total_bytes"]),
        )
    return table


def _aliases(aliases: Iterable[tuple[str, str]]) -> Table:
    table = make_table("", "alias", "model", text_columns=2)
    for name, model in aliases:
        table.add_row(name, model)
    return table


def render_config(record: Mapping[str, Any]) -> str:
    """Return what `switchrun config show` found as lines for stdout."""
    settings = make_table("", "key", "value", "from", text_columns=3)
    for each in record["settings"]:
        default = each["source"] == "default"
        value = f"({each['default'] or 'none'})" if default else printable(each["value"], 200)
        settings.add_row(each["key"], value, each["variable"] if each["source"] == "environment" else each["source"])
    parts = [
        f"{printable(record['path'])}{'' if record['found'] else ' (not there)'}\n",
        render(sys.__stdout__, [settings]),
    ]
    if record["aliases"]:
        parts.append(render(sys.__stdout__, [_aliases(record["aliases"].items())]))
    return "\n".join(parts)


def render_verified(offload: Path, verified: Iterable[tuple[StoreInfo, VerifyReport]]) -> str:
    """Return what was verified as lines for stdout."""
    table = make_table(whole(f"Verified in {offload}"), "model", "dtype", "experts", "bytes", "damaged", text_columns=2)
    for info, found in verified:
        damaged = str(len(found.damaged))
        table.add_row(whole(_owner(info)), info.folder.name, str(found.experts), format_bytes(found.nbytes), damaged)
    return render(sys.__stdout__, [table])


def _owner(info: StoreInfo) -> str:
    """Return what the user called the model; where that cannot be read, the folder that is named after it."""
    return printable(info.manifest.model if info.manifest else info.folder.parent.name, 4096)


def render_checks(checks: Sequence[Check]) -> str:
    """Return doctor's checks as lines for stdout, each hint below its finding."""
    table = make_table(f"switchrun {__version__}", "status", "check", "finding", text_columns=3)
    for check in checks:
        finding = check.finding if check.hint is None else f"{check.finding}\n→ {check.hint}"
        table.add_row(Text(check.status, style=_STATUS_STYLES[check.status]), check.name, finding)
    ok, warnings, failed = (sum(check.status == status for check in checks) for status in _STATUS_STYLES)
    return render(sys.__stdout__, [table, f"{ok} ok, {format_count(warnings, 'warning')}, {failed} failed"])
