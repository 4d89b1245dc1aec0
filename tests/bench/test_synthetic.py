"""Synthetic checkpoints: made once, of the size that was asked for, with routing that stays among the real experts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from switchrun.bench import raw_disk, synthetic
from switchrun.bench.measure import make_inputs
from switchrun.bench.probe import Probe
from switchrun.bench.synthetic import make_synthetic
from switchrun.errors import BudgetError, StorageError, UsageError
from switchrun.model.engine import Engine
from switchrun.planning.opening import plan_model
from switchrun.planning.options import OpenOptions

EXPERT = 2 * 2 * 32 * 64


@pytest.fixture(autouse=True)
def tiny_geometries(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = synthetic.Geometry(32, 64, 8, 4, 2, 8, sparse_step=2, tied=True, vocab_size=256)
    both = {"switch-tiny-8": tiny, "switch-all-8": replace(tiny, sparse_step=1, tied=False, hub_faults=True)}
    monkeypatch.setattr(synthetic, "GEOMETRIES", both)


@pytest.mark.parametrize(("name", "layers"), [("tiny-8", 2), ("switch-all-8", 4)])
def test_routing_stays_among_real_experts(tmp_path: Path, name: str, layers: int) -> None:
    said: list[str] = []
    made = make_synthetic(name, str(3 * layers * EXPERT), tmp_path, said.append)
    assert len(said) == 1
    assert made.description["materialized_experts"] == 3
    assert "3 of 8" in made.description["note"]
    prepared = plan_model(OpenOptions(model=made.path, cpu_memory="4GiB"))
    assert prepared.checkpoint.repairs == ()
    with Engine(prepared) as engine, Probe(engine) as probe:
        probe.fill(make_inputs(prepared.checkpoint.config, 4, 32, 0), 4)
        assert {key.expert for key in probe.use} <= {0, 1, 2}
        assert len({(key.stack, key.block) for key in probe.use}) == layers
    # Found again, and made anew for other parameters.
    assert make_synthetic(name, str(3 * layers * EXPERT), tmp_path, said.append).path == made.path
    assert len(said) == 1
    assert make_synthetic(f"{name}:experts=4", None, tmp_path, said.append).path != made.path
    assert len(said) == 2


def test_experts_are_holes_or_real(tmp_path: Path) -> None:
    made = make_synthetic("tiny-8", str(2 * 2 * EXPERT), tmp_path, lambda _: None)
    (file,) = [each for each in made.path.glob("*.safetensors") if "00002" in each.name]
    with safe_open(file, "pt") as tensors:
        filled = {name for name in tensors.keys() if bool(torch.any(tensors.get_tensor(name)))}  # noqa: SIM118
    assert {name.split(".")[-3] for name in filled} == {"expert_0", "expert_1"}


@pytest.mark.parametrize(
    ("spec", "materialize", "message"),
    [
        ("nothing-8", None, "is not a geometry"),
        ("tiny-8:experts=9", None, "has 2 to 8 experts"),
        ("tiny-8:experts=1", None, "has 2 to 8 experts"),
        ("tiny-8", "1", "less than two experts"),
        ("tiny-8", "much", "--materialize: 'much' is not a size"),
    ],
)
def test_what_cannot_be_made(tmp_path: Path, spec: str, materialize: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_synthetic(spec, materialize, tmp_path, lambda _: None)


def test_the_disk_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = synthetic.shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BudgetError, match="free, the synthetic checkpoint takes"):
        make_synthetic("tiny-8", None, tmp_path, lambda _: None)
    assert not (tmp_path / "synthetic").exists()


@pytest.mark.parametrize("level", ["synthetic", "synthetic/switch-tiny-8-8-0"])
def test_a_link_is_neither_written_through_nor_believed(tmp_path: Path, level: str) -> None:
    (tmp_path / "other").mkdir()
    made = make_synthetic("tiny-8", None, tmp_path / "other", lambda _: None)
    before = {path: path.read_bytes() for path in made.path.iterdir()}
    link = tmp_path / "tier" / level
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "other" / level)
    with pytest.raises(StorageError, match=r"cannot be written: .*link"):
        make_synthetic("tiny-8", None, tmp_path / "tier", lambda _: None)
    assert {path: path.read_bytes() for path in made.path.iterdir()} == before


@pytest.mark.parametrize("mark", ["FIFO", "link", "deep"])
def test_a_mark_that_is_none_is_made_again(tmp_path: Path, mark: str) -> None:
    said: list[str] = []
    path = make_synthetic("tiny-8", None, tmp_path, said.append).path / "synthetic.json"
    content = path.read_bytes()
    path.unlink()
    if mark == "FIFO":
        os.mkfifo(path)
    elif mark == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes(b"[" * 50_000)
    make_synthetic("tiny-8", None, tmp_path, said.append)
    assert len(said) == 2
    assert path.read_bytes() == content
    assert not path.is_symlink()


def test_an_offload_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written: File exists"):
        make_synthetic("tiny-8", None, tmp_path / "file", lambda _: None)


def test_the_size_that_is_foretold(tmp_path: Path) -> None:
    for name in ("tiny-8", "all-8"):
        made = make_synthetic(name, "1GiB", tmp_path, lambda _: None)
        size = sum(file.stat().st_size for file in made.path.glob("*.safetensors"))
        geometry = synthetic.parse_geometry(name)[1]
        foretold = synthetic.real_bytes(geometry, 8)
        assert 0.9 * size < foretold <= size


def test_files_leave_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1_000_000))
    if not raw_disk.cached_pages(file):
        pytest.skip("the system does not tell what is cached")
    if not raw_disk.drop_page_cache([file]):
        pytest.skip("this filesystem keeps its pages")
    assert raw_disk.cached_pages(file) == 0
    (tmp_path / "empty").touch()
    assert raw_disk.drop_page_cache([tmp_path / "empty"])
