"""`switchrun offload`: listing, verifying and clearing stored experts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from huggingface_hub import constants

from switchrun.checkpoint import open_checkpoint
from switchrun.store import model_name, store_folder
from tests.checkpoint.test_locate import COMMIT, put_into_cache
from tests.cli.conftest import Invoke
from tests.conftest import validate
from tests.store.conftest import LAYOUT, data_of, flip, key, open_store
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

HUB = "google/switch-base-8@0123abc"


@pytest.fixture
def offload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offload folder with two stores of two models, and things that are not switchrun's."""
    folder = tmp_path / "my tier"
    monkeypatch.setenv("SWITCHRUN_OFFLOAD_FOLDER", str(folder))
    for model, dtype, count in (("demo", "int8", 3), (HUB, "int8", 2), (HUB, "nf4", 1)):
        store = open_store(folder, model=model, dtype=dtype)
        for number in range(count):
            assert store.write(key(number), data_of(number))
    (folder / "notes.txt").write_text("mine")
    (folder / "app" / "extension").mkdir(parents=True)
    (folder / "app" / "extension" / "manifest.json").write_text("{}")
    (store_folder(folder, "demo", "int8") / "notes.txt").write_text("mine")
    return folder


def experts(folder: Path) -> int:
    return len(list(folder.rglob("*.safetensors")))


def file_of(offload: Path, number: int, model: str = "demo") -> Path:
    return store_folder(offload, model, "int8") / "encoder.1" / f"{number}.safetensors"


def test_ls_of_an_empty_folder(invoke: Invoke) -> None:
    done = invoke("offload", "ls", "--offload-folder", "nowhere")
    assert (done.code, done.stdout, done.stderr) == (0, "nowhere holds no stored experts\n", "")
    done = invoke("offload", "ls", "--offload-folder", "nowhere", "--format", "json")
    record = json.loads(done.stdout)
    validate(record, "offload")
    assert record["stores"] == []
    assert not Path("nowhere").exists()


def test_ls(invoke: Invoke, offload: Path) -> None:
    (store_folder(offload, HUB, "nf4") / "manifest.json").write_text("{")
    done = invoke("offload", "ls")
    assert done.code == 0
    assert all(word in done.stdout for word in ("demo", "int8", "nf4", "KiB", "manifest.json"))
    assert len(re.findall(r"^google/switch-base-8@0123abc +int8 +2 ", done.stdout, flags=re.MULTILINE)) == 1
    record = json.loads(invoke("offload", "ls", "--format", "json").stdout)
    validate(record, "offload")
    assert record["offload_folder"] == str(offload)
    found = {(store["model"], store["dtype"]): store for store in record["stores"]}
    assert found.keys() == {("demo", "int8"), (HUB, "int8"), (None, "nf4")}
    assert found["demo", "int8"]["num_experts"] == 3
    assert found["demo", "int8"]["total_bytes"] == 3 * (4096 + LAYOUT.nbytes)
    assert found["demo", "int8"]["problem"] is None
    assert "cannot be used" in found[None, "nf4"]["problem"]


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_a_terminal_of_80_columns_shows_paths_whole(
    offload: Path, hermetic: dict[str, str], tmp_path: Path, command: str
) -> None:
    model = str(tmp_path / "my models" / ("a-long-name-" * 8))
    assert open_store(offload, model=model, dtype="int8").write(key(0), data_of(0))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    shown = [sys.executable, "-m", "switchrun", "offload", command, "--offload-folder", str(offload)]
    process = subprocess.Popen(shown, env=hermetic | {"TERM": "dumb"}, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux says EIO when the other end is closed
        while chunk := os.read(ours, 4096):
            seen += chunk
    os.close(ours)
    assert process.wait(30) == 0
    lines = seen.decode().replace("\r\n", "\n").splitlines()
    assert f"  {model}" in lines
    assert all(model in line or str(offload) in line for line in lines if len(line) > 80)
    assert any(re.fullmatch(r"demo +int8 +3 +.*", line) for line in lines)


def test_names_in_a_manifest_reach_the_terminal_without_escapes(invoke: Invoke, offload: Path) -> None:
    path = store_folder(offload, "demo", "int8") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "\x1b]0;x\x07[red]\u202ede\nmo"}))
    # Its experts name another model.
    for command, code in ((["ls"], 0), (["ls", "--format", "json"], 0), (["verify"], 7), (["clear", "--yes"], 0)):
        done = invoke("offload", *command)
        assert done.code == code
        assert not {"\x1b", "\x07", "\u202e"} & set(done.stdout + done.stderr)
    assert experts(offload) == 0


