"""Models on the Hub: which way they are opened, what that asks of it, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from switchrun.checkpoint import hub_ways, open_checkpoint
from switchrun.checkpoint.hub_ways import missing_bytes
from switchrun.checkpoint.locate import NotDownloadedError
from switchrun.checkpoint.remote import HubClosedError, HubRanges, Patience
from switchrun.checkpoint.remote_weights import open_remote
from switchrun.checkpoint.safetensors_file import read_safetensors
from switchrun.checkpoint.steps import Stage, Steps
from switchrun.checkpoint.torch_file import read_torch
from switchrun.checkpoint.types import HubWay, RemoteFile, RemoteRepo, SwitchCheckpoint
from switchrun.errors import CorruptCheckpointError, ModelError, NetworkError
from tests.support import headers
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config
from tests.support.fake_hub import FakeHub, Fault, Origin

REPO = "google/switch-tiny"
PATIENCE = Patience(connect_seconds=5, stall_seconds=2, attempts=3, first_wait_seconds=0.01)
Open = Callable[..., SwitchCheckpoint]


@pytest.fixture(params=["safetensors", "torch"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = random_model(tiny_config())
    return save_checkpoint(model, tmp_path / "served", container=request.param, sharded=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.use(monkeypatch)
        yield hub


@pytest.fixture
def ranges(hub: FakeHub) -> Iterator[HubRanges]:
    with HubRanges(PATIENCE) as ranges:
        yield ranges


@pytest.fixture
def by_range(ranges: HubRanges, tmp_path: Path) -> Open:
    return partial(open_checkpoint, REPO, way=HubWay.RANGES, ranges=ranges, cache_dir=tmp_path / "index")


def forget(hub: FakeHub) -> None:
    hub.log.clear()


def index_of(path: Path) -> Path:
    (found,) = path.glob("*.index.json")
    return found


# What is read.


def test_weights_stay_on_the_hub(hub: FakeHub, ranges: HubRanges, by_range: Open, folder: Path) -> None:
    commit = hub.add(REPO, folder)
    opened, local = by_range(), open_checkpoint(str(folder))
    assert opened.hub == ranges.list_files(REPO)
    assert (opened.id, opened.revision, opened.hub.commit) == (REPO, commit, commit)
    assert opened.experts.keys() == local.experts.keys()
    pairs = [(opened.dense[name], local.dense[name]) for name in local.dense]
    pairs += [pair for key in local.experts for pair in zip(opened.experts[key], local.experts[key], strict=True)]
    for ours, theirs in pairs:
        assert isinstance(ours.file, RemoteFile)
        assert isinstance(theirs.file, Path)
        assert replace(ours, file=theirs.file) == theirs
        assert ours.file.name == theirs.file.name
        with theirs.file.open("rb") as file:
            file.seek(theirs.offset)
            assert ranges.read(ours.file, ours.offset, ours.nbytes) == file.read(theirs.nbytes)
    names = {path.name for path in opened.path.iterdir()}
    assert names == {"config.json", index_of(folder).name}
    assert opened.config == local.config


def test_a_second_open_lists_and_no_more(hub: FakeHub, by_range: Open, folder: Path) -> None:
    hub.add(REPO, folder)
    first = by_range()
    forget(hub)
    second = by_range()
    assert [each.path for each in hub.requests()] == [f"/api/models/{REPO}?blobs=true"]
    assert second.dense == first.dense
    assert dict(second.experts) == dict(first.experts)
    assert second.fingerprint == first.fingerprint


def served(hub: FakeHub, ranges: HubRanges, path: Path) -> RemoteFile:
    hub.add(REPO, path.parent)
    return next(file for file in ranges.list_files(REPO).files if file.name == path.name)


def test_two_requests_for_a_torch_file(hub: FakeHub, ranges: HubRanges, tmp_path: Path) -> None:
    path = tmp_path / "m" / "model.bin"
    path.parent.mkdir()
    torch.save({f"w{i}": torch.zeros(2000 + i) for i in range(100)}, path)
    file = served(hub, ranges, path)
    found = read_torch(open_remote(file, ranges))
    assert {name: replace(tensor, file=path) for name, tensor in found.items()} == headers.read_torch(path)
    size = path.stat().st_size
    assert [each.range for each in hub.requests("cdn")] == [(0, 98_303), (size - 49_152, size - 1)]


@pytest.mark.parametrize(("tensors", "requests"), [(10, 1), (3000, 2)])
def test_a_long_header_is_fetched_once(
    hub: FakeHub, ranges: HubRanges, tmp_path: Path, tensors: int, requests: int
) -> None:
    path = tmp_path / "m" / "model.safetensors"
    path.parent.mkdir()
    save_file({f"weight.{i}": torch.zeros(100) for i in range(tensors)}, path)
    file = served(hub, ranges, path)
    found = read_safetensors(open_remote(file, ranges))
    assert {name: replace(tensor, file=path) for name, tensor in found.items()} == headers.read_safetensors(path)
    assert len(hub.requests("cdn")) == requests
    assert hub.sent("cdn") == max(98_304, 8 + int.from_bytes(path.read_bytes()[:8], "little")) or tensors == 10


# The ways.


@pytest.mark.parametrize(
    ("way", "most", "downloads"),
    [
        (HubWay.AUTO, 1_000_000_000, True),
        (HubWay.AUTO, 1000, False),
        (HubWay.RANGES, 1_000_000_000, False),
        (HubWay.DOWNLOAD, 1000, True),
    ],
)
def test_which_way(
    hub: FakeHub, by_range: Open, folder: Path, monkeypatch: pytest.MonkeyPatch, way: HubWay, most: int, downloads: bool
) -> None:
    monkeypatch.setattr(hub_ways, "AUTO_BYTES", most)
    (folder / "README.md").write_text("hello")
    hub.add(REPO, folder)
    opened = by_range(way=way)
    assert (opened.hub is None) == downloads
    assert len(list(opened.path.iterdir())) == (5 if downloads else 2)
    # What is here whole is used in each way.
    by_range(way=HubWay.DOWNLOAD)
    for each in HubWay:
        forget(hub)
        assert by_range(way=each).hub is None
        assert len(hub.requests()) == 1


def test_a_download_leaves_no_threads(hub: FakeHub, by_range: Open, folder: Path) -> None:
    hub.add(REPO, folder)
    before = set(threading.enumerate())
    by_range(way=HubWay.DOWNLOAD)
    left = {each.name for each in set(threading.enumerate()) - before}
    assert "tqdm_monitor" not in left


def test_progress_of_a_download(
    hub: FakeHub, ranges: HubRanges, by_range: Open, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add(REPO, folder)
    total = sum(path.stat().st_size for path in folder.iterdir())
    small = sum(path.stat().st_size for path in folder.glob("*.json"))
    for way, expected in ((HubWay.DOWNLOAD, total), (HubWay.AUTO, total), (HubWay.RANGES, small)):
        assert missing_bytes(REPO, None, ranges, way) == expected
    stages: list[str] = []
    said: list[tuple[int, int]] = []

    class Noted(Steps):
        def __call__(self, stage: Stage, done: int = 0, total: int = 0) -> None:
            stages.append(stage)
            if stage == "download":
                said.append((done, total))

    by_range(way=HubWay.DOWNLOAD, steps=Noted())
    assert list(dict.fromkeys(stages)) == ["ask", "download", "index"]
    assert said == sorted(said)
    assert said[-1] == (total, total)
    assert {of for _, of in said} == {total}
    assert missing_bytes(REPO, None, ranges, HubWay.DOWNLOAD) == 0
    assert capfd.readouterr() == ("", "")


def test_a_commit_that_leaves_the_weights(
    hub: FakeHub, ranges: HubRanges, by_range: Open, folder: Path, tmp_path: Path
) -> None:
    hub.add(REPO, folder)
    first = by_range()
    (folder / "README.md").write_text("edited")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"expert_capacity": 7}))
    hub.add(REPO, folder)
    forget(hub)
    second = by_range()
    assert second.revision != first.revision
    assert second.config["expert_capacity"] == 7
    assert second.fingerprint == first.fingerprint
    assert not hub.requests("cdn"), "the index is kept by content"
    assert next(iter(second.dense.values())).file.commit == second.revision  # type: ignore[union-attr]
    # The same weights, downloaded, and then with another README.
    third = by_range(way=HubWay.DOWNLOAD)
    assert (third.hub, third.fingerprint) == (None, first.fingerprint)
    (folder / "README.md").write_text("edited again")
    hub.add(REPO, folder)
    assert missing_bytes(REPO, None, ranges, HubWay.DOWNLOAD) == 0
    forget(hub)
    fourth = by_range()
    assert (fourth.hub, fourth.fingerprint) == (None, first.fingerprint)
    assert not hub.requests("cdn")
    # Other weights are another model.
    shard = next(path for path in sorted(folder.iterdir()) if path.suffix != ".json" and path.suffix != ".md")
    shard.write_bytes(shard.read_bytes()[:-1] + b"!") if shard.suffix == ".safetensors" else torch.save(
        {name: tensor + 1 for name, tensor in torch.load(shard).items()}, shard
    )
    hub.add(REPO, folder)
    assert by_range().fingerprint != first.fingerprint


@pytest.mark.parametrize("ref", ["refs/pr/1", "feature/new-head", "v1.0"])
def test_revisions(hub: FakeHub, ranges: HubRanges, by_range: Open, folder: Path, tmp_path: Path, ref: str) -> None:
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "README.md").write_text("other")
    main, other = hub.add(REPO, folder), hub.add(REPO, tmp_path / "other", ref)
    for revision, commit in ((ref, other), (other, other), (main, main), ("main", main)):
        opened = open_checkpoint(f"{REPO}@{revision}", way=HubWay.RANGES, ranges=ranges, cache_dir=tmp_path / "index")
        assert (opened.id, opened.revision) == (REPO, commit)
    by_range()


# Without the Hub.


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("revision", ["", "@refs/pr/1"])
def test_offline(
    hub: FakeHub, ranges: HubRanges, folder: Path, tmp_path: Path, offline: Callable[[], None], revision: str
) -> None:
    hub.add(REPO, folder, *filter(None, [revision[1:]]))
    again = partial(open_checkpoint, REPO + revision, way=HubWay.RANGES, cache_dir=tmp_path / "index")
    with pytest.raises(NotDownloadedError, match=f"{REPO} is not in the Hub's local cache"):
        again(download=False)
    first = again(ranges=ranges)
    offline()
    forget(hub)
    for opened in (again(ranges=ranges), again(), again(download=False)):
        assert opened == replace(first, experts=opened.experts)
        assert dict(opened.experts) == dict(first.experts)
    assert not hub.requests()
    # The listing without the index.
    for path in (tmp_path / "index").iterdir():
        if b'"kinds"' in path.read_bytes():
            path.unlink()
    with pytest.raises(NetworkError, match=f"the index of {REPO} is not on this machine, and HF_HUB_OFFLINE is set"):
        again(ranges=ranges)
    with HubRanges(PATIENCE) as others, pytest.raises(NetworkError, match="is not in the local cache"):
        open_checkpoint("google/other", ranges=others)
    with pytest.raises(NotDownloadedError):
        again(download=False)
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(NetworkError, match=f"{REPO} is not in the local cache, and HF_HUB_OFFLINE is set"):
        again()
    with pytest.raises(NotDownloadedError):
        again(download=False)
    assert not hub.requests()


def test_the_hub_goes_away(hub: FakeHub, by_range: Open, folder: Path) -> None:
    hub.add(REPO, folder)
    first = by_range()
    hub.close()
    start = time.monotonic()
    assert by_range().fingerprint == first.fingerprint
    assert time.monotonic() - start < 1
    with pytest.raises(NetworkError, match="the Hub could not be reached"):
        by_range_of(by_range, "google/other")


def by_range_of(by_range: Open, model: str) -> SwitchCheckpoint:
    return partial(by_range.func, model, **by_range.keywords)()  # type: ignore[attr-defined]


@pytest.mark.parametrize("damage", ["cut", "repo", "size", "short", "name", "list", "link"])
def test_a_damaged_listing_counts_as_absent(
    hub: FakeHub, by_range: Open, folder: Path, tmp_path: Path, offline: Callable[[], None], damage: str
) -> None:
    hub.add(REPO, folder)
    by_range()
    (listing,) = (path for path in (tmp_path / "index").iterdir() if b'"repo"' in path.read_bytes())
    record = json.loads(listing.read_text())
    if damage == "cut":
        listing.write_bytes(listing.read_bytes()[:-3])
    elif damage == "link":
        listing.rename(tmp_path / "elsewhere")
        listing.symlink_to(tmp_path / "elsewhere")
    else:
        if damage == "repo":
            record["repo"] = "google/other"
        elif damage == "list":
            record = [record]
        else:
            record["files"][0] = {"size": ["a", -1, "b"], "short": ["a", 1], "name": [1, 1, "b"]}[damage]
        listing.write_text(json.dumps(record))
    offline()
    with pytest.raises(NetworkError, match="is not in the local cache, and HF_HUB_OFFLINE is set"):
        by_range()


# Faults.


BROKEN_BODIES = [Fault(after=1000), Fault(after=1000, then="close"), Fault(after=1000, then="stall")]
BROKEN_ANSWERS = [
    Fault(silent=True),
    Fault(status=500),
    Fault(status=408),
    Fault(status=429, headers={"Retry-After": "0"}),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("origin", "method", "fault"),
    # A HEAD has no body. Where huggingface_hub itself downloads, a stall is waited for by its own time limit.
    [("cdn", "GET", fault) for fault in BROKEN_BODIES + BROKEN_ANSWERS]
    + [("hub", "HEAD", fault) for fault in BROKEN_ANSWERS]
    + [("hub", "GET", fault) for fault in BROKEN_BODIES[:2] + BROKEN_ANSWERS],
)
def test_faults_that_pass(
    hub: FakeHub, ranges: HubRanges, by_range: Open, folder: Path, fault: Fault, origin: Origin, method: str
) -> None:
    hub.add(REPO, folder)
    hub.fail(fault, origin=origin, method=method, path="" if origin == "cdn" else "resolve")
    assert by_range().fingerprint
    assert ranges.traffic.retries <= 2


def test_a_signed_url_that_expired(hub: FakeHub, ranges: HubRanges, by_range: Open, folder: Path) -> None:
    hub.add(REPO, folder)
    hub.fail(Fault(status=403, body=b"expired"))
    by_range()
    assert ranges.traffic.retries == 1
    hub.fail(Fault(status=403, body=b"never"), times=None)
    shutil.rmtree(by_range.keywords["cache_dir"])  # type: ignore[attr-defined]
    with pytest.raises(NetworkError, match="storage refused: 403 Forbidden: never"):
        by_range()


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("google/none", ModelError, "no model of that name on the Hub"),
        (f"{REPO}@v9", ModelError, f"{REPO} has no revision 'v9' on the Hub"),
        ("google/gated", ModelError, "google/gated is gated on the Hub"),
        ("google/private", ModelError, "no model of that name on the Hub"),
    ],
)
def test_what_the_hub_refuses(
    hub: FakeHub, by_range: Open, folder: Path, model: str, kind: type[Exception], message: str
) -> None:
    hub.add(REPO, folder)
    hub.add("google/gated", folder, access="gated")
    hub.add("google/private", folder, access="private")
    with pytest.raises(kind, match=message):
        by_range_of(by_range, model)


@pytest.mark.parametrize("way", list(HubWay))
def test_repositories_that_are_no_model(hub: FakeHub, by_range: Open, tmp_path: Path, way: HubWay) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / ".gitattributes").write_text("")
    hub.add(REPO, folder)
    with pytest.raises(ModelError, match=rf"{REPO}: there is no config\.json"):
        by_range(way=way)
    (folder / "config.json").write_text("{}")
    hub.add(REPO, folder)
    with pytest.raises(ModelError, match=f"{REPO}: there are no weights"):
        by_range(way=way)


def test_a_pointer_in_the_place_of_weights(hub: FakeHub, by_range: Open, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    hub.add(REPO, folder)
    with pytest.raises(CorruptCheckpointError, match=f"{REPO}/model.safetensors: this is a Git LFS pointer"):
        by_range()
    (folder / "model.safetensors").write_bytes(b"")
    hub.add(REPO, folder)


def test_a_shard_that_is_not_there(hub: FakeHub, by_range: Open, folder: Path) -> None:
    lost = sorted(path for path in folder.iterdir() if "00002" in path.name)[0]
    lost.unlink()
    hub.add(REPO, folder)
    with pytest.raises(CorruptCheckpointError, match=f"{REPO}/{lost.name}: the file is missing; .* names 3 files"):
        by_range()
    assert not hub.requests("cdn")


@pytest.mark.parametrize("change", [1, -1])
def test_a_listing_that_lies(
    hub: FakeHub, by_range: Open, folder: Path, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    hub.add(REPO, folder)
    listed = HubRanges.list_files

    def lies(self: HubRanges, *args: object, **options: object) -> RemoteRepo:
        repo = listed(self, *args, **options)  # type: ignore[arg-type]
        return replace(repo, files=tuple(replace(file, size=file.size + change) for file in repo.files))

    monkeypatch.setattr(HubRanges, "list_files", lies)
    with pytest.raises(CorruptCheckpointError, match="is not the one that commit"):
        by_range()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", b"\x02" + bytes(7) + b"[]"),
        ("model.safetensors", (200).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", b""),
        ("pytorch_model.bin", b"PK\x03\x04" + bytes(200)),
        ("pytorch_model.bin", b"\x80\x02}."),
    ],
)
def test_malformed_headers_give_the_same_errors(
    hub: FakeHub, by_range: Open, tmp_path: Path, name: str, data: bytes
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(data)
    hub.add(REPO, folder)
    with pytest.raises(CorruptCheckpointError) as local:
        open_checkpoint(str(folder))
    with pytest.raises(CorruptCheckpointError) as remote:
        by_range()
    assert remote.value.message == local.value.message.replace(str(folder.resolve()), REPO)


def test_no_room(hub: FakeHub, by_range: Open, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(ModelError, match=f"{REPO} needs another .* on disk"):
        by_range(way=HubWay.DOWNLOAD)
    monkeypatch.undo()


def test_a_cache_that_cannot_be_written(hub: FakeHub, by_range: Open, folder: Path) -> None:
    hub.add(REPO, folder)
    home = Path(os.environ["HF_HOME"])
    home.mkdir(parents=True)
    (home / "hub").write_text("no folder")
    with pytest.raises(ModelError, match="cannot be stored in the Hub's local cache"):
        by_range()


@pytest.mark.parametrize("what", ["headers", "download", "listing"])
def test_an_interrupt_ends_it_at_once(hub: FakeHub, folder: Path, tmp_path: Path, what: str) -> None:
    hub.add(REPO, folder)
    path = {"headers": "", "download": "resolve", "listing": "/api/"}[what]
    hub.fail(Fault(silent=True, then="stall"), origin="cdn" if what == "headers" else "hub", path=path, times=None)
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    with HubRanges() as ranges:
        timer.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            open_checkpoint(REPO, way=HubWay.RANGES, ranges=ranges, cache_dir=tmp_path / "index")
        assert time.monotonic() - start < 5
        if what == "headers":
            with pytest.raises(HubClosedError):
                ranges.list_files(REPO)
