"""Ranges of files on the Hub: which bytes come, by which requests, and what every fault costs."""

from __future__ import annotations

import json
import os
import random
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants

from switchrun.checkpoint import remote
from switchrun.checkpoint.hub import ask_hub
from switchrun.checkpoint.remote import HubClosedError, HubRanges, Patience, Traffic
from switchrun.checkpoint.types import RemoteFile
from switchrun.errors import CorruptCheckpointError, ModelError, NetworkError
from tests.support.fake_hub import FakeHub, Fault

REPO = "google/switch-tiny"
WEIGHTS = random.Random(0).randbytes(300_000)
SMALL = b'{"d_model": 16}'
#: Three attempts, and hardly any time between them. But an answer may take a second: many tests share few cores.
PATIENCE = Patience(connect_seconds=5, stall_seconds=2, attempts=3, first_wait_seconds=0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "config.json").write_bytes(SMALL)
    (folder / "weights.bin").write_bytes(WEIGHTS)
    return folder


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.use(monkeypatch)
        hub.add(REPO, folder)
        yield hub


@pytest.fixture
def ranges(hub: FakeHub) -> Iterator[HubRanges]:
    with HubRanges(PATIENCE) as ranges:
        yield ranges


@pytest.fixture
def weights(ranges: HubRanges) -> RemoteFile:
    return file_of(ranges, "weights.bin")


def file_of(ranges: HubRanges, name: str, repo: str = REPO) -> RemoteFile:
    return next(file for file in ranges.list_files(repo).files if file.name == name)


def asked(hub: FakeHub) -> list[tuple[int, int] | None]:
    """The ranges that the storage was asked for."""
    return [each.range for each in hub.requests("cdn")]


# What it reads.


def test_it_lists_a_repository_at_a_commit(hub: FakeHub, ranges: HubRanges, folder: Path) -> None:
    listed = ranges.list_files(REPO)
    assert [(file.name, file.size) for file in listed.files] == [("config.json", 15), ("weights.bin", 300_000)]
    assert {(file.repo, file.commit) for file in listed.files} == {(REPO, listed.commit)}
    assert listed.id == REPO
    assert str(listed.files[1]) == f"{REPO}/weights.bin"
    # A pull request's file that was not touched has another commit and the same hash.
    (folder / "config.json").write_text("{}")
    commit = hub.add(REPO, folder, "refs/pr/3")
    other = ranges.list_files(REPO, "refs/pr/3")
    assert other.commit == commit != listed.commit
    assert other.files[1] == replace(listed.files[1], commit=commit)
    assert other.files[0].hash != listed.files[0].hash
    assert ranges.list_files(REPO, commit) == other


