"""Memory is a promise: the process stays within --cpu-memory, and what cannot be kept is refused beforehand."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from switchrun import plan
from switchrun.bench.synthetic import Geometry, make_checkpoint
from switchrun.checkpoint import open_checkpoint
from switchrun.planning import memory
from switchrun.units import MIB
from tests.conftest import RunSwitchrun
from tests.support.checkpoints import save_tiny_tokenizer

#: 24 GiB of experts, all but two layers' worth of it holes: reading them is real, storing them costs nothing.
BIG = Geometry(d_model=1024, d_ff=4096, d_kv=64, num_heads=16, num_layers=2, num_experts=384, vocab_size=128)
TEXT = "the <extra_id_0> sat on the <extra_id_1> . " + "a man walks into a bar and orders a beer with salt " * 30

CAMPAIGN = pytest.mark.campaign

#: Runs the command and tells its peak resident set.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, "-m", "switchrun", *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big") / "model"
    make_checkpoint(folder, BIG)
    return save_tiny_tokenizer(folder)


def minimum_of(run_switchrun: RunSwitchrun, model: Path, *options: str) -> int:
    done = run_switchrun(["plan", "--model", str(model), "--cpu-memory", "64GiB", "--format", "json", *options])
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["minimum_cpu_bytes"])


def peak_of(env: dict[str, str], *arguments: str) -> tuple[int, int]:
    """Run the command; give its exit code and peak resident set."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.returncode, int(done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    "room_mib", [*(pytest.param(each, marks=pytest.mark.slow) for each in (0, 200)), pytest.param(1024, marks=CAMPAIGN)]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "int8", "nf4"])
def test_the_process_stays_within_the_budget(
    big: Path, run_switchrun: RunSwitchrun, hermetic: dict[str, str], dtype: str, room_mib: int
) -> None:
    """From the minimum that `plan` states upwards; the checkpoint is at least eight times as large."""
    budget = minimum_of(run_switchrun, big, "--dtype", dtype) + room_mib * MIB
    assert sum(file.stat().st_size for file in big.iterdir()) >= 8 * budget
    for threads in ("1", "2"):
        _, peak = peak_of(
            hermetic | {"OMP_NUM_THREADS": threads},
            *("fill", "--model", str(big), "--dtype", dtype, "--cpu-memory", str(budget)),
            *("--max-new-tokens", "4", TEXT),
        )
        assert peak <= budget, f"{peak / MIB:.0f} MiB of {budget / MIB:.0f} MiB"


@pytest.mark.slow
def test_a_batch_with_beams_stays_within_the_budget(
    big: Path, run_switchrun: RunSwitchrun, hermetic: dict[str, str], tmp_path: Path
) -> None:
    options = ("--batch-size", "4", "--num-beams", "3")
    budget = minimum_of(run_switchrun, big, *options) + 64 * MIB
    _, peak = peak_of(
        hermetic,
        *("fill", "--model", str(big), "--cpu-memory", str(budget), *options, "--max-new-tokens", "3"),
        *(TEXT, TEXT, TEXT, "a <extra_id_0> walks"),
    )
    assert peak <= budget, f"{peak / MIB:.0f} MiB of {budget / MIB:.0f} MiB"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "nf4"])
def test_scores_stay_within_the_budget(
    big: Path, run_switchrun: RunSwitchrun, hermetic: dict[str, str], dtype: str
) -> None:
    """Of spans that take all the memory there is for them, beside a long text."""
    options = ("--dtype", dtype, "--batch-size", "3")
    budget = minimum_of(run_switchrun, big, *options) + 64 * MIB
    planned = plan(big, dtype=dtype, batch_size=3, cpu_memory=budget, gpu_memory=0, output_tokens=64)
    checkpoint = open_checkpoint(str(big))
    shapes = [memory.BatchShape(1, 450, 0, target=length) for length in range(64, 4096, 16)]
    longest = max(shape.target for shape in shapes if memory.has_room(checkpoint, planned, shape))
    assert longest > 512
    lines = [f"{'a ' * 400}<extra_id_0>\t{'a ' * (longest - words)}" for words in (20, 400, 500)]
    _, peak = peak_of(hermetic, *("score", "--model", str(big), "--cpu-memory", str(budget), *options), *lines)
    assert peak <= budget, f"{peak / MIB:.0f} MiB of {budget / MIB:.0f} MiB"


