"""Weights read from the Hub: the same tokens as from files, each byte fetched once, and kept whatever happens."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from switchrun import Session, plan
from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.types import RemoteFile
from switchrun.errors import CorruptCheckpointError, NetworkError, StorageError
from switchrun.experts.packing import ExpertPacker
from switchrun.experts.source import plan_reads
from switchrun.planning.opening import open_model
from switchrun.planning.options import OpenOptions
from switchrun.store import dense_file, expert_store, list_stores, open_checkpoint_store, verify_store
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.fake_hub import FakeHub, Fault
from tests.support.int8 import save_in_int8
from tests.support.sessions import small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

ID = "google/switch-tiny"
TEXTS = ["the <extra_id_0> sat on the <extra_id_1> .", "a man walks into a <extra_id_0> with the red cat"]
#: Larger than what is read of a file for its headers, so that weights are not fetched with them.
GEOMETRY = {"d_model": 64, "d_ff": 128, "num_experts": 6}


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Give a function that saves a model into a folder."""

    def save(dtype: torch.dtype = torch.float32, **how: Any) -> Path:
        folder = save_checkpoint(random_model(tiny_config(**GEOMETRY), dtype=dtype), tmp_path / "model", **how)
        save_tiny_tokenizer(folder)
        return folder

    return save


def open_hub(**options: Any) -> Session:
    return Session.open(ID, hub="ranges", offload_folder="offload", max_new_tokens=8, **options)


def ids(session: Session) -> list[tuple[int, ...]]:
    return [result.output_ids for result in session.fill(TEXTS)]


def local_ids(folder: Path, **options: Any) -> list[tuple[int, ...]]:
    with Session.open(folder, offload_folder="elsewhere", max_new_tokens=8, **options) as session:
        return ids(session)


def weights_requests(hub: FakeHub) -> Counter[tuple[str, tuple[int, int] | None]]:
    return Counter((each.path.partition("?")[0], each.range) for each in hub.requests("cdn", "GET"))


STORED = {
    "safetensors": (torch.float32, {"container": "safetensors", "sharded": True}),
    "torch": (torch.bfloat16, {"container": "torch", "sharded": True}),
    "transposed": (torch.float32, {"container": "torch", "transposed": True}),
}
QUICK = {("safetensors", "bf16"), ("torch", "int8"), ("transposed", "fp32"), ("torch", "nf4")}


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        pytest.param(stored, dtype, marks=() if (stored, dtype) in QUICK else pytest.mark.campaign)
        for stored in STORED
        for dtype in ("fp32", "bf16", "int8", "nf4")
    ],
)
def test_same_tokens_and_each_byte_once(
    hub: FakeHub, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, stored: str, dtype: str
) -> None:
    weights, how = STORED[stored]
    folder = model(weights, **how)
    hub.add(ID, folder)
    expected = local_ids(folder, dtype=dtype)
    routed = []
    with open_hub(dtype=dtype) as session:
        session.engine.cache.on_load = lambda key, _segments: routed.append(key)
        opened = hub.sent("cdn")
        assert ids(session) == expected
        stats = session.stats()
    assert stats.hub is not None
    assert stats.hub.bytes == hub.sent("cdn")
    assert stats.hub.requests >= len(hub.requests("cdn", "GET"))
    assert stats.experts.hub_loads == stats.experts.loads == len(set(routed)) == len(routed)
    # Exactly the ranges of each expert that a router has picked, with what lies between its two matrices.
    experts = session.checkpoint.experts
    reads = [segment.needed for key in routed for segment in plan_reads(experts[key], direct=True).segments]
    assert hub.sent("cdn") - opened == sum(reads) == stats.experts.hub_bytes

    # A second session asks for none of that, and without a network for nothing at all.
    opened, seen = hub.sent("cdn"), len(hub.requests())
    with open_hub(dtype=dtype) as session:
        assert ids(session) == expected
        assert session.stats().experts.hub_loads == 0
    assert hub.sent("cdn") == opened
    seen = len(hub.requests())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with open_hub(dtype=dtype) as session:
        assert ids(session) == expected
    assert len(hub.requests()) == seen


def test_one_slot_reads_from_the_disk_what_it_has_read_from_the_hub(hub: FakeHub, model: Callable[..., Path]) -> None:
    folder = model(sharded=True)
    hub.add(ID, folder)
    least = plan(ID, hub="ranges", offload_folder="offload").minimum_cpu_bytes
    with open_hub(cpu_memory=least, device_map={"": "disk", "lm_head": "disk"}) as session:
        assert session.plan.tier("cpu").expert_slots == 1
        assert ids(session) == local_ids(folder)
        experts = session.stats().experts
        assert 0 < experts.hub_loads < experts.loads
    assert max(weights_requests(hub).values()) == 1