def test_folders_and_files_that_are_none_are_passed_over(invoke: Invoke, offload: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("manifest.json", "0.safetensors", "1.safetensors"):
        (victim / name).write_text("mine")
    folder = store_folder(offload, "demo", "int8")
    (folder / "encoder.3").symlink_to(victim)
    os.mkfifo(folder / "decoder.1")
    os.mkfifo(folder / "encoder.1" / "5.safetensors")
    os.mkfifo(offload / f"fifo-{'0a' * 6}")
    (offload / f"link-{'0b' * 6}").symlink_to(tmp_path)
    (folder.parent / "nf4").symlink_to(victim)
    assert len(json.loads(invoke("offload", "ls", "--format", "json").stdout)["stores"]) == 3
    assert invoke("offload", "verify", "--delete").code == 0
    assert invoke("offload", "clear", "--yes").stdout.startswith("deleted 6 experts, ")
    assert [path.read_text() for path in victim.iterdir()] == ["mine"] * 3


def test_verify_of_whole_stores(invoke: Invoke, offload: Path) -> None:
    done = invoke("offload", "verify")
    assert (done.code, done.stderr) == (0, "")
    assert "demo" in done.stdout
    assert invoke("offload", "verify", "--offload-folder", "nowhere").stdout == "nowhere holds no stored experts\n"


def test_verify_finds_what_is_damaged_and_deletes_it_if_asked(invoke: Invoke, offload: Path) -> None:
    path = file_of(offload, 1)
    flip(path, 5000)
    done = invoke("offload", "verify")
    assert done.code == 7
    reason, error = done.stderr.splitlines()
    assert reason == f"switchrun: {path}: its bytes do not match its checksum"
    assert f"damaged experts are left in {offload}: 1" in error
    hint = f"offload verify --delete --model demo --dtype int8 --offload-folder '{offload}'"
    told = invoke("offload", "verify", "--model", "demo", "--dtype", "int8", "--offload-folder", str(offload)).stderr
    assert hint in told.splitlines()[-1]
    assert path.exists()
    assert invoke("offload", "verify", "--model", HUB).code == 0
    assert invoke("offload", "verify", "--dtype", "nf4").code == 0
    done = invoke("offload", "verify", "--delete")
    assert (done.code, done.stderr) == (0, f"{reason}; deleted\n")
    assert not path.exists()
    assert invoke("offload", "verify").code == 0
    assert experts(offload) == 5


def test_verify_goes_on_after_a_store_that_cannot_be_used(invoke: Invoke, offload: Path) -> None:
    (store_folder(offload, "demo", "int8") / "manifest.json").write_text("{")
    done = invoke("offload", "verify")
    assert done.code == 7
    assert "google/switch-base-8" in done.stdout
    command = shlex.split(done.stderr.split("`")[1])
    assert command[:3] == ["switchrun", "offload", "clear"]
    assert invoke(*command[1:], "--yes").stdout.startswith("deleted 3 experts")
    assert experts(offload) == 3


def test_progress_is_for_terminals(invoke: Invoke, offload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "verify: " in invoke("offload", "verify", terminal=True).stderr


def test_clear_wants_yes_where_nobody_can_be_asked(invoke: Invoke, offload: Path) -> None:
    done = invoke("offload", "clear", input=b"y\n")
    assert (done.code, done.stdout) == (2, "")
    assert "3 experts" in done.stderr
    assert "add --yes" in done.stderr
    assert experts(offload) == 6
    done = invoke("offload", "clear", "--yes")
    assert done.code == 0
    assert done.stdout.startswith("deleted 6 experts, ")
    left = sorted(path.name for path in offload.rglob("*") if path.is_file())
    assert left == ["manifest.json", "notes.txt", "notes.txt"]
    assert invoke("offload", "clear", "--yes").stdout == f"nothing to delete in {offload}\n"


@pytest.mark.parametrize(("answer", "left"), [(b"y\n", 0), (b"YES\n", 0), (b"\n", 6), (b"n\n", 6), (b"", 6)])
def test_clear_asks_on_a_terminal(invoke: Invoke, offload: Path, answer: bytes, left: int) -> None:
    done = invoke("offload", "clear", input=answer, terminal=True)
    assert done.code == 0
    assert "Delete 6 experts, " in done.stderr
    assert experts(offload) == left
    assert done.stdout.startswith("nothing was deleted" if left else "deleted 6")


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--model", "demo"], 3),
        (["--dtype", "nf4"], 5),
        (["--model", HUB], 3),
        (["--model", "google/switch-base-8"], 3),
        (["--model", HUB, "--dtype", "int8"], 4),
        (["--model", "google/switch-base-8@other"], 6),
        (["--model", "google/switch-base"], 6),
    ],
)
def test_clear_of_a_part(invoke: Invoke, offload: Path, options: list[str], left: int) -> None:
    assert invoke("offload", "clear", "--yes", *options).code == 0
    assert experts(offload) == left


