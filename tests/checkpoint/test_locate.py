"""Finding a checkpoint: folders, the Hub's cache, a Hub on this machine, and nothing at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.hub import choose_files
from switchrun.checkpoint.locate import locate
from switchrun.errors import ModelError, UsageError
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config
from tests.support.fake_hub import FakeHub, Fault

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(random_model(tiny_config()), tmp_path / "m")


def test_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = locate(str(folder))
    assert (location.id, location.revision, location.path) == (str(folder), None, folder.resolve())
    monkeypatch.chdir(folder.parent)
    assert locate("m").path == locate("./m/").path == folder.resolve()
    checkpoint = open_checkpoint("m")
    assert (checkpoint.id, checkpoint.path) == ("m", folder.resolve())


def test_a_folder_in_the_home(hermetic: dict[str, str]) -> None:
    assert locate("~").path == Path(hermetic["HOME"]).resolve()


def test_a_folder_wins_over_an_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    shutil.copytree(folder, folder.parent / "org" / "name@x")
    assert locate("org/name@x").revision is None


def test_a_revision_of_a_folder(folder: Path) -> None:
    with pytest.raises(UsageError, match="has no revisions"):
        locate(f"{folder}@main")


def test_a_file(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file, not a model's folder") as caught:
        locate(str(folder / "model.safetensors"))
    assert str(folder) in caught.value.hint


@pytest.mark.parametrize(
    "model",
    [
        "",
        "nothing",
        "/no/such/folder",
        "./a/b",
        "a/b/c",
        "a b/c",
        "x\0y",
        "-/x",
        "a/b@",
        "é/x",
        "a/b@../x",
        "a/b@/x",
        "a/b@x y",
    ],
)
def test_neither_a_folder_nor_an_id(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"it is not a Hub id|no such|is a file|there is no config") as caught:
        open_checkpoint(model)
    assert caught.value.message


def test_a_name_longer_than_any() -> None:
    with pytest.raises(ModelError, match="not a Hub id"):
        locate("x" * 100_000)


def test_demo(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
    with pytest.raises(ModelError, match="the demo model is not part of this installation"):
        open_checkpoint(None)
    shutil.copytree(folder, tmp_path / "switchrun" / "demo")
    assert open_checkpoint(None).id == "demo"


def touch_all(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))


def test_an_installation_leaves_the_demos_fingerprint(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path.resolve() / package)
    demo = tmp_path / "switchrun" / "demo"
    shutil.copytree(folder, demo)
    before = open_checkpoint(None).fingerprint
    touch_all(demo)
    assert open_checkpoint(None).fingerprint == open_checkpoint(str(demo)).fingerprint == before
    weights = demo / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert open_checkpoint(None).fingerprint != before, "trained again"


def test_a_download_leaves_a_commits_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the Hub's cache has no links, so that nothing but the commit says what files hold."""
    snapshot = put_into_cache(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(snapshot.parents[2]))
    first = open_checkpoint("org/tiny", download=False).fingerprint
    touch_all(snapshot)
    assert open_checkpoint("org/tiny", download=False).fingerprint == first
    other = snapshot.with_name(COMMIT[::-1])
    shutil.copytree(snapshot, other)
    assert open_checkpoint(f"org/tiny@{other.name}", download=False).fingerprint != first


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (
            ["config.json", "README.md", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"],
            ["config.json", "model.safetensors"],
        ),
        (
            [
                "a.bin",
                "pytorch_model.bin.index.json",
                "model.safetensors.index.json",
                "training_args.bin",
                "spiece.model",
            ],
            ["a.bin", "pytorch_model.bin.index.json", "spiece.model"],
        ),
        (["b.pt", "optimizer.pt", "onnx/model.safetensors", "tokenizer.json"], ["b.pt", "tokenizer.json"]),
        (["config.json"], ["config.json"]),
    ],
)
def test_one_container_is_downloaded(there: list[str], chosen: list[str]) -> None:
    assert choose_files(there) == chosen


# The Hub. huggingface_hub reads its environment when it is imported, so each test is a process of its own.

OPEN = """
import json, os, sys
from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.types import HubWay
from switchrun.errors import SwitchrunError
try:
    c = open_checkpoint(sys.argv[1], way=HubWay(os.environ.get("SWITCHRUN_TEST_WAY", "auto")))
    print(json.dumps({"id": c.id, "revision": c.revision, "path": str(c.path), "experts": len(c.experts)}))
except SwitchrunError as error:
    print(json.dumps({"kind": error.kind, "message": error.message, "hint": error.hint}))
"""


def open_in_child(model: str, **env: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", OPEN, model], capture_output=True, text=True, env={**os.environ, **env}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, "nothing else on stdout"
    result: dict[str, str] = json.loads(done.stdout)
    return result


def put_into_cache(folder: Path) -> Path:
    base = Path(os.environ["HF_HOME"]) / "hub" / "models--org--tiny"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(COMMIT)
    snapshot = base / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (base / "blobs").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, base / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def test_offline_from_the_cache(folder: Path) -> None:
    snapshot = put_into_cache(folder)
    for model in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        found = open_in_child(model)
        assert found == {"id": "org/tiny", "revision": COMMIT, "path": str(snapshot), "experts": 8}


def test_offline_and_not_in_the_cache() -> None:
    error = open_in_child("org/tiny")
    assert error["kind"] == "network"
    assert error["message"] == "org/tiny is not in the local cache, and HF_HUB_OFFLINE is set"


def test_no_connection(folder: Path) -> None:
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    error = open_in_child("org/tiny", **unreachable)
    assert error["kind"] == "network"
    assert "the Hub could not be reached" in error["message"]
    assert error["hint"]
    put_into_cache(folder)
    assert open_in_child("org/tiny", **unreachable)["revision"] == COMMIT


@pytest.fixture
def hub(folder: Path) -> Iterator[FakeHub]:
    (folder / "pytorch_model.bin").write_bytes(b"must not be downloaded")
    with FakeHub() as hub:
        hub.add("org/tiny", folder)
        hub.add("org/gated", folder, access="gated")
        yield hub


def test_download(hub: FakeHub) -> None:
    found = open_in_child("org/tiny", **hub.environment())
    assert found["experts"] == 8
    assert sorted(path.name for path in Path(found["path"]).iterdir()) == ["config.json", "model.safetensors"]
    assert not hub.requests(path="pytorch_model")
    # What was downloaded is found without the Hub, by its branch too.
    for model in ("org/tiny", "org/tiny@main", f"org/tiny@{found['revision']}"):
        assert open_in_child(model, HF_HUB_OFFLINE="1") == found


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("org/none", "model", "no model of that name on the Hub"),
        ("org/tiny@v9", "model", "org/tiny has no revision 'v9' on the Hub"),
        ("org/gated", "model", "org/gated is gated on the Hub"),
        ("org/broken", "network", "the Hub could not be reached: "),
    ],
)
def test_what_the_hub_refuses(hub: FakeHub, model: str, kind: str, message: str) -> None:
    hub.fail(Fault(status=501), origin="hub", path="org/broken", times=None)
    error = open_in_child(model, **hub.environment())
    assert error["kind"] == kind
    assert message in error["message"]


def test_a_model_larger_than_the_disk(hub: FakeHub, folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 43)
    hub.add("org/tiny", folder)
    error = open_in_child("org/tiny", SWITCHRUN_TEST_WAY="download", **hub.environment())
    assert error["kind"] == "model"
    assert "org/tiny needs another 8 TiB on disk" in error["message"]


def test_nothing_heavy_is_imported(folder: Path) -> None:
    code = (
        "import sys; from switchrun.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1]);"
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