def test_packed_experts_are_made_of_what_is_kept_as_stored(hub: FakeHub, model: Callable[..., Path]) -> None:
    folder = model(torch.bfloat16)
    hub.add(ID, folder)
    with open_hub() as session:
        ids(session)
    before = hub.sent("cdn")
    with open_hub(dtype="int8") as session:
        assert ids(session) == local_ids(folder, dtype="int8")
        # Rounded weights may send a token to another expert.
        assert session.stats().experts.hub_loads < 0.3 * session.stats().experts.loads
    fetched = {info.folder.name: info.experts for info in list_stores("offload")}
    assert fetched["int8"] > 0
    assert fetched["dense"] == 0
    assert hub.sent("cdn") - before == session.stats().experts.hub_bytes


def test_checkpoints_in_int8_are_kept_in_int8(
    hub: FakeHub, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_in_int8(model())
    hub.add(ID, folder)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with open_hub() as session:
            assert ids(session) == local_ids(folder)
            assert (session.stats().experts.hub_loads > 0) is not offline
    assert {info.folder.name for info in list_stores("offload")} == {"int8", "dense"}


def test_experts_of_two_dtypes_are_kept_in_two_folders(
    hub: FakeHub, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    folder = model()
    tensors = load_file(folder / "model.safetensors")
    narrow = {name: each.bfloat16() for name, each in tensors.items() if ".expert_1." in name or ".expert_3." in name}
    save_file(tensors | narrow, folder / "model.safetensors", metadata={"format": "pt"})
    hub.add(ID, folder)
    expected = local_ids(folder)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with open_hub() as session:
            assert ids(session) == expected
    assert {info.folder.name for info in list_stores("offload")} == {"bf16", "fp32", "dense"}


def test_without_a_network_what_is_missing_is_named(
    hub: FakeHub, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, model())
    with open_hub() as session:
        session.fill(TEXTS[:1])
    for path in Path("offload").glob("*/fp32/encoder.1/*.safetensors"):
        path.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = (
        r"switch-tiny/model\.safetensors: what is needed of it is not kept on this machine, and HF_HUB_OFFLINE is set"
    )
    with open_hub() as session, pytest.raises(NetworkError, match=words):
        session.fill(TEXTS[:1])
    next(Path("offload").glob("*/dense/dense.safetensors")).unlink()
    words = r"model\.safetensors: .* of dense weights are not on this machine, and HF_HUB_OFFLINE is set"
    with pytest.raises(NetworkError, match=words), open_hub():
        pass


def test_a_session_goes_on_after_the_hub_has_failed(hub: FakeHub, model: Callable[..., Path]) -> None:
    folder = model()
    hub.add(ID, folder)
    with open_hub() as session:
        hub.fail(Fault(status=503), times=None)
        with pytest.raises(NetworkError, match="503"):
            ids(session)
        hub.heal()
        assert ids(session) == local_ids(folder)


@pytest.mark.parametrize(
    "fault", [Fault(after=3000), Fault(after=3000, then="close"), Fault(status=500), Fault(after=100, then="stall")]
)
def test_faults_in_the_middle_of_an_expert(hub: FakeHub, model: Callable[..., Path], fault: Fault) -> None:
    folder = model()
    hub.add(ID, folder)
    with open_hub() as session:
        hub.fail(fault, times=2)
        assert ids(session) == local_ids(folder)
        counts = session.stats().hub
        assert counts is not None
        assert counts.retries >= 2


def test_a_storage_that_ignores_ranges_is_refused(hub: FakeHub, model: Callable[..., Path]) -> None:
    hub.add(ID, model())
    with open_hub() as session:
        hub.fail(Fault(whole=True), times=None)
        before = hub.sent("cdn")
        with pytest.raises(NetworkError, match="does not send the range"):
            ids(session)
        assert session.stats().hub is not None
        assert session.stats().experts.hub_bytes >= 0
        assert hub.sent("cdn") - before < 100 * session.checkpoint.total_bytes


@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_bytes_that_change_under_a_commit(hub: FakeHub, model: Callable[..., Path], container: str) -> None:
    folder = model(container=container)
    hub.add(ID, folder)
    with open_hub() as session:
        file = next(folder.glob("*.bin" if container == "torch" else "*.safetensors"))
        if container == "torch":  # the same size and hash, but other bytes: the zip's checksum shows it
            expert = next(iter(session.checkpoint.experts.values())).wi
            data = bytearray(file.read_bytes())
            for slices in session.checkpoint.experts.values():
                data[slices.wi.offset] ^= 1
            file.write_bytes(data)
            assert isinstance(expert.file, RemoteFile)
            wanted = "checksum that the file states"
        else:
            other = folder / "other"
            other.write_bytes(file.read_bytes() + b"x")
            hub.replace(ID, file.name, other)
            hub.expire_urls()
            wanted = "is not the one that commit"
        with pytest.raises(CorruptCheckpointError, match=wanted):
            ids(session)
    assert not list(Path("offload").glob("*/fp32/*/*.safetensors"))


def test_a_kept_expert_that_is_damaged_is_fetched_again(hub: FakeHub, model: Callable[..., Path]) -> None:
    folder = model()
    hub.add(ID, folder)
    with open_hub() as session:
        expected = ids(session)
    for path in list(Path("offload").glob("*/fp32/*/*.safetensors"))[:2]:
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    with open_hub() as session:
        assert ids(session) == expected
        assert session.stats().experts.hub_loads == 2
    with open_hub() as session:
        assert ids(session) == expected
        assert session.stats().experts.hub_loads == 0


def test_dense_weights_that_are_damaged_are_fetched_again(hub: FakeHub, model: Callable[..., Path]) -> None:
    hub.add(ID, model())
    with open_hub() as session:
        expected = ids(session)
    (path,) = Path("offload").glob("*/dense/dense.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    (info,) = [each for each in list_stores("offload") if each.folder.name == "dense"]
    ((damaged, why),) = verify_store(info.folder).damaged
    assert damaged.name == path.name
    assert "checksum" in why
    with pytest.raises(CorruptCheckpointError, match="it was damaged, and was deleted"), open_hub():
        pass
    with open_hub() as session:
        assert ids(session) == expected
    assert verify_store(info.folder).damaged == ()


def test_a_full_disk_is_one_warning(
    hub: FakeHub, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model()
    hub.add(ID, folder)
    with open_hub():
        pass  # dense weights have room

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(expert_store, "write_atomically", full)
    with open_hub() as session:
        assert ids(session) == local_ids(folder)
    (warning,) = [record.message for record in caplog.records if "cannot be written" in record.message]
    assert warning.endswith(
        "No space left on device; no more experts are stored there, so they will be fetched from the Hub again"
    )


def _fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def _link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def _other_name(path: Path, victim: Path) -> None:
    os.link(victim, path)


def _huge(path: Path, _: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("name", [dense_file.PARTIAL_FILE, dense_file.JOURNAL])
@pytest.mark.parametrize("make", [_fifo, _link, _other_name, _huge])
def test_what_is_in_the_place_of_a_stopped_fetch(
    hub: FakeHub, model: Callable[..., Path], tmp_path: Path, make: Callable[[Path, Path], None], name: str
) -> None:
    hub.add(ID, model())
    with open_hub():
        pass
    (path,) = Path("offload").glob("*/dense/dense.safetensors")
    path.unlink()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    make(path.with_name(name), victim)
    with open_hub():
        pass
    assert victim.read_text() == "precious"
    assert sorted(each.name for each in path.parent.iterdir()) == ["dense.safetensors", "manifest.json"]


def test_dense_weights_that_came_before_the_lock_are_not_fetched_again(
    hub: FakeHub, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, model())
    with open_hub():
        pass
    before = hub.sent("cdn")
    looks, look = iter([True]), dense_file.DenseFile.slices
    # As if another process had ended just after the first look, here after that of the plan.
    monkeypatch.setattr("switchrun.planning.opening._hub_state", lambda *_: None)
    monkeypatch.setattr(dense_file.DenseFile, "slices", lambda self: None if next(looks, False) else look(self))
    with open_hub():
        pass
    assert hub.sent("cdn") == before


def test_dense_weights_without_room_are_refused(
    hub: FakeHub, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, model())
    with monkeypatch.context() as patched:
        patched.setattr(dense_file.os, "fstatvfs", lambda _: os.statvfs_result((4096,) * 4 + (0,) * 6))
        patched.setattr(dense_file.os, "fstatvfs", lambda _: type("Room", (), {"f_bavail": 1, "f_frsize": 4096}))
        with pytest.raises(StorageError, match=r"dense weights need another .* there, 4 KiB are free"), open_hub():
            pass
    with open_hub() as session:
        ids(session)


def test_the_limit_holds_for_what_is_kept(hub: FakeHub, model: Callable[..., Path]) -> None:
    folder = model()
    hub.add(ID, folder)
    limit = 150_000
    with open_hub(offload_limit=limit) as session:
        assert ids(session) == local_ids(folder)
    (store,) = [each for each in list_stores("offload") if each.folder.name == "fp32"]
    assert 0 < store.nbytes <= limit


def test_prepare_fetches_and_keeps_only_the_packed_form(
    hub: FakeHub, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model()
    hub.add(ID, folder)
    checkpoint, ranges = open_model(OpenOptions(ID, hub="ranges", offload_folder="offload"))
    store = open_checkpoint_store("offload", checkpoint, "int8", must_write=True)
    packer = ExpertPacker(checkpoint, store, jobs=2, hub=ranges)
    assert packer.run(list(checkpoint.experts)).written == len(checkpoint.experts)
    assert {info.folder.name for info in list_stores("offload")} == {"int8"}
    before = hub.sent("cdn")
    with open_hub(dtype="int8") as session:
        expected = local_ids(folder, dtype="int8")
        dense = hub.sent("cdn") - before
        assert ids(session) == expected
        assert hub.sent("cdn") - before == dense
        assert session.stats().experts.hub_loads == 0


# Processes


def start(hub: FakeHub, *args: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "switchrun",
        "fill",
        "--model",
        ID,
        "--hub",
        "ranges",
        "--offload-folder",
        "offload",
    ]
    environment = {**os.environ, **hub.environment()}
    return subprocess.Popen([*command, *args], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def kept() -> list[Path]:
    return list(Path("offload").glob("*/fp32/*/*.safetensors"))


def test_two_processes_fetch_dense_weights_once(hub: FakeHub, model: Callable[..., Path]) -> None:
    folder = model()
    hub.add(ID, folder)
    hub.bandwidth = 500_000  # long enough for both to want them
    children = [start(hub, "--format", "raw", TEXTS[0]) for _ in range(2)]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert outputs[0] == outputs[1] != b""
    checkpoint = open_checkpoint(str(folder))
    dense = {(each.offset, each.offset + each.nbytes - 1) for each in checkpoint.dense.values()}
    asked = Counter(each.range for each in hub.requests("cdn", "GET") if each.range in dense)
    assert set(asked) == dense
    assert set(asked.values()) == {1}
    # Of experts, only what both wanted at the same moment may have come twice.
    experts = Counter(each.range for each in hub.requests("cdn", "GET") if each.range not in dense)
    assert max(experts.values()) <= 2
    assert len(kept()) == len(set(kept()))


@pytest.mark.slow
def test_kill_loses_only_what_was_in_flight(hub: FakeHub, model: Callable[..., Path]) -> None:
    hub.add(ID, model())
    # While dense weights are fetched.
    hub.bandwidth = 100_000
    child = start(hub, TEXTS[0])
    journal = lambda: next(Path("offload").glob("*/dense/dense.journal"), None)  # noqa: E731
    wait_until(lambda: journal() and journal().read_bytes().count(b"\n") >= 3)  # type: ignore[union-attr]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    noted = journal().read_bytes().count(b"\n")  # type: ignore[union-attr]
    before = weights_requests(hub)
    # While experts are.
    hub.bandwidth = 400_000
    child = start(hub, TEXTS[0])
    wait_until(lambda: len(kept()) >= 3)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    whole = kept()
    again = [key for key in weights_requests(hub) - before if key in before]
    headers = 4  # asked for at each opening that died before the index was kept
    assert len(again) <= len(before) - noted + headers
    seen = hub.sent("cdn")
    hub.bandwidth = None
    child = start(hub, "--format", "json", TEXTS[0])
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert set(whole) <= set(kept())
    expert_bytes = open_checkpoint(ID, cache_dir=Path("offload/index"), download=False).expert_bytes
    assert hub.sent("cdn") - seen <= (len(kept()) - len(whole)) * 1.01 * expert_bytes


def test_ctrl_c_ends_a_stalled_fill(hub: FakeHub, model: Callable[..., Path]) -> None:
    hub.add(ID, model())
    with open_hub():
        pass
    hub.fail(Fault(after=2000, then="stall"), times=None)
    child = start(hub, TEXTS[0])
    before = len(hub.requests("cdn"))
    wait_until(lambda: len(hub.requests("cdn")) > before)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    asked = time.monotonic()
    child.communicate(timeout=30)
    assert child.returncode == 130
    # A stalled answer is waited for 20 seconds.
    assert time.monotonic() - asked < 5