@pytest.mark.parametrize("kind", ["bf16", "fp32n2", "dense"])
def test_clear_of_what_came_from_the_hub(invoke: Invoke, offload: Path, kind: str) -> None:
    shutil.copytree(next(offload.glob("*/nf4")), offload / "x-0123456789ab" / kind)
    found = invoke("offload", "clear", "--yes", "--dtype", kind)
    assert found.code == 0
    assert not list(offload.glob(f"*/{kind}"))
    assert experts(offload) == 6


def test_a_dtype_that_is_none(invoke: Invoke, offload: Path) -> None:
    for name in ("int", "int8x", "", "..", "dense/.."):
        assert "is not one of 'int8', 'nf4'" in invoke("offload", "clear", "--yes", "--dtype", name).stderr
    assert experts(offload) == 6


@pytest.mark.parametrize(("revision", "left"), [("main", 6), (COMMIT, 6), ("v1", 7)])
def test_a_revision_of_a_model_that_is_here(
    invoke: Invoke, offload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str, left: int
) -> None:
    snapshot = put_into_cache(save_checkpoint(random_model(tiny_config()), tmp_path / "m"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(snapshot.parents[2]))
    name = model_name(open_checkpoint("org/tiny", download=False))
    assert re.fullmatch("org/tiny@[0-9a-f]{12}", name)
    open_store(offload, model=name).write(key(0), data_of(0))
    assert invoke("offload", "clear", "--yes", "--model", f"org/tiny@{revision}").code == 0
    assert experts(offload) == left


def test_a_local_model_is_known_by_its_folder(invoke: Invoke, offload: Path, tmp_path: Path) -> None:
    store = open_store(offload, model=str(tmp_path / "mine"))
    store.write(key(0), data_of(0))
    (store.folder / "manifest.json").write_text("{")
    assert invoke("offload", "clear", "--yes", "--model", "mine").stdout.startswith("deleted 1 expert, ")
    assert experts(offload) == 6


def test_a_folder_called_demo_is_not_the_demo_model(invoke: Invoke, offload: Path, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    open_store(offload, model=str(tmp_path / "demo")).write(key(0), data_of(0))
    assert invoke("offload", "clear", "--yes", "--model", "demo").stdout.startswith("deleted 3 experts")
    assert invoke("offload", "clear", "--yes", "--model", "./demo").stdout.startswith("deleted 1 expert, ")


def test_a_variable_for_fill_does_not_decide_what_is_deleted(
    invoke: Invoke, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWITCHRUN_MODEL", "demo")
    assert invoke("offload", "clear", "--yes").stdout.startswith("deleted 6")


def test_what_cannot_be_deleted_is_said(invoke: Invoke, offload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    done = invoke("offload", "clear", "--yes", "--model", "demo")
    assert done.code == 9
    assert "cannot be emptied: Permission denied" in done.stderr


def test_a_real_terminal_is_asked(offload: Path, hermetic: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "switchrun", "offload", "clear", "--offload-folder", str(offload)]
    process = subprocess.Popen(command, env=hermetic, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"y\n")
    stdout, _ = process.communicate(timeout=30)
    os.close(ours)
    assert (process.returncode, stdout.split(b",")[0]) == (0, b"deleted 6 experts")
    assert experts(offload) == 0
