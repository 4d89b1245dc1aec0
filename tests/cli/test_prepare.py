"""`switchrun prepare`: each option, resumption, faults and signals; the demo model's 32 experts."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from switchrun.checkpoint.types import ExpertKey
from switchrun.store import list_stores, verify_store
from tests.cli.conftest import Invoke, Outcome
from tests.conftest import RunSwitchrun
from tests.store.conftest import Mount, flip, tmpfs

__all__ = ["tmpfs"]

#: The command with the store's `write` replaced by one that does something first.
CHILD = """
import os, signal, sys, time
from switchrun.store import ExpertStore
write, calls = ExpertStore.write, []
def patched(self, key, buffer):
    calls.append(key)
    {first}
    return write(self, key, buffer)
ExpertStore.write = patched
sys.argv = ["switchrun", "prepare", "--dtype", "int8", "--jobs", "1"]
from switchrun.cli.app import main
main()
"""


@pytest.fixture
def tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The offload folder; not made yet."""
    folder = tmp_path / "tier"
    monkeypatch.setenv("SWITCHRUN_OFFLOAD_FOLDER", str(folder))
    monkeypatch.setattr("switchrun.cli.prepare.quieten_libraries", lambda: None)
    return folder


def files(tier: Path) -> list[Path]:
    return sorted(tier.rglob("*.safetensors"))


def counts(done: Outcome) -> tuple[int, int]:
    """Give how many experts were written, and how many skipped."""
    assert done.code == 0, done.stderr
    match = re.fullmatch(r"(\d+) experts? written, (?:\d+ in the place .*, )?(\d+) skipped, .*\n", done.stdout)
    assert match, done.stdout
    return int(match[1]), int(match[2])


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_all_experts_once(invoke: Invoke, tier: Path, dtype: str) -> None:
    done = invoke("prepare", "--dtype", dtype)
    assert counts(done) == (32, 0)
    assert done.stderr == ""
    assert re.search(r", [\d.]+ [KM]iB, [\d.]+ m?s\n$", done.stdout)
    (info,) = list_stores(tier)
    assert (info.manifest and info.manifest.model, info.folder.name, info.experts) == ("demo", dtype, 32)
    assert verify_store(info.folder).damaged == ()
    assert counts(invoke("prepare", "--dtype", dtype)) == (0, 32)


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ("--layers encoder", 16),
        ("--layers encoder.1,decoder.1-3", 24),
        ("--layers decoder.0-1 --experts 0-2,7", 4),
        ("--experts 5 --jobs 3", 4),
        ("--limit 500KiB", 3),
        ("--limit 1KiB", 0),
    ],
)
def test_a_part(invoke: Invoke, tier: Path, options: str, written: int) -> None:
    done = invoke("prepare", "--dtype", "int8", *options.split())
    assert counts(done) == (written, 0)
    assert len(files(tier)) == written
    assert (f"{32 - written} left out by --limit" in done.stdout) == ("--limit" in options)
    if "--limit" in options:
        again = invoke("prepare", "--dtype", "int8", *options.split())
        assert counts(again) == (0, written), "nothing is deleted for others"