def test_a_file_is_resolved_once_and_read_by_range(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    assert ranges.read(weights, 1000, 50) == WEIGHTS[1000:1050]
    into = bytearray(300_000)
    ranges.read_into(weights, 0, memoryview(into))
    assert into == WEIGHTS
    assert ranges.read(weights, 299_999, 1) == WEIGHTS[-1:]
    assert ranges.read(weights, 300_000, 0) == b""
    assert asked(hub) == [(1000, 1049), (0, 299_999), (299_999, 299_999)]
    assert len(hub.requests("hub", "HEAD")) == 1
    assert hub.sent("cdn") == 300_051
    traffic = ranges.traffic
    assert replace(traffic, seconds=0) == Traffic(bytes=300_051, requests=3, resolves=2)
    assert traffic.seconds > 0


def test_memory_of_any_item_size_is_filled(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    into = torch.zeros(4, 100, dtype=torch.int16)
    ranges.read_into(weights, 8, memoryview(into.numpy()))
    assert into.numpy().tobytes() == WEIGHTS[8:808]


def test_a_small_file_comes_from_the_hub_itself(hub: FakeHub, ranges: HubRanges) -> None:
    config = file_of(ranges, "config.json")
    assert ranges.read(config, 2, 7) == SMALL[2:9]
    # A server that sends a small file whole, because it was asked for whole, is fine too.
    hub.fail(Fault(whole=True), origin="hub", method="GET")
    assert ranges.read(config, 0, len(SMALL)) == SMALL
    assert not hub.requests("cdn")


def test_nothing_is_compressed_on_the_way(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    hub.compresses = True
    assert ranges.read(weights, 1000, 50) == WEIGHTS[1000:1050]


def test_many_threads_share_one_url(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    hub.latency_seconds = 0.02
    with ThreadPoolExecutor(8) as pool:
        pieces = list(pool.map(lambda at: ranges.read(weights, at, 10_000), range(0, 300_000, 10_000)))
    assert b"".join(pieces) == WEIGHTS
    assert len(hub.requests("hub", "HEAD")) == 1
    assert sorted(each for each in asked(hub) if each) == [(at, at + 9999) for at in range(0, 300_000, 10_000)]
    assert hub.sent("cdn") == 300_000


def test_the_token_goes_to_the_hub_alone(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.add("some/private", folder, access="private")
    with HubRanges(PATIENCE) as ranges:
        assert ranges.read(file_of(ranges, "weights.bin", "some/private"), 0, 9) == WEIGHTS[:9]
        assert ranges.read(file_of(ranges, "config.json", "some/private"), 0, 9) == SMALL[:9]
    assert {each.authorized for each in hub.requests("hub")} == {True}
    assert [each.authorized for each in hub.requests("cdn")] == [False]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_mirror_may_redirect(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    # With the other name it is another origin, which says nothing about the file.
    mirror = hub.endpoint.replace("127.0.0.1", host) + "/mirror"
    hub.use(monkeypatch, endpoint=mirror)
    monkeypatch.setenv("HF_TOKEN", "a token for the mirror")
    with HubRanges(PATIENCE) as ranges:
        assert ranges.read(file_of(ranges, "weights.bin"), 5, 9) == WEIGHTS[5:14]
    redirected = [each for each in hub.requests("hub") if "/resolve/" in each.path and "mirror" not in each.path]
    assert [each.authorized for each in redirected] == [host == "127.0.0.1"]
    assert [each.authorized for each in hub.requests("cdn")] == [False]


# What breaks and is gone on with.


@pytest.mark.parametrize("then", ["reset", "close", "stall"])
@pytest.mark.parametrize("after", [0, 100_000])
def test_it_goes_on_at_the_byte_reached(
    hub: FakeHub, ranges: HubRanges, weights: RemoteFile, then: str, after: int
) -> None:
    hub.fail(Fault(after=after, then=then))  # type: ignore[arg-type]
    assert ranges.read(weights, 1000, 200_000) == WEIGHTS[1000:201_000]
    first, second = asked(hub)
    assert first == (1000, 200_999)
    assert second is not None
    # A reset may overtake what was sent before it.
    assert second[0] == 1000 + after if then != "reset" else second[0] <= 1000 + after
    assert second[1] == 200_999
    assert (ranges.traffic.requests, ranges.traffic.retries, ranges.traffic.bytes) == (2, 1, 200_000)


@pytest.mark.parametrize("then", ["reset", "close", "stall"])
def test_no_answer_at_all_is_tried_again(hub: FakeHub, ranges: HubRanges, weights: RemoteFile, then: str) -> None:
    hub.fail(Fault(silent=True, then=then))  # type: ignore[arg-type]
    assert ranges.read(weights, 0, 10) == WEIGHTS[:10]
    assert asked(hub) == [(0, 9), (0, 9)]
    hub.fail(Fault(silent=True, then=then), origin="hub", method="HEAD")  # type: ignore[arg-type]
    hub.expire_urls()
    assert ranges.read(weights, 0, 10) == WEIGHTS[:10]


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
@pytest.mark.parametrize("origin", ["hub", "cdn"])
def test_passing_statuses_are_tried_again(
    hub: FakeHub, ranges: HubRanges, weights: RemoteFile, status: int, origin: str
) -> None:
    hub.fail(Fault(status=status, body=b"sorry"), origin=origin, times=2)  # type: ignore[arg-type]
    assert ranges.read(weights, 0, 10) == WEIGHTS[:10]
    assert len(hub.requests("hub", "HEAD")) == (3 if origin == "hub" else 1)
    assert len(asked(hub)) == (3 if origin == "cdn" else 1)
    assert (ranges.traffic.retries, ranges.traffic.bytes) == (2, 10)


def test_progress_renews_the_patience(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    hub.fail(Fault(after=100, then="close"), times=9)
    assert ranges.read(weights, 0, 1000) == WEIGHTS[:1000]
    assert asked(hub) == [(at, 999) for at in range(0, 1000, 100)]
    assert ranges.traffic.retries == 9


@pytest.mark.parametrize("fault", [Fault(after=0), Fault(status=503), Fault(silent=True, then="close")])
def test_patience_ends(hub: FakeHub, ranges: HubRanges, weights: RemoteFile, fault: Fault) -> None:
    hub.fail(fault, times=None)
    with pytest.raises(NetworkError, match=r"weights\.bin: the Hub could not be reached: ") as raised:
        ranges.read(weights, 0, 10)
    assert raised.value.exit_code == 8
    assert len(asked(hub)) == PATIENCE.attempts
    # Later it is there again.
    hub.heal()
    assert ranges.read(weights, 0, 10) == WEIGHTS[:10]


def test_an_unreachable_hub_fails_each_that_waits_for_it(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    hub.fail(Fault(status=503), origin="hub", times=None)
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(ranges.read, weights, 0, 10) for _ in range(4)]
        for each in reads:
            with pytest.raises(NetworkError, match="503 Service Unavailable"):
                each.result()
    # Together, as far as they came at once.
    assert len(hub.requests("hub", "HEAD")) % PATIENCE.attempts == 0
    hub.heal()
    assert ranges.read(weights, 0, 10) == WEIGHTS[:10]


def test_nobody_there(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.use(monkeypatch, endpoint="http://127.0.0.1:9")
    with HubRanges(PATIENCE) as ranges, pytest.raises(NetworkError, match="could not be reached"):
        ranges.read(RemoteFile("a/b", "c" * 40, "weights.bin", 10, "hash"), 0, 10)


def test_the_shared_client_may_be_closed_by_others(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    # As huggingface_hub does after any failed connection.
    hub.bandwidth = 1e6
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(ranges.read, weights, 0, 300_000)
        while ranges.traffic.bytes < 100_000:
            time.sleep(0.001)
        close_session()
        assert read.result() == WEIGHTS
    assert ranges.traffic.bytes == 300_000


# Signed URLs.


def test_an_expired_url_is_renewed_once_by_one_thread(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    ranges.read(weights, 0, 1)
    hub.expire_urls()
    hub.latency_seconds = 0.02
    with ThreadPoolExecutor(8) as pool:
        pieces = list(pool.map(lambda at: ranges.read(weights, at, 10_000), range(0, 80_000, 10_000)))
    assert b"".join(pieces) == WEIGHTS[:80_000]
    assert len(hub.requests("hub", "HEAD")) == 2
    statuses = [each.status for each in hub.requests("cdn")]
    assert statuses.count(206) == 1 + 8
    assert statuses.count(403) == ranges.traffic.retries <= 8


def test_not_every_refusal_is_an_expired_url(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    hub.fail(Fault(status=403, body=b"<Error>Your country\x1b[31m is blocked</Error>"), times=None)
    with pytest.raises(NetworkError, match=r"refused: 403 Forbidden: <Error>Your country\\x1b\[31m is blocked"):
        ranges.read(weights, 0, 10)
    assert len(asked(hub)) == 2
    assert len(hub.requests("hub", "HEAD")) == 2


def test_a_refusal_that_comes_slowly_is_not_waited_for(
    hub: FakeHub, ranges: HubRanges, weights: RemoteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_EXCERPT_SECONDS", 0.1)
    hub.bandwidth = 100
    hub.fail(Fault(status=403, body=b"no" * 1000), times=None)
    begun = time.monotonic()
    with pytest.raises(NetworkError, match="refused: 403 Forbidden: nono"):
        ranges.read(weights, 0, 10)
    assert time.monotonic() - begun < 5


def test_urls_may_expire_more_than_once_in_a_read(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    for _ in range(3):
        hub.fail(Fault(status=403))
        hub.fail(Fault(after=100, then="close"))
    assert ranges.read(weights, 0, 1000) == WEIGHTS[:1000]
    assert len(hub.requests("hub", "HEAD")) == 4


# The rate limit.


def test_it_waits_as_it_is_told_and_says_so(hub: FakeHub) -> None:
    waits: list[float] = []
    with HubRanges(PATIENCE, waits.append) as ranges:
        weights = file_of(ranges, "weights.bin")
        hub.fail(Fault(status=429, headers={"Retry-After": "1"}), origin="hub")
        begun = time.monotonic()
        assert ranges.read(weights, 0, 10) == WEIGHTS[:10]
        assert time.monotonic() - begun >= 1
    assert waits == [1]


def test_a_long_wait_is_said_whatever_the_reason(hub: FakeHub) -> None:
    waits: list[float] = []
    patience = replace(PATIENCE, longest_wait_seconds=0.5)
    with HubRanges(patience, waits.append) as ranges:
        weights = file_of(ranges, "weights.bin")
        hub.fail(Fault(status=503, headers={"Retry-After": "1"}))
        assert ranges.read(weights, 0, 10) == WEIGHTS[:10]
    assert waits == [1]


def test_all_threads_wait_together(hub: FakeHub, folder: Path) -> None:
    for i in range(4):
        (folder / f"{i}.bin").write_bytes(b"%d" % i)
    hub.add(REPO, folder)
    hub.quota = (2, 1.0)
    waits: list[float] = []
    with HubRanges(PATIENCE, waits.append) as ranges:
        files = [file_of(ranges, f"{i}.bin") for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda file: ranges.read(file, 0, 1), files)) == [b"0", b"1", b"2", b"3"]
    assert len(waits) == 1
    heads = hub.requests("hub", "HEAD")
    assert [each.status for each in heads].count(302) == 4
    assert len(heads) <= 6


def test_a_limit_that_is_reached_holds_for_all_files(hub: FakeHub, ranges: HubRanges) -> None:
    config, weights = ranges.list_files(REPO).files
    hub.fail(Fault(status=429, headers={"Retry-After": "1"}), origin="hub")
    with ThreadPoolExecutor(1) as pool:
        limited = pool.submit(ranges.read, weights, 0, 10)
        while not ranges.traffic.retries:
            time.sleep(0.001)
        begun = time.monotonic()
        assert ranges.read(config, 0, 10) == SMALL[:10]
        assert time.monotonic() - begun > 0.5
        assert limited.result() == WEIGHTS[:10]
    assert len(hub.requests("hub", "HEAD")) == 3


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "7", "RateLimit": '"resolvers";r=0;t=9'}, 7),
        ({"RateLimit": '"resolvers";r=0;t=9'}, 9),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "9" * 400}, 3600),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, 3600),
        ({"RateLimit": "r=0;t=" + "9" * 400}, 3600),
        ({}, None),
    ],
)
def test_what_a_server_says_about_waiting(headers: dict[str, str], seconds: float | None) -> None:
    assert remote._told_wait(headers) == seconds


def test_waits_grow_to_the_longest() -> None:
    assert [Patience().wait(failures) for failures in range(1, 7)] == [0.5, 1, 2, 4, 8, 8]


# What stays as it is.


def test_a_server_that_ignores_ranges_is_refused_unread(hub: FakeHub, ranges: HubRanges, folder: Path) -> None:
    with (folder / "large.bin").open("wb") as file:
        file.truncate(2 << 30)
    hub.add(REPO, folder)
    large = file_of(ranges, "large.bin")
    hub.fail(Fault(whole=True))
    with pytest.raises(NetworkError, match="does not send the range"):
        ranges.read(large, 100, 10)
    assert len(asked(hub)) == 1
    assert ranges.traffic.bytes == 0
    # What lies in the buffers of a connection.
    assert hub.sent("cdn") < 64 << 20


def test_other_ranges_are_refused(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    for fault in (Fault(shift=1), Fault(status=206, body=b"0123456789")):
        hub.fail(fault)
        with pytest.raises(NetworkError, match="does not send the range"):
            ranges.read(weights, 100, 10)
    long = {"Content-Range": "bytes 100-109/300000"}
    hub.fail(Fault(status=206, headers=long, body=b"0123456789abc"))
    with pytest.raises(NetworkError, match="more than was asked for"):
        ranges.read(weights, 100, 10)
    hub.fail(Fault(status=206, headers={**long, "Content-Encoding": "gzip"}, body=b"0123456789"))
    with pytest.raises(NetworkError, match="compressed"):
        ranges.read(weights, 100, 10)
    assert ranges.traffic.retries == 0


def test_a_short_answer_is_gone_on_with(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    headers = {"Content-Range": "bytes 100-109/300000"}
    hub.fail(Fault(status=206, headers=headers, body=WEIGHTS[100:104]))
    assert ranges.read(weights, 100, 10) == WEIGHTS[100:110]
    assert asked(hub) == [(100, 109), (104, 109)]


def test_content_that_changed_under_its_commit(hub: FakeHub, ranges: HubRanges, folder: Path, tmp_path: Path) -> None:
    weights = file_of(ranges, "weights.bin")
    other = tmp_path / "other"
    for content in (WEIGHTS[:-1] + b"x", WEIGHTS[:-1]):
        other.write_bytes(content)
        hub.replace(REPO, "weights.bin", other)
        with pytest.raises(CorruptCheckpointError, match="size or hash differs") as raised:
            ranges.read(weights, 0, 10)
        assert raised.value.exit_code == 7
    assert not hub.requests("cdn")
    hub.replace(REPO, "weights.bin", folder / "weights.bin")
    for fault in (
        Fault(status=206, headers={"Content-Range": "bytes 0-9/299999"}, body=b"0123456789"),
        Fault(status=416),
    ):
        hub.fail(fault)
        with pytest.raises(CorruptCheckpointError, match="size or hash differs"):
            ranges.read(weights, 0, 10)
    assert ranges.traffic.bytes == 0


def test_what_lies_beyond_the_end(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    for offset, length in ((299_999, 2), (-1, 1), (1 << 70, 1)):
        with pytest.raises(CorruptCheckpointError, match="truncated"):
            ranges.read(weights, offset, length)
    assert not hub.requests("cdn")


def test_refusals_are_in_the_words_of_a_download(
    hub: FakeHub, ranges: HubRanges, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("some/gated", folder, access="gated")
    hub.add("some/private", folder, access="private")
    for repo, revision in (("some/gated", None), ("some/private", None), ("some/none", None), (REPO, "nowhere")):
        with pytest.raises(ModelError) as downloading:
            ask_hub(repo, revision, 5)
        with pytest.raises(ModelError) as listing:
            ranges.list_files(repo, revision)
        with pytest.raises(ModelError) as reading:
            ranges.read(RemoteFile(repo, revision or "main", "weights.bin", 10, "hash"), 0, 1)
        assert str(downloading.value) == str(listing.value) == str(reading.value)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ModelError, match="gated"):
        ranges.list_files("some/gated")
    assert ranges.traffic.retries == 0


SOUND = {"id": "a/b", "sha": "a" * 40, "siblings": [{"rfilename": "x.bin", "size": 1, "blobId": "b" * 40}]}


@pytest.mark.parametrize(
    ("listed", "of_file", "words"),
    [
        ({"sha": None}, {}, "without its commit"),
        ({"sha": 5}, {}, "without its commit"),
        ({"sha": "../../../x"}, {}, "without its commit"),
        ({}, {"rfilename": 7}, "what is no name"),
        ({}, {"rfilename": "x\0.bin"}, "what is no name"),
        ({}, {"rfilename": "\ud800.bin"}, "what is no name"),
        ({}, {"size": "1"}, "without its size or hash"),
        ({}, {"size": -1}, "without its size or hash"),
        ({}, {"size": 10**30}, "without its size or hash"),
        ({}, {"blobId": 5}, "without its size or hash"),
        ({}, {"blobId": "../../x"}, "without its size or hash"),
    ],
)
def test_listings_that_make_no_sense(
    hub: FakeHub, ranges: HubRanges, listed: dict[str, object], of_file: dict[str, object], words: str
) -> None:
    (file,) = SOUND["siblings"]
    answer = {**SOUND, "siblings": [{**file, **of_file}], **listed}  # type: ignore[dict-item]
    headers = {"Content-Type": "application/json"}
    hub.fail(Fault(status=200, headers=headers, body=json.dumps(answer).encode()), origin="hub")
    with pytest.raises(NetworkError, match=words):
        ranges.list_files("a/b")


def test_other_refusals_of_the_hub(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    with pytest.raises(CorruptCheckpointError, match="gone from the Hub"):
        ranges.read(replace(weights, name="none.bin"), 0, 1)
    hub.fail(
        Fault(status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"}), origin="hub"
    )
    with pytest.raises(NetworkError, match="Invalid credentials"):
        ranges.read(weights, 0, 1)
    with pytest.raises(ModelError, match="no such names"):
        ranges.list_files("a--b/c..d")
    hub.fail(
        Fault(
            status=200,
            headers={"Content-Type": "application/json"},
            body=b'{"id": "a/b", "sha": "%s", "siblings": [{"rfilename": "x.bin"}]}' % (b"a" * 40),
        ),
        origin="hub",
    )
    with pytest.raises(NetworkError, match=r"lists x\.bin without its size"):
        ranges.list_files(REPO)
    assert ranges.traffic.retries == 0


def test_a_certificate_that_is_not_trusted_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        try:
            raise ssl.SSLCertVerificationError("self-signed certificate")
        except ssl.SSLError as error:
            raise RuntimeError(str(error)) from error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: refuse())
    with HubRanges(Patience(first_wait_seconds=60)) as ranges, pytest.raises(NetworkError, match="self-signed"):
        ranges.list_files(REPO)


def test_offline_nothing_is_asked(
    hub: FakeHub, ranges: HubRanges, weights: RemoteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges.read(weights, 0, 1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.log)
    for ask in (
        lambda: ranges.read(weights, 0, 1),
        lambda: ranges.read(replace(weights, name="config.json"), 0, 1),
        lambda: ranges.list_files(REPO),
    ):
        with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set"):
            ask()
    assert len(hub.log) == before
    assert ranges.traffic.retries == 0


# Closing.


def _closed_while(ranges: HubRanges, read: Callable[[], object], until: Callable[[], bool]) -> float:
    """Close while `read` blocks, and return the seconds until it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            read()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not until() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert thread.is_alive()
    begun = time.monotonic()
    ranges.close()
    assert time.monotonic() - begun < 5
    thread.join(10)
    assert [type(error) for error in raised] == [HubClosedError]
    return time.monotonic() - begun


@pytest.mark.parametrize(
    ("fault", "origin"),
    [
        (Fault(after=100, then="stall"), "cdn"),
        (Fault(silent=True, then="stall"), "cdn"),
        (Fault(silent=True, then="stall"), "hub"),
        (Fault(status=429, headers={"Retry-After": "300"}), "cdn"),
        (Fault(status=429, headers={"Retry-After": "300"}), "hub"),
        (Fault(status=503, headers={"Retry-After": "300"}), "cdn"),
        (Fault(status=403, body=bytes(100), after=10, then="stall"), "cdn"),
    ],
)
def test_closing_ends_whatever_blocks(hub: FakeHub, fault: Fault, origin: str) -> None:
    with HubRanges(Patience(stall_seconds=60)) as ranges:
        weights = file_of(ranges, "weights.bin")
        hub.fail(fault, origin=origin)  # type: ignore[arg-type]
        before = len(hub.log)
        seconds = _closed_while(
            ranges,
            lambda: ranges.read(weights, 0, 1000),
            lambda: any(each.origin == origin for each in hub.log[before:]),
        )
        assert seconds < 10
        with pytest.raises(HubClosedError):
            ranges.read(weights, 0, 1)
        with pytest.raises(HubClosedError):
            ranges.list_files(REPO)


def test_closing_ends_reads_that_make_progress(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    hub.bandwidth = 10_000
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(ranges.read, weights, at, 30_000) for at in range(0, 240_000, 30_000)]
        while ranges.traffic.bytes < 1000:
            time.sleep(0.001)
        begun = time.monotonic()
        ranges.close()
        for each in reads:
            with pytest.raises(HubClosedError):
                each.result()
    assert time.monotonic() - begun < 3
    # The threads that asked have ended, too.
    deadline = time.monotonic() + 10
    while any(each.name == "switchrun-hub" for each in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [each for each in threading.enumerate() if each.name == "switchrun-hub"]


@pytest.mark.parametrize("fault", [Fault(after=100, then="stall"), Fault(silent=True, then="stall")])
def test_ctrl_c_ends_a_read_of_the_main_thread(hub: FakeHub, fault: Fault) -> None:
    with HubRanges(Patience(stall_seconds=60)) as ranges:
        weights = file_of(ranges, "weights.bin")
        hub.fail(fault)

        def interrupt() -> None:
            while not asked(hub):
                time.sleep(0.001)
            time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ranges.read(weights, 0, 1000)
        assert time.monotonic() - begun < 10
        assert ranges.read(weights, 0, 1000) == WEIGHTS[:1000]


def test_others_go_on_when_one_is_closed(hub: FakeHub, ranges: HubRanges, weights: RemoteFile) -> None:
    hub.bandwidth = 1e6
    with HubRanges(PATIENCE) as other, ThreadPoolExecutor(2) as pool:
        read = pool.submit(other.read, weights, 0, 200_000)
        ended = pool.submit(ranges.read, weights, 0, 200_000)
        while ranges.traffic.bytes < 1000:
            time.sleep(0.001)
        ranges.close()
        with pytest.raises(HubClosedError):
            ended.result()
        assert read.result() == WEIGHTS[:200_000]


def test_silence_is_said_once(hub: FakeHub, weights: RemoteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SILENT_SECONDS", 1)
    said: list[str] = []
    patience = Patience(stall_seconds=2, attempts=4, first_wait_seconds=0.01)
    with HubRanges(patience, on_silence=said.append) as ranges:
        hub.fail(Fault(after=100), times=1)
        ranges.read(weights, 0, 1000)
        assert said == []  # a connection that breaks is gone on with
        time.sleep(1.1)
        hub.fail(Fault(after=100), times=1)
        ranges.read(weights, 0, 1000)
        assert said == []  # nobody waited meanwhile
        hub.fail(Fault(after=0, then="stall"), times=1)
        ranges.read(weights, 0, 1000)
        assert len(said) == 1
