"""Synthetic checkpoints: made once, of the size that was asked for, with routing that stays among the real experts."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from switchrun.bench import raw_disk, synthetic, torch_zip
from switchrun.bench.measure import make_inputs
from switchrun.bench.probe import Probe
from switchrun.bench.synthetic import make_synthetic
from switchrun.bench.torch_zip import StoredTensor, write_torch_zip
from switchrun.checkpoint import torch_file
from switchrun.checkpoint.files import open_weights
from switchrun.errors import BudgetError, StorageError, UsageError
from switchrun.kernels import native
from switchrun.kernels.qmoe import QmoeMatrix, decode
from switchrun.model.engine import Engine
from switchrun.planning.opening import plan_model
from switchrun.planning.options import OpenOptions

EXPERT = 2 * 2 * 32 * 64
needs_kernels = pytest.mark.skipif(not native.paths(), reason="built without kernels")


@pytest.fixture(autouse=True)
def tiny_geometries(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = synthetic.Geometry(32, 64, 8, 4, 2, 8, sparse_step=2, tied=True, vocab_size=256)
    wide = replace(tiny, d_model=512, d_ff=256)
    both = {"switch-tiny-8": tiny, "switch-all-8": replace(tiny, sparse_step=1, tied=False, hub_faults=True)}
    monkeypatch.setattr(synthetic, "GEOMETRIES", both | {"switch-wide-8": wide})


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("tiny-8", 2),
        ("switch-all-8", 4),
        pytest.param("tiny-8-qmoe", 2, marks=needs_kernels),
        pytest.param("switch-all-8-qmoe", 4, marks=needs_kernels),
    ],
)
def test_routing_stays_among_real_experts(tmp_path: Path, name: str, layers: int) -> None:
    said: list[str] = []
    real = str(3 * layers * synthetic.parse_geometry(name)[1].expert_bytes)
    made = make_synthetic(name, real, tmp_path, said.append)
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
    assert make_synthetic(name, real, tmp_path, said.append).path == made.path
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
        ("tiny-8-qmo", None, "is not a geometry"),
        ("tiny-8-qmoe:experts=9", None, "switch-tiny-8-qmoe has 2 to 8 experts"),
        ("tiny-8-qmoe", "1", "less than two experts"),
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


# QMoE's format


@needs_kernels
@pytest.mark.parametrize(("name", "layers"), [("tiny-8", 2), ("all-8", 4)])
def test_qmoe_files_are_those_that_torch_saves(tmp_path: Path, name: str, layers: int) -> None:
    said: list[str] = []
    made = make_synthetic(f"{name}-qmoe:experts=3", None, tmp_path, said.append)
    assert make_synthetic(f"{name}-qmoe:experts=3", None, tmp_path, said.append) == made
    assert len(said) == 1
    assert made.description["materialized_experts"] == 3
    files = {path.name for path in made.path.iterdir()}
    assert files == {"noexp.pt", "sizes.pt", "config.json", "synthetic.json", *(f"exp0{n}.pt" for n in range(layers))}
    sizes = torch.load(made.path / "sizes.pt", weights_only=True)
    seen: list[torch.Tensor] = []
    for number in range(layers):
        state = torch.load(made.path / f"exp0{number}.pt", weights_only=True)
        assert len(state) == 3 * 2 * 4
        assert {key.startswith("encoder") for key in state} == {number < layers // 2}
        for matrix in sorted({key.rpartition(".")[0] for key in state}):
            codes, offsets, extremes, weight = (
                state[f"{matrix}.{part}"] for part in ("w_comp", "row_off", "ter_minmax", "weight")
            )
            assert (weight.shape, weight.dtype, len(codes)) == ((0,), torch.bfloat16, sizes.pop(matrix))
            rows, columns = (64, 32) if matrix.endswith(".wi") else (32, 64)
            dense = decode(QmoeMatrix(codes, offsets, extremes, columns)).float()
            assert dense.shape == (rows, columns)
            assert 0.82 < (dense == 0).float().mean() < 0.94
            assert 0.7 < float(dense.std()) * columns**0.5 < 1.4
            seen.append(dense.flatten())
    assert len(torch.unique(torch.stack(seen).view(-1, 32 * 64), dim=0)) > len(seen) / 2
    assert sizes == {}


@needs_kernels
def test_qmoe_dense_weights_and_holes(tmp_path: Path) -> None:
    geometry = synthetic.parse_geometry("tiny-8-qmoe")[1]
    made = make_synthetic("tiny-8-qmoe", str(2 * 2 * geometry.expert_bytes), tmp_path, lambda _: None)
    assert made.description["materialized_experts"] == 2
    dense = torch.load(made.path / "noexp.pt", weights_only=True)
    names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    assert len({dense[f"{name}.weight"].data_ptr() for name in names}) == 1
    router = dense["encoder.block.1.layer.1.mlp.router.classifier.weight"]
    assert torch.equal(router[1], -router[0])
    assert not router[2:].any()
    experts = torch.load(made.path / "exp00.pt", weights_only=True)
    filled = {name.split(".")[-3] for name, tensor in experts.items() if tensor.any()}
    assert filled == {"expert_0", "expert_1"}
    assert len({len(tensor) for name, tensor in experts.items() if "expert_7.wi.w_comp" in name}) == 1
    for file in made.path.glob("*.pt"):
        assert zipfile.ZipFile(file).testzip() is None, "a checksum is wrong"


@needs_kernels
def test_the_size_of_qmoe_that_is_foretold(tmp_path: Path) -> None:
    made = make_synthetic("wide-8-qmoe", None, tmp_path, lambda _: None)
    size = sum(file.stat().st_size for file in made.path.glob("*.pt"))
    assert 0.9 * size < synthetic.real_bytes(synthetic.parse_geometry("wide-8-qmoe")[1], 8) <= size


def test_qmoe_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHRUN_KERNELS", "off")
    with pytest.raises(UsageError, match="takes the kernels in C"):
        make_synthetic("tiny-8-qmoe", None, tmp_path, lambda _: None)
    assert not (tmp_path / "synthetic").exists()


def test_a_torch_zip_beyond_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_zip, "_zeros_crc", lambda _: 0)  # of 5 GiB it takes seconds
    looked: list[bytes] = []
    stated = torch_file.stated_offset

    def count(entry: torch_file.Entry, header: bytes) -> int | None:
        looked.append(entry.name)
        return stated(entry, header)

    monkeypatch.setattr(torch_file, "stated_offset", count)
    first, second = (StoredTensor("BF16", (5, 2**28), None) for _ in range(2))
    last = torch.arange(6, dtype=torch.int32)
    real = StoredTensor("I32", (2, 3), lambda: [last[:2].numpy().tobytes(), memoryview(last[2:].numpy().tobytes())])
    path = tmp_path / "large.pt"
    write_torch_zip(path, {"a": first, "b": second, "c": real, "d": StoredTensor("I16", (0,), None), "e": first})
    assert path.stat().st_blocks * 512 < 1e6
    tensors = torch.load(path, weights_only=True, mmap=True)
    assert tensors["c"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["b"].shape == (5, 2**28)
    assert tensors["a"].data_ptr() == tensors["e"].data_ptr() != tensors["b"].data_ptr()
    with open_weights(path) as file:
        found = torch_file.read_torch(file)
    assert not any(b"/data/" in name for name in looked), "its places are not where torch would put them"
    assert found["c"].offset > 2**32
