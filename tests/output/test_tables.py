"""Tables: 80 columns on a pipe, COLUMNS and NO_COLOR honoured, nothing of a model's name taken for markup."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace

import pytest

from switchrun.dtypes import Dtype, Precision
from switchrun.model.records import ExpertCounts, HubCounts, MemoryPeak, SessionStats
from switchrun.output.consoles import make_list, make_table, render, whole
from switchrun.output.tables import render_plan, render_stats
from switchrun.planning.plan import CPU, DISK, HUB, Estimate, HubCost, Placement, Plan, TierUse, gpu_tier
from switchrun.units import GIB, MIB
from tests.conftest import ROOT

EVERY = "used for every generated token"
PLACEMENTS = (
    Placement("shared", CPU, 133 * MIB, EVERY),
    Placement("decoder.block.0.layer.0.SelfAttention.q.weight", CPU, 70 * MIB, EVERY),
    *(Placement(f"decoder.block.{n}", CPU, 70 * MIB, EVERY) for n in range(1, 15)),
    *(Placement(f"encoder.block.{n}", DISK if n in (3, 5, 6) else CPU, 40 * MIB, "once") for n in range(15)),
)
PLAN = Plan(
    model_id="google/[bold]switch-c-2048",
    revision="0123456789abcdef0123456789abcdef01234567",
    path="/data/models/" + "long/" * 20,
    precision=Precision(Dtype.BF16),
    stored_dtype="BF16",
    repairs=("num_decoder_layers is 12 in config.json, but the checkpoint's tensors have 15 decoder blocks: took 15",),
    num_experts=61440,
    expert_bytes=51_118_080,
    total_bytes=3_143_000_000_000,
    batch_size=1,
    num_beams=1,
    device_map={},
    placements=PLACEMENTS,
    notes=("gpu:1 is not used: a layer with experts needs 1234 MiB there, 512 MiB is allowed",),
    tiers=(
        TierUse(gpu_tier(0), 999 * MIB, 999 * MIB, 61440, 999 * MIB, 999 * GIB, 999 * MIB, 999 * MIB),
        TierUse(CPU, 999 * GIB, 999 * GIB, 61440, 49 * MIB, 999 * GIB, 999 * MIB, 999 * MIB),
        TierUse(DISK, None, 0, 0, 0, 3_141_000_000_000, 0, 0),
    ),
    minimum_cpu_bytes=int(1.1 * GIB) + 1,
    resident_cpu_bytes=3_143_000_000_000,
    estimate=Estimate(24, 12, 352, 180, 27_000_000_000, 0, 532, 26_000_000_000, 1.8e9, "measured", 15.0),
)
STATS = SessionStats(
    tiers=PLAN.tiers,
    memory=MemoryPeak(5 * GIB, None),
    open_seconds=4.2,
    inputs=2,
    output_tokens=24,
    fill_seconds=12.0,
    ttft_seconds=3.5,
    itl_seconds=0.4,
    experts=ExpertCounts(400, 100, 300, 15_000_000_000, 10.0),
    wait_seconds=8.0,
)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_plan_fits_into_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "__stdout__", _Terminal())
    lines = render_plan(PLAN).splitlines()
    assert [line for line in lines if len(line) > 80] == [f"  {PLAN.path}"]
    assert any(
        re.fullmatch(r"decoder.block 0-14 +cpu +used for every generated token +1.03 GiB", line) for line in lines
    )


def test_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    text = render_plan(PLAN)
    assert "\x1b" not in text
    assert f"folder    {PLAN.path}\n" in text
    assert "google/[bold]switch-c-2048" in text
    assert "1127 MiB (1.1 GiB)" in text, "a minimum is rounded up, so that it can be given as an option"
    assert "decoder.block 0-14" in text
    assert "encoder.block 0-2, 4, 7-14" in text
    assert "encoder.block 3, 5-6" in text
    assert "27" in text
    assert "1.80 GB/s (measured)" in text
    assert "- num_decoder_layers is 12" in text
    assert "- gpu:1 is not used" in text
    assert "24.2 GiB, 532 experts" in text


def test_a_plan_is_silent_of_what_there_is_none_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    estimate = replace(PLAN.estimate, gpu_expert_loads=0, gpu_load_bytes=0)
    text = render_plan(replace(PLAN, repairs=(), notes=(), estimate=estimate))
    for title in ("Repairs", "Notes", "copied to GPUs", "Hub"):
        assert title not in text


def test_a_plan_says_what_the_hub_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    tiers = (
        *PLAN.tiers[:-1],
        TierUse(DISK, None, 0, expert_bytes=5 * GIB),
        TierUse(HUB, None, 2 * GIB, 0, 0, 2926 * GIB),
    )
    cost = HubCost(
        False, 12, 53_000_000, 2 * GIB, 500, 24 * GIB, 0.0017, 5 * GIB, "/data/offload", 26 * GIB, 900 * GIB,
        12.5e6, "given", 2233.4,
    )  # fmt: skip
    text = render_plan(replace(PLAN, tiers=tiers, hub=cost))
    rows = dict(re.findall(r"^(\S+(?: \S+)*)  +(\S.*)$", text[text.index("From the Hub") :], flags=re.MULTILINE))
    assert rows == {
        "index": "50.5 MiB read for this plan",
        "dense weights to fetch, once": "2 GiB",
        "experts to fetch": "24 GiB, 500 experts",
        "kept already": "5 GiB, 0.2% of the experts",
        "kept in": "/data/offload",
        "disk needed there": "26 GiB of 900 GiB free",
        "network": "12.50 MB/s (given)",
        "fetching takes": "37 min 13 s",
    }
    assert re.search(r"^hub +2 GiB +2.86 TiB", text, flags=re.MULTILINE)
    fresh = render_plan(replace(PLAN, tiers=tiers, hub=replace(cost, index_bytes=0, kept_bytes=0, kept_share=0.0)))
    assert re.search(r"^index +known$", fresh, flags=re.MULTILINE)
    assert re.search(r"^kept already +nothing$", fresh, flags=re.MULTILINE)


@pytest.mark.parametrize("columns", ["40", "100"])
def test_columns_is_honoured(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    monkeypatch.setenv("COLUMNS", columns)
    long = [line for line in render_plan(PLAN).splitlines() if len(line) > int(columns)]
    assert f"  {PLAN.path}" in long
    assert {len(line.split()) for line in long} == {1}, "only a word can be longer"


@pytest.mark.parametrize("columns", ["", "0", "wide"])
def test_columns_without_a_meaning_is_no_limit(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    monkeypatch.setenv("COLUMNS", columns)
    assert f"- {PLAN.repairs[0]}\n" in render_plan(PLAN)


def test_a_table_on_a_narrow_terminal() -> None:
    table = make_table("Kept in /my folder", "model", "dtype", "experts", "bytes on disk", text_columns=2)
    table.add_row(whole("/models/a name/of many/letters"), "int8", "61440", "1.42 TiB")
    table.add_row("demo", "int8", "3", "12 KiB")
    drawn = {width: "\n".join(line.plain.rstrip() for line in table.lines(width)) for width in (None, 40, 25, 1)}
    assert (
        drawn[None]
        == """\
