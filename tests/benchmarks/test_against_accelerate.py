"""The comparison with accelerate, on a tiny checkpoint: real processes, the same tokens, and ratios to our own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from memory_group import MemoryGroup

from switchrun.bench import raw_disk
from switchrun.bench.child_process import run_child
from tests.conftest import ROOT
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

SCRIPT = ROOT / "benchmarks" / "against_accelerate.py"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_checkpoint(random_model(tiny_config(tie_word_embeddings=False)), tmp_path / "tiny", sharded=True)


def run(model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    given = f"--model {model} --offload-folder off --cpu-memory 2GiB --input-tokens 6 --output-tokens 4".split()
    command = [sys.executable, str(SCRIPT), *given, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def samples(output: str, figure: str, name: str) -> list[float]:
    lines = output[output.index(f"\n{figure}\n") :].splitlines()[2:]
    line = next(line for line in lines if line.split()[0] == name)
    return [float(word) for word in line.split()[1:]]


@pytest.mark.slow
def test_in_turn_with_accelerate_and_another_checkout(hermetic: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "switchrun", tmp_path / "other" / "switchrun")
    done = run(tiny, "--repeats", "1", "--warmup", "1", "--against", "accelerate", "other", "--timeout", "60")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"{name}, fill {turn} of 2" for turn in (1, 2) for name in ("switchrun", "accelerate", "other")
    ]
    assert "same tokens: yes" in done.stdout
    for name in ("accelerate", "other"):
        median, ratio, *each = samples(done.stdout, "open + fill, s", name)
        assert each == [median]
        assert ratio > 0
    assert "encoder step: achieved ÷ raw disk" in done.stdout
    assert not list((tmp_path / "off").glob("accelerate-*"))


def test_who_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    import against_accelerate as script

    def answer(seconds: float, ids: list[list[int]]) -> dict[str, Any]:
        fill = {"seconds": seconds, "output_ids": ids, "peak_rss_bytes": 2**30}
        return {"open_seconds": 1.0, "open_io_read_bytes": 2**20, "fills": [fill]}

    def fake(module: str, task: dict[str, Any], **how: Any) -> dict[str, Any]:
        if module == "accelerate_child":
            assert task["torch_dtype"] == "float32"
            return answer(4.0, [[0, 5]])
        if how["folder"] != ROOT:
            raise script.ChildError("out of memory")
        return answer(1.0, [[0, 4]])

    monkeypatch.setattr(raw_disk, "DROP_CACHES", Path("nowhere"))
    monkeypatch.setattr(script, "run_child", fake)
    monkeypatch.setattr(sys, "argv", f"x --model {tiny} --offload-folder off --cpu-memory 1GiB --repeats 2".split())
    sys.argv += ["--against", "accelerate", "/other"]
    script.main()
    output, errors = capsys.readouterr()
    assert errors.count("/other: out of memory") == 1
    assert "/other" not in output
    assert samples(output, "fill, s", "accelerate") == [4, 4, 4, 4]
    assert samples(output, "open + fill, s", "accelerate") == [5, 2.5, 5, 5]
    assert "same tokens: no" in output


def test_a_limited_child_is_in_a_group_that_is_removed(hermetic: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "groups.py").write_text(
        "from pathlib import Path\nfrom switchrun.bench.child_process import answer_task\n"
        "answer_task(lambda task, report: {'groups': Path('/proc/self/cgroup').read_text()})\n"
    )
    try:
        group = MemoryGroup(300 * 1024**2)
    except OSError as error:
        pytest.skip(str(error))
    with group:
        answer = run_child("groups", {}, folder=tmp_path, on_start=group.add)
    name = next(line for line in answer["groups"].splitlines() if "switchrun-bench" in line).rpartition("/")[2]
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{name}"))