def test_dry_run_writes_nothing(invoke: Invoke, tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchrun.experts.packing._CALIBRATION_SECONDS", 0.01)
    done = invoke("prepare", "--dtype", "int8", "--dry-run", "--jobs", "2")
    assert (done.code, done.stderr) == (0, "")
    for line in ("experts to write +32 of 13[0-9] KiB", "stored already +0", "bytes to write +4.3. MiB", "free on the"):
        assert re.search(line, done.stdout)
    assert "estimated" in done.stdout
    time = r"[\d.]+ m?s"
    for line in (f"reading +{time}", f"quantising +{time} ", f"writing +{time} ", f"all of it +{time} to {time}"):
        assert re.search(f"^{line}", done.stdout, flags=re.M)
    one = invoke("prepare", "--dtype", "nf4", "--dry-run", "--jobs", "1").stdout
    assert re.search(f"^all of it +{time}$", one, flags=re.M), "one after the other"
    assert list_stores(tier) == []
    assert [path.name for path in tier.iterdir()] == ["index"], "every command keeps the parsed index there"
    invoke("prepare", "--dtype", "int8", "--layers", "encoder.1")
    before = [(path, path.stat().st_mtime_ns) for path in files(tier)]
    assert re.search("stored already +8", invoke("prepare", "--dtype", "int8", "--dry-run").stdout)
    assert [(path, path.stat().st_mtime_ns) for path in files(tier)] == before


def test_verify_rebuilds_a_flipped_byte(invoke: Invoke, tier: Path) -> None:
    invoke("prepare", "--dtype", "int8")
    path = files(tier)[7]
    good = path.read_bytes()
    flip(path, len(good) - 1)
    assert counts(invoke("prepare", "--dtype", "int8")) == (0, 32)
    assert path.read_bytes() != good
    done = invoke("prepare", "--dtype", "int8", "--verify")
    assert counts(done) == (1, 31)
    assert "1 in the place of a damaged one" in done.stdout
    assert f"switchrun: warning: {path} is damaged" in done.stderr
    assert path.read_bytes() == good
    flip(path, 100)
    done = invoke("prepare", "--dtype", "int8")
    assert counts(done) == (1, 31)
    assert "1 in the place of a damaged one" in done.stdout
    assert path.read_bytes() == good


def test_it_goes_on_after_a_kill(invoke: Invoke, tier: Path, hermetic: dict[str, str]) -> None:
    first = "len(calls) > 5 and os.kill(os.getpid(), signal.SIGKILL)"
    env = {**hermetic, "SWITCHRUN_OFFLOAD_FOLDER": str(tier)}
    done = subprocess.run([sys.executable, "-c", CHILD.format(first=first)], env=env, capture_output=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")
    assert counts(invoke("prepare", "--dtype", "int8", "--verify")) == (27, 5)
    (info,) = list_stores(tier)
    assert verify_store(info.folder).damaged == ()


def test_ctrl_c_leaves_whole_experts(invoke: Invoke, tier: Path, hermetic: dict[str, str]) -> None:
    env = {**hermetic, "SWITCHRUN_OFFLOAD_FOLDER": str(tier)}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(first="time.sleep(0.1)")],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    end = time.monotonic() + 60
    while len(files(tier)) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, b"")
    assert stderr.decode() == "switchrun: stopped; what is stored stays, and the same command goes on from there\n"
    there = len(files(tier))
    assert 2 <= there < 32
    (info,) = list_stores(tier)
    assert verify_store(info.folder).damaged == ()
    assert counts(invoke("prepare", "--dtype", "int8")) == (32 - there, there)