Kept in /my folder
model                           dtype  experts  bytes on disk
─────────────────────────────────────────────────────────────
/models/a name/of many/letters  int8     61440       1.42 TiB
demo                            int8         3         12 KiB"""
    )
    assert (
        drawn[40]
        == """\
Kept in /my folder
model        dtype  experts     bytes on
                                    disk
────────────────────────────────────────
  /models/a name/of many/letters
             int8     61440     1.42 TiB
demo         int8         3       12 KiB"""
    )
    assert drawn[25].count("/models/a name/of many/letters") == 2, "numbers without room go into a block below"
    assert "experts" in drawn[25].split("\n\n")[0]
    assert "bytes" in drawn[25].split("\n\n")[1]
    assert "1.42 TiB" in drawn[1]


def test_prose_is_wrapped_at_spaces() -> None:
    rows = make_list("List", [("what", "well-known words\n→ and a hint"), ("how", "/a/path/longer/than/it")])
    assert [line.plain.rstrip() for line in rows.lines(20)] == [
        "List",
        "what  well-known",
        "      words",
        "      → and a hint",
        "how",
        "  /a/path/longer/than/it",
    ]


def test_wide_characters_are_counted_as_wide() -> None:
    table = make_table("", "name", "n")
    table.add_row("模型", "1")
    table.add_row("m", "2")
    assert [line.plain for line in table.lines(None)][3:] == ["模型  1", "m     2"]


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "__stdout__", _Terminal())
    assert "\x1b[1m" in render_plan(PLAN)
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in render_plan(PLAN)


def test_statistics_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    experts = replace(STATS.experts, hub_loads=120, hub_bytes=6 * GIB)
    text = render_stats(replace(STATS, experts=experts, hub=HubCounts(8 * GIB, 1234, 1, 640.0)))
    for name, figure in (
        ("of them from the Hub", "120, 6 GiB"),
        ("fetched", "8 GiB in 10 min 40 s, 13.42 MB/s"),
        ("requests", "1234, 1 retry"),
    ):
        assert re.search(rf"^{name} +{figure}$", text, flags=re.MULTILINE), text
    assert "Hub" not in render_stats(STATS)


def test_performance_md_names_lines_of_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    named = re.findall(r"`([^`]*)` in `--stats`", (ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
    assert named
    for name in named:
        assert f"\n{name} " in render_stats(STATS)


def test_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    text = render_stats(STATS)
    assert max(len(line) for line in text.splitlines()) <= 80
    for words in ("5 GiB", "4.20 s", "3.50 s", "400.0 ms", "2 tokens/s", "25.0%", "1.50 GB/s", "8.00 s"):
        assert words in text
    assert "GPU" not in text
    assert "GPU" in render_stats(replace(STATS, memory=MemoryPeak(5 * GIB, GIB)))


def test_statistics_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    nothing = replace(
        STATS,
        inputs=0,
        output_tokens=0,
        fill_seconds=0.0,
        ttft_seconds=None,
        itl_seconds=None,
        experts=ExpertCounts(0, 0, 0, 0, 0.0),
    )
    assert "first token" not in render_stats(nothing)


CODES = "\x1b[31m\x9b2J\x07\u202e\u2028"
SHOWN = r"\x1b[31m\x9b2J\x07\u202e\u2028"
MARKUP = "[red]x[/red] :smile:"


def test_names_are_shown_and_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    table = make_table(f"{CODES}{MARKUP}", f"{CODES}head", text_columns=1)
    table.add_row(f"{CODES}{MARKUP}\nsecond line")
    rows = make_list("list", [(f"{CODES}a", f"{CODES}{MARKUP}")])
    for stream in (io.StringIO(), _Terminal()):
        text = render(stream, [table, rows, f"{CODES}{MARKUP}"])
        assert not set(text) & set("\x9b\x07\u202e\u2028")
        assert "\x1b[31m" not in text
        assert (text.count(SHOWN), text.count(MARKUP)) == (6, 4)
        assert "second line" in text


def test_a_plan_shows_what_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setenv("COLUMNS", "400")
    names = {"model_id": CODES, "path": CODES, "stored_dtype": CODES, "repairs": (CODES,), "notes": (CODES,)}
    text = render_plan(replace(PLAN, **names))  # type: ignore[arg-type]
    assert text.count(SHOWN) == 5
    assert "\x1b" not in text
