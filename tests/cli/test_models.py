"""`switchrun models`, and the shell's completion of their names."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from switchrun.cli.options import complete_model
from switchrun.store import store_folder
from tests.cli.conftest import Invoke
from tests.conftest import RunSwitchrun, validate
from tests.store.conftest import data_of, key, open_store
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(random_model(tiny_config()), tmp_path_factory.mktemp("tiny") / "m")


@pytest.fixture
def cache(hermetic: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's local cache, with a configuration of another kind of model, and what is no model."""
    folder = Path(hermetic["HF_HOME"]) / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    put(folder, "org/bert", {"config.json": '{"model_type": "bert"}'})
    put(folder, "org/broken", {"config.json": "{"})
    put(folder, "org/endless", {})
    os.mkfifo(folder / "models--org--endless" / "snapshots" / COMMIT / "config.json")
    (folder / "models--org--\x1b[31m").mkdir()
    (folder / "models--x").write_text("")
    (folder / "datasets--org--d").mkdir()
    return folder


@pytest.fixture
def config(hermetic: dict[str, str]) -> Path:
    path = Path(hermetic["HOME"]) / ".config" / "switchrun" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text('[aliases]\nc2048 = "google/switch-c-2048"\n')
    return path


def put(cache: Path, id: str, files: dict[str, str | Path], main: bool = True) -> Path:  # noqa: A002
    """Put a repository into the cache as huggingface_hub does."""
    base = cache / f"models--{id.replace('/', '--')}"
    snapshot = base / "snapshots" / COMMIT
    for folder in (snapshot, base / "blobs", base / "refs"):
        folder.mkdir(parents=True)
    if main:
        (base / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copy(content, base / "blobs" / name)
        else:
            (base / "blobs" / name).write_text(content)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    return base


def found(invoke: Invoke) -> dict:
    done = invoke("models", "--format", "json")
    assert (done.code, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    validate(record, "models")
    return record


def test_nothing_but_the_demo(invoke: Invoke) -> None:
    record = found(invoke)
    assert record["demo"]["dtype"] == "bf16"
    assert record["demo"]["total_bytes"] > 10_000_000
    assert (record["aliases"], record["hub_cache"]["models"], record["offload"]["models"]) == ([], [], [])
    done = invoke("models")
    assert "demo" in done.stdout
    assert "Aliases" not in done.stdout


@pytest.mark.parametrize("main", [True, False])
def test_the_cache_s_switch_models(invoke: Invoke, cache: Path, tiny: Path, main: bool) -> None:
    base = put(cache, "org/tiny", {path.name: path for path in tiny.iterdir()}, main)
    put(cache, "org/damaged", {"config.json": tiny / "config.json", "model.safetensors": "x"})
    record = found(invoke)["hub_cache"]
    assert record["folder"] == str(cache)
    damaged, whole = record["models"]
    assert (whole["model"], whole["revision"], whole["folder"]) == ("org/tiny", COMMIT, str(base))
    assert (whole["dtype"], whole["problem"]) == ("fp32", None)
    assert whole["total_bytes"] == sum(path.stat().st_size for path in tiny.iterdir())
    assert (damaged["model"], damaged["dtype"]) == ("org/damaged", None)
    assert damaged["problem"]
    done = invoke("models")
    assert f"In the Hub's local cache, {cache}\n" in done.stdout, "a path is not broken"
    assert "org/tiny" in done.stdout
    assert "bert" not in done.stdout
    assert "\x1b" not in done.stdout


def test_what_the_offload_folder_keeps(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kept"
    monkeypatch.setenv("SWITCHRUN_OFFLOAD_FOLDER", str(folder))
    for model, dtype, count in (("google/m@0123", "int8", 3), ("google/m@0123", "nf4", 1), ("demo", "int8", 1)):
        store = open_store(folder, model=model, dtype=dtype)
        for number in range(count):
            assert store.write(key(number), data_of(number))
    manifest = store_folder(folder, "demo", "int8") / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"model": "\x1b]0;x\x07[red]\u202edemo"}))
    models = {each["model"]: each for each in found(invoke)["offload"]["models"]}
    assert models["google/m@0123"]["dtypes"] == ["int8", "nf4"]
    assert models["google/m@0123"]["num_experts"] == 4
    stdout = invoke("models").stdout
    assert "google/m@0123" in stdout
    assert not {"\x1b", "\x07", "\u202e"} & set(stdout)


def test_aliases(invoke: Invoke, config: Path) -> None:
    assert found(invoke)["aliases"] == [{"alias": "c2048", "model": "google/switch-c-2048"}]
    assert ["c2048", "google/switch-c-2048"] in [line.split() for line in invoke("models").stdout.splitlines()]


# Completion.


def test_names_are_completed(cache: Path, config: Path, tiny: Path) -> None:
    put(cache, "org/tiny", {"config.json": tiny / "config.json"})
    assert complete_model("") == ["demo", "c2048", "org/tiny"]
    assert complete_model("o") == ["org/tiny"]
    config.write_text("nonsense")
    assert complete_model("") == ["demo", "org/tiny"]
    shutil.rmtree(cache)
    cache.write_text("")
    assert complete_model("") == ["demo"]


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("switchrun fill --model c", ["c2048"]),
        ("switchrun offload clear --yes -m o", ["org/tiny"]),
        ("switchrun eval --reference-model d", ["demo"]),
    ],
)
def test_completion_in_bash(
    run_switchrun: RunSwitchrun, cache: Path, config: Path, tiny: Path, words: str, completed: list[str]
) -> None:
    put(cache, "org/tiny", {"config.json": tiny / "config.json"})
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_SWITCHRUN_COMPLETE": "complete_bash"}
    done = run_switchrun([], env=asked)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, completed, "")


def test_completion_with_a_broken_file(run_switchrun: RunSwitchrun, cache: Path, config: Path) -> None:
    config.write_text("nonsense")
    asked = {"_TYPER_COMPLETE_ARGS": "switchrun fill --model c2048 --model ", "_SWITCHRUN_COMPLETE": "complete_zsh"}
    done = run_switchrun([], env=asked)
    assert (done.returncode, done.stdout, done.stderr) == (0, """_arguments '*: :(("demo"))'\n""", "")