def test_a_full_disk_is_one_clear_line(invoke: Invoke, tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from switchrun.store import expert_store

    real = expert_store.write_atomically

    def full(store: Path, target: Path, chunks: list[bytes]) -> None:
        if len(files(tier)) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(store, target, chunks)

    monkeypatch.setattr(expert_store, "write_atomically", full)
    done = invoke("prepare", "--dtype", "int8", "--jobs", "2")
    assert (done.code, done.stdout) == (9, "")
    assert done.stderr.count("\n") == 1
    assert "cannot be written: No space left on device" in done.stderr


def test_a_disk_that_fills_up_meanwhile(
    invoke: Invoke, tier: Path, tmpfs: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmpfs("size=1m")
    # As if somebody else took the room after it was looked at.
    monkeypatch.setattr("switchrun.planning.preparation.check_room", lambda *_: None)
    done = invoke("prepare", "--dtype", "int8", "--offload-folder", str(disk))
    assert (done.code, done.stdout) == (9, "")
    assert "No space left on device" in done.stderr
    (info,) = list_stores(disk)
    assert 0 < info.experts < 32
    assert verify_store(info.folder).damaged == ()
    tmpfs("remount,size=64m", again=disk)
    assert counts(invoke("prepare", "--dtype", "int8", "--offload-folder", str(disk)))[1] == info.experts


def test_a_read_only_folder(invoke: Invoke, tier: Path, tmpfs: Mount) -> None:
    disk = tmpfs("size=64m")
    assert counts(invoke("prepare", "--dtype", "int8", "--experts", "0", "--offload-folder", str(disk))) == (4, 0)
    tmpfs("remount,ro,size=64m", again=disk)
    done = invoke("prepare", "--dtype", "int8", "--offload-folder", str(disk))
    assert (done.code, done.stdout) == (9, "")
    assert "Read-only file system" in done.stderr
    assert invoke("offload", "clear", "--yes", "--offload-folder", str(disk)).code == 9
    assert counts(invoke("prepare", "--dtype", "int8", "--experts", "0", "--offload-folder", str(disk))) == (0, 4)
    assert invoke("prepare", "--dtype", "int8", "--dry-run", "--offload-folder", str(disk)).code == 0


def test_two_at_once_meet_in_the_middle(invoke: Invoke, tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from switchrun.store import ExpertStore

    real, begun, order = ExpertStore.write, [], []

    def write(store: ExpertStore, key: ExpertKey, data: memoryview) -> bool:
        if not begun:
            begun.append(key)
            # While the first one stores its first expert, another one does a layer.
            assert counts(invoke("prepare", "--dtype", "int8", "--jobs", "1", "--layers", "decoder.3")) == (8, 0)
        order.append(key)
        return real(store, key, data)

    monkeypatch.setattr(ExpertStore, "write", write)
    assert counts(invoke("prepare", "--dtype", "int8", "--jobs", "1")) == (24, 8)
    assert [(key.stack, key.block, key.expert) for key in order[:8]] == [("decoder", 3, n) for n in range(7, -1, -1)]
    assert [key.expert for key in order[8:16]] == list(range(8))


def test_too_little_room_is_said_before(invoke: Invoke, tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10**6

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    done = invoke("prepare", "--dtype", "int8")
    assert done.code == 9
    assert "has 977 KiB free, the experts take 4.3" in done.stderr
    assert files(tier) == []


def test_a_folder_that_cannot_be_written(invoke: Invoke, tier: Path) -> None:
    tier.write_text("a file")
    done = invoke("prepare", "--dtype", "int8")
    assert (done.code, done.stdout) == (9, "")
    assert done.stderr.count("\n") == 1
    assert "cannot be written: " in done.stderr


def test_another_state_of_the_model_is_refused(invoke: Invoke, tier: Path) -> None:
    invoke("prepare", "--dtype", "int8", "--experts", "0")
    (info,) = list_stores(tier)
    manifest = info.folder / "manifest.json"
    assert info.manifest is not None
    manifest.write_text(manifest.read_text().replace(info.manifest.fingerprint, "other"))
    done = invoke("prepare", "--dtype", "int8")
    assert done.code == 7
    command = re.search("`switchrun (offload clear .*)`", done.stderr)
    assert command
    assert invoke(*command[1].split(), "--yes").code == 0
    assert counts(invoke("prepare", "--dtype", "int8", "--experts", "0")) == (4, 0)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("", 2, "--dtype int8|nf4 is missing"),
        ("--dtype bf16", 2, "--dtype"),
        ("--dtype int8 --layers encoder.0", 2, "'encoder.0' has no experts"),
        ("--dtype int8 --layers encoder.1,", 2, "'' names no layers"),
        ("--dtype int8 --experts 0-8", 2, "'0-8' names no experts"),
        ("--dtype int8 --experts 3-1", 2, "'3-1' names no experts"),
        ("--dtype int8 --jobs 0", 2, "--jobs"),
        ("--dtype int8 --limit much", 2, "--limit: 'much' is not a size"),
        ("--dtype int8 --cpu-memory much", 2, "--cpu-memory: 'much' is not a size"),
        ("--dtype int8 --model nowhere", 5, "nowhere"),
        ("--dtype int8 --cpu-memory 64MiB", 6, "needs at least"),
        ("--dtype int8 --cpu-memory 300MiB --jobs 16", 6, "or --jobs 2"),
    ],
)
def test_refusals(invoke: Invoke, tier: Path, options: str, code: int, message: str) -> None:
    done = invoke("prepare", *options.split())
    assert (done.code, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert files(tier) == []


def test_progress_is_for_terminals(invoke: Invoke, tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    done = invoke("prepare", "--dtype", "int8", "--experts", "0", terminal=True)
    assert "prepare: 0 B of " in done.stderr
    assert done.stderr.endswith("\r\x1b[2K")


def test_it_is_ready_in_a_process_of_its_own(run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["prepare", "--dtype", "nf4", "--experts", "0"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("4 experts written, 0 skipped, ")
