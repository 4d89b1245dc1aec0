"""What a session took, as tables to read."""

from __future__ import annotations

import sys

from rich.table import Table

from switchrun.model.records import SessionStats
from switchrun.output.consoles import make_list, render
from switchrun.output.tier_table import tier_table
from switchrun.units import format_bytes, format_count, format_rate, format_seconds


def render_stats(stats: SessionStats) -> str:
    """Give a session's statistics as lines for stderr, with colours if stderr is a terminal."""
    return render(sys.stderr, [tier_table(stats.tiers), _peaks(stats), _speed(stats), _experts(stats)])


def _peaks(stats: SessionStats) -> Table:
    table = make_list("Peaks")
    table.add_row("process (resident set)", format_bytes(stats.memory.peak_rss_bytes))
    if stats.memory.peak_gpu_bytes is not None:
        table.add_row("GPU", format_bytes(stats.memory.peak_gpu_bytes))
    return table


def _speed(stats: SessionStats) -> Table:
    table = make_list("Time")
    table.add_row("open", format_seconds(stats.open_seconds))
    table.add_row(f"fill, {format_count(stats.inputs, 'input')}", format_seconds(stats.fill_seconds))
    if stats.ttft_seconds is not None:
        table.add_row("time to first token, mean", format_seconds(stats.ttft_seconds))
    if stats.itl_seconds is not None:
        table.add_row("inter-token latency, mean", format_seconds(stats.itl_seconds))
    if stats.fill_seconds > 0:
        rate = stats.output_tokens / stats.fill_seconds
        table.add_row("output", f"{format_count(stats.output_tokens, 'token')}, {rate:.3g} tokens/s")
    return table


def _experts(stats: SessionStats) -> Table:
    experts = stats.experts
    table = make_list("Experts")
    rate = "" if experts.hit_rate is None else f", {experts.hit_rate:.1%} in memory"
    table.add_row("requests", f"{experts.requests}{rate}")
    read = f"{experts.loads}, {format_bytes(experts.load_bytes)}"
    if experts.load_seconds > 0:
        read += f" in {format_seconds(experts.load_seconds)}, {format_rate(experts.load_bytes / experts.load_seconds)}"
    table.add_row("loads", read)
    for tier in experts.tiers:
        if tier.tier != "cpu":
            rate = "" if tier.hit_rate is None else f", {tier.hit_rate:.1%} there"
            table.add_row(f"requests on {tier.tier}", f"{tier.requests}{rate}")
            table.add_row(f"copies to {tier.tier}", f"{tier.loads}, {format_bytes(tier.load_bytes)}")
    table.add_row("waited for them", format_seconds(stats.wait_seconds))
    return table
