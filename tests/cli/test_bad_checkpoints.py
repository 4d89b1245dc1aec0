"""Everything that can be wrong with a checkpoint, as the user meets it: the command, one line, an exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import RunSwitchrun
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.edits import EXPERT, Evil

SINGLE = "model.safetensors"
BIN = "pytorch_model.bin"
SHARD = "model-00002-of-00003.safetensors"
DENSE = "decoder.block.1.layer.1.EncDecAttention.k.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in three containers; tests work on copies."""
    model, base = random_model(tiny_config()), tmp_path_factory.mktemp("originals")
    folders = {
        "single": save_checkpoint(model, base / "single"),
        "sharded": save_checkpoint(model, base / "sharded", sharded=True),
        "bin": save_checkpoint(model, base / "bin", container="torch"),
    }
    for folder in folders.values():
        save_tiny_tokenizer(folder)
    return folders


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Give a function that copies one of the originals."""

    def make(kind: str) -> Path:
        return Path(shutil.copytree(originals[kind], tmp_path / "model"))

    return make


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def edit_bin(folder: Path, change: Callable[[dict[str, Any]], Any], **options: Any) -> None:
    tensors = torch.load(folder / BIN, weights_only=True)
    change(tensors)
    torch.save(tensors, folder / BIN, **options)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def cut(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size + size if size < 0 else size)


def compress(folder: Path) -> None:
    with zipfile.ZipFile(folder / BIN) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / BIN, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def stride(tensors: dict[str, torch.Tensor]) -> None:
    rows, columns = tensors[EXPERT].shape
    tensors[EXPERT] = torch.zeros(rows, 2 * columns)[:, ::2]


def gate(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".wi.weight")]:
        tensor = tensors.pop(name)
        tensors |= {name.replace(".wi.", ".wi_0."): tensor, name.replace(".wi.", ".wi_1."): tensor.clone()}


def make_t5(folder: Path) -> None:
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name])
    edit_json(folder / "config.json", lambda config: config.update(model_type="t5"))


SCALES = EXPERT.replace("weight", "SCB")


def quantize(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].char()


def without_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".expert_2." in name]:
        del tensors[name]


def lose(folder: Path) -> None:
    """Take a tensor out of its shard; the index still names it."""
    tensors = load_file(folder / SHARD)
    del tensors[next(name for name in tensors if ".expert_3.wi." in name)]
    save_file(tensors, folder / SHARD)


#: What is done to the folder, the exit code, and what the line on stderr must name (file and tensor).
CASES: dict[str, tuple[str, Callable[[Path], Any], int, tuple[str, ...]]] = {
    "legacy pickle": (
        "bin",
        lambda f: edit_bin(f, lambda _: None, _use_new_zipfile_serialization=False),
        7,
        (BIN, "old format", "torch.save("),
    ),
    "truncated safetensors": ("single", lambda f: cut(f / SINGLE, -100), 7, (SINGLE, "truncated: tensor ")),
    "safetensors cut in its header": ("single", lambda f: cut(f / SINGLE, 100), 7, (SINGLE, "truncated")),
    "empty safetensors": ("single", lambda f: cut(f / SINGLE, 0), 7, (SINGLE, "the file is empty")),
    "truncated shard": ("sharded", lambda f: cut(f / SHARD, -1), 7, (SHARD, "truncated: tensor ")),
    "truncated bin": ("bin", lambda f: cut(f / BIN, -1000), 7, (BIN, "truncated")),
    "missing shard": ("sharded", lambda f: (f / SHARD).unlink(), 7, (SHARD, "is missing", "finish the download")),
    "index that names what its shard lacks": (
        "sharded",
        lose,
        7,
        (SHARD, ".expert_3.wi.weight is not in this file, but the index says so"),
    ),
    "index that leaves the folder": (
        "sharded",
        lambda f: edit_json(f / "model.safetensors.index.json", lambda i: i["weight_map"].update(w="/etc/passwd")),
        7,
        ("model.safetensors.index.json", "/etc/passwd"),
    ),
    "index that is not JSON": (
        "sharded",
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        7,
        ("model.safetensors.index.json", "not valid JSON"),
    ),
    "wrong shape": (
        "single",
        lambda f: edit(f, lambda t: t.update({EXPERT: torch.zeros(16, 32)})),
        7,
        (SINGLE, EXPERT, "[16, 32]", "[32, 16]"),
    ),
    "wrong shape of a dense tensor": (
        "bin",
        lambda f: edit_bin(f, lambda t: t.update({DENSE: torch.zeros(3, 3)})),
        7,
        (BIN, DENSE, "[3, 3]"),
    ),
    "whole numbers": (
        "single",
        lambda f: edit(f, lambda t: t.update({DENSE: t[DENSE].long()})),
        7,
        (SINGLE, DENSE, "stored as I64"),
    ),
    "missing tensor": ("single", lambda f: edit(f, lambda t: t.pop(DENSE)), 7, (SINGLE, f"{DENSE} is missing")),
    "missing expert": ("single", lambda f: edit(f, without_expert), 7, (SINGLE, f"{EXPERT} is missing")),
    "compressed": ("bin", compress, 7, (BIN, "compressed")),
    "strides": ("bin", lambda f: edit_bin(f, stride), 7, (BIN, EXPERT, "strides [32, 2]")),
    "gated": ("single", lambda f: edit(f, gate), 5, ("model", "gated experts (wi_0, wi_1)")),
    "T5": ("single", make_t5, 5, ("not a Switch Transformers model (model_type t5)",)),
    "int8 without scales": ("single", lambda f: edit(f, quantize), 7, (SINGLE, f"{SCALES} is missing")),
    "no config": ("single", lambda f: (f / "config.json").unlink(), 5, ("there is no config.json",)),
    "config that is not JSON": (
        "single",
        lambda f: (f / "config.json").write_text("d_model: 16"),
        7,
        ("config.json", "not valid JSON"),
    ),
    "config that is a list": ("single", lambda f: (f / "config.json").write_text("[]"), 7, ("config.json", "a list")),
    "config without numbers": (
        "single",
        lambda f: edit_json(f / "config.json", lambda c: c.update(d_ff="many")),
        7,
        ("config.json", "d_ff"),
    ),
    "no weights": ("single", lambda f: (f / SINGLE).unlink(), 5, ("there are no weights",)),
    "Git LFS pointer": (
        "single",
        lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        7,
        (SINGLE, "git lfs pull"),
    ),
}


def check(done: subprocess.CompletedProcess[str], code: int, words: tuple[str, ...]) -> None:
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("switchrun: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_a_code(case: str, copy: Callable[[str], Path], run_switchrun: RunSwitchrun) -> None:
    kind, damage, code, words = CASES[case]
    folder = copy(kind)
    damage(folder)
    if code == 7:
        words = (str(folder), *words)
    check(run_switchrun(["plan", "--model", str(folder)]), code, words)


@pytest.mark.parametrize("kind", ["single", "sharded", "bin"])
def test_undamaged_they_open(kind: str, copy: Callable[[str], Path], run_switchrun: RunSwitchrun) -> None:
    """Else the tests above would show nothing."""
    done = run_switchrun(["plan", "--model", str(copy(kind)), "--format", "json"])
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["num_experts"] == 8


@pytest.mark.parametrize("case", ["truncated shard", "strides"])
def test_fill_says_the_same(case: str, copy: Callable[[str], Path], run_switchrun: RunSwitchrun) -> None:
    kind, damage, code, words = CASES[case]
    folder = copy(kind)
    damage(folder)
    check(run_switchrun(["fill", "A <extra_id_0>.", "--model", str(folder)]), code, words)


@pytest.mark.parametrize("command", [["plan"], ["fill", "A <extra_id_0>."]])
def test_a_malicious_pickle_does_not_run(
    command: list[str], copy: Callable[[str], Path], run_switchrun: RunSwitchrun, tmp_path: Path
) -> None:
    folder, marker = copy("bin"), tmp_path / "pwned"
    edit_bin(folder, lambda tensors: tensors.update(x=Evil(marker)))
    done = run_switchrun([*command, "--model", str(folder)])
    check(done, 7, (BIN, "asks to run `", "was not loaded"))
    assert not marker.exists()
    torch.load(folder / BIN, weights_only=False)
    assert marker.exists(), "the file is not malicious, so that the test shows nothing"


def test_a_file_cut_after_it_was_indexed(copy: Callable[[str], Path], run_switchrun: RunSwitchrun) -> None:
    folder = copy("sharded")
    command = ["plan", "--model", str(folder), "--format", "json"]
    assert run_switchrun(command).returncode == 0
    index = list(Path(os.environ["SWITCHRUN_CACHE"]).rglob("*.json"))
    assert len(index) == 1
    cut(folder / SHARD, -1)
    for _ in range(2):
        check(run_switchrun(command), 7, (SHARD, "truncated: tensor ", ".experts.expert_"))


def test_an_empty_folder(run_switchrun: RunSwitchrun, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check(run_switchrun(["plan", "--model", str(tmp_path / "empty")]), 5, ("empty", "there is no config.json"))


@pytest.mark.parametrize("model", ["/no/such/folder", "nothing", "a/b/c"])
def test_no_such_folder(model: str, run_switchrun: RunSwitchrun) -> None:
    check(run_switchrun(["plan", "--model", model]), 5, (f"there is no folder '{model}'", "Hub id"))


def test_a_file_instead_of_its_folder(copy: Callable[[str], Path], run_switchrun: RunSwitchrun) -> None:
    folder = copy("single")
    done = run_switchrun(["plan", "--model", str(folder / SINGLE)])
    check(done, 5, ("is a file, not a model's folder", f"give its folder: {folder}"))


def test_a_folder_with_a_revision(copy: Callable[[str], Path], run_switchrun: RunSwitchrun) -> None:
    folder = copy("single")
    check(run_switchrun(["plan", "--model", f"{folder}@main"]), 2, ("has no revisions", "leave out @main"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_file_that_must_not_be_read(name: str, copy: Callable[[str], Path], run_switchrun: RunSwitchrun) -> None:
    folder = copy("single")
    (folder / name).chmod(0)
    check(run_switchrun(["plan", "--model", str(folder)]), 7, (name, "Permission denied"))


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_folder_in_a_file_s_place(name: str, copy: Callable[[str], Path], run_switchrun: RunSwitchrun) -> None:
    folder = copy("single")
    (folder / name).unlink()
    (folder / name).mkdir()
    check(run_switchrun(["plan", "--model", str(folder)]), 7, (name, "it is a folder, not a file"))