@pytest.mark.slow
def test_alternatives_stay_within_the_budget(big: Path, run_switchrun: RunSwitchrun, hermetic: dict[str, str]) -> None:
    budget = minimum_of(run_switchrun, big, "--num-beams", "12") + 64 * MIB
    _, peak = peak_of(
        hermetic,
        *("fill", "--model", str(big), "--cpu-memory", str(budget), "--alternatives", "6", "--explain"),
        *("--max-new-tokens", "64", TEXT),
    )
    assert peak <= budget, f"{peak / MIB:.0f} MiB of {budget / MIB:.0f} MiB"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "room_mib"), [pytest.param("bf16", 300, marks=CAMPAIGN), ("fp32", 0), ("nf4", 300)])
def test_auto_answers_as_one_by_one_within_the_budget(
    big: Path, run_switchrun: RunSwitchrun, hermetic: dict[str, str], dtype: str, room_mib: int
) -> None:
    """Lines of 5 to 600 tokens, of which the longest cannot be filled where memory is least."""
    lengths = [3, 40, 590, *range(4, 64, 4), 300, 600, 590, 120, 8] + [24] * 8
    words = "the cat sat on the mat and a man walks into a bar with salt".split()
    lines = [
        " ".join([words[(n + at) % 14] for at in range(length)]) + " <extra_id_0>" for n, length in enumerate(lengths)
    ]
    budget = minimum_of(run_switchrun, big, "--dtype", dtype) + room_mib * MIB
    answers = {}
    for size in ("1", "auto"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, "fill", "-q", "--model", str(big), "--dtype", dtype, "--format", "jsonl",
             "--cpu-memory", str(budget), "--batch-size", size, "--max-new-tokens", "3"],
            input="\n".join(lines), env=hermetic, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        *errors, peak = done.stderr.splitlines()
        assert done.returncode == (3 if errors else 0), done.stderr
        assert int(peak) <= budget, f"{size}: {int(peak) / MIB:.0f} MiB of {budget / MIB:.0f} MiB"
        records = [json.loads(line) for line in done.stdout.splitlines()]
        assert [record["id"] for record in records] == list(range(len(lines)))
        answers[size] = [record.get("output_ids") for record in records]
    different = [
        one for one, other in zip(answers["1"], answers["auto"], strict=True) if one and other and one != other
    ]
    assert len(different) <= (0 if dtype == "fp32" else len(lines) // 10), "in bf16 where two logits are that close"


def test_below_the_minimum_nothing_is_loaded(big: Path, run_switchrun: RunSwitchrun) -> None:
    minimum = minimum_of(run_switchrun, big)
    for command in (["plan"], ["fill", TEXT]):
        done = run_switchrun([*command, "--model", str(big), "--cpu-memory", str(minimum - 1)])
        assert done.returncode == 6
        assert done.stdout == ""
        named = -(-minimum // MIB)
        assert f"needs at least {named} MiB of CPU memory" in done.stderr
        assert f"--cpu-memory {named}MiB or more" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(big: Path, run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["fill", TEXT, "--model", str(big), "--gpu-memory", "4GiB"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "gpu:0 is asked for, and torch finds 0 GPUs here" in done.stderr


@pytest.mark.slow
def test_a_line_that_cannot_fit_is_refused_before_it_takes_memory(
    big: Path, run_switchrun: RunSwitchrun, hermetic: dict[str, str]
) -> None:
    line = "the <extra_id_0> " + "a b c d " * 60_000
    budget = minimum_of(run_switchrun, big)
    done = run_switchrun(["fill", "--model", str(big), "--cpu-memory", str(budget)], input=line + "\n")
    assert (done.returncode, done.stdout) == (4, "\n")
    assert "line 1: the text has 480017 characters, there is memory for " in done.stderr


def test_the_peak_in_a_record_is_the_systems(big: Path, run_switchrun: RunSwitchrun, tmp_path: Path) -> None:
    from switchrun.machine import ram

    assert abs(ram.peak_rss_bytes() - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) < 4 * MIB
    assert 0 < ram.rss_bytes() <= ram.peak_rss_bytes()
    assert os.sysconf("SC_PAGE_SIZE") == 4096
