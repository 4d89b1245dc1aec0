"""`prepare` and a fill write the very same files, and a fill reads what `prepare` wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from switchrun import Session
from switchrun.checkpoint import open_checkpoint
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.packing import ExpertPacker
from switchrun.planning.preparation import process_bytes
from switchrun.store import open_checkpoint_store
from switchrun.store.layout import layout_of
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

TEXTS = ["A <extra_id_0> walks into a bar.", "The cat sat on the <extra_id_0>."]


def prepare(model: str | None, offload: Path, dtype: str, jobs: int = 2) -> dict[str, bytes]:
    checkpoint = open_checkpoint(model)
    store = open_checkpoint_store(offload, checkpoint, dtype, must_write=True, warn=pytest.fail)
    steps: list[tuple[int, int]] = []
    done = ExpertPacker(checkpoint, store, jobs).run(list(checkpoint.experts), lambda *step: steps.append(step))
    assert (done.written, done.skipped, done.rebuilt) == (len(checkpoint.experts), 0, 0)
    assert [number for number, _ in steps] == [store.file_bytes * n for n in range(len(checkpoint.experts) + 1)]
    return files(offload)


def files(offload: Path) -> dict[str, bytes]:
    return {str(path.relative_to(offload)): path.read_bytes() for path in offload.rglob("*.safetensors")}


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_the_files_are_those_of_a_fill(tmp_path: Path, dtype: str) -> None:
    prepared = prepare(None, tmp_path / "prepared", dtype)
    with Session.open(dtype=dtype, offload_folder=tmp_path / "filled", batch_size=2) as session:
        wanted = [result.text for result in session.fill(TEXTS)]
    written = files(tmp_path / "filled")
    assert len(written) > 4
    assert written == {name: prepared[name] for name in written}
    with Session.open(dtype=dtype, offload_folder=tmp_path / "prepared", batch_size=2) as session:
        assert [result.text for result in session.fill(TEXTS)] == wanted
    assert files(tmp_path / "prepared") == prepared


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_any_number_of_jobs_writes_the_same(tmp_path: Path, dtype: str, stored: torch.dtype) -> None:
    # Sizes that are multiples of nothing have padding between their parts.
    model = random_model(tiny_config(d_model=18, d_ff=33, d_kv=9))
    folder = save_checkpoint(model, tmp_path / "model", container="torch", transposed=True, dtype=stored)
    one = prepare(str(folder), tmp_path / "one", dtype, jobs=1)
    assert prepare(str(folder), tmp_path / "many", dtype, jobs=50) == one
    plain = save_checkpoint(model, tmp_path / "plain", dtype=stored)
    data = [content[4096:] for content in prepare(str(plain), tmp_path / "other", dtype).values()]
    assert sorted(data) == sorted(content[4096:] for content in one.values())


def test_a_checkpoint_that_cannot_be_read_ends_the_run(tmp_path: Path) -> None:
    folder = save_checkpoint(random_model(tiny_config()), tmp_path / "model")
    checkpoint = open_checkpoint(str(folder))
    store = open_checkpoint_store(tmp_path / "tier", checkpoint, "int8", must_write=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:4096])
    before = torch.get_num_threads()
    with pytest.raises(CorruptCheckpointError, match="ends at byte"):
        ExpertPacker(checkpoint, store, jobs=2).run(list(checkpoint.experts))
    assert torch.get_num_threads() == before


def test_what_the_callback_raises_ends_the_run(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_checkpoint(random_model(tiny_config()), tmp_path / "model")))
    store = open_checkpoint_store(tmp_path / "tier", checkpoint, "nf4", must_write=True)

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    preparer = ExpertPacker(checkpoint, store, jobs=1)
    with pytest.raises(KeyboardInterrupt):
        preparer.run(list(checkpoint.experts), stop)
    there = len(files(tmp_path / "tier"))
    assert 1 <= there <= len(checkpoint.experts)
    done = preparer.run(list(checkpoint.experts))
    assert (done.written, done.skipped) == (len(checkpoint.experts) - there, there), "and it can be run again"


def test_two_preparers_share_a_folder(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(None)
    stores = [open_checkpoint_store(tmp_path / "tier", checkpoint, "int8", must_write=True) for _ in range(2)]
    keys = list(checkpoint.experts)
    assert ExpertPacker(checkpoint, stores[0], 1).run(keys[:20]).written == 20
    done = ExpertPacker(checkpoint, stores[1], 1).run(keys)
    assert (done.written, done.skipped) == (len(keys) - 20, 20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_memory_stays_within_what_is_allowed(tmp_path: Path, hermetic: dict[str, str], dtype: str) -> None:
    config = tiny_config(d_model=1024, d_ff=4096)  # 16 MiB an expert, so read past the page cache
    folder = save_checkpoint(random_model(config, dtype=torch.bfloat16), tmp_path / "model")
    allowed = process_bytes(open_checkpoint(str(folder)), layout_of(dtype, 1024, 4096), 4)
    script = """
import sys
from switchrun.cli.app import run
from switchrun.machine.ram import peak_rss_bytes
assert run(sys.argv[1:]) == 0
print(peak_rss_bytes())
"""
    options = f"prepare --model {folder} --dtype {dtype} --jobs 4 --cpu-memory {allowed} --offload-folder tier"
    done = subprocess.run(
        [sys.executable, "-c", script, *options.split()], env=hermetic, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("8 experts written")
    assert int(done.stdout.split()[-1]) <= allowed
