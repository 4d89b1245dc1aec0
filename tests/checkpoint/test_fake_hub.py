"""The fake Hub against the real client: what the other tests of the Hub lean on."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import (
    HfApi,
    errors,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)

from tests.support.fake_hub import FakeHub, Fault, environment

REPO = "google/switch-tiny"
WEIGHTS = bytes(range(256)) * 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "notes.txt").write_text("notes")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.use(monkeypatch)
        hub.add(REPO, folder)
        yield hub


def test_the_real_client_reads_a_repository(hub: FakeHub, tmp_path: Path) -> None:
    info = HfApi().model_info(REPO, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    assert sizes == {"config.json": 2, "model.safetensors": len(WEIGHTS), "sub/notes.txt": 5}
    snapshot = Path(snapshot_download(REPO))
    assert snapshot.name == info.sha
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert (snapshot / "sub" / "notes.txt").read_text() == "notes"
    assert hub.sent("cdn") == len(WEIGHTS)
    assert [each.status for each in hub.requests("hub", "HEAD", "model.safetensors")] == [302]


def test_what_a_file_is_comes_with_the_redirect(hub: FakeHub) -> None:
    info = HfApi().model_info(REPO, files_metadata=True)
    hashes = {
        file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id)  # as the redirect names it, too
        for file in info.siblings or ()
    }
    for name, size in (("config.json", 2), ("model.safetensors", len(WEIGHTS))):
        metadata = get_hf_file_metadata(hf_hub_url(REPO, name))
        assert (metadata.size, metadata.etag, metadata.commit_hash) == (size, hashes[name], info.sha)
        assert metadata.location.startswith(hub.cdn if name == "model.safetensors" else hub.endpoint)


def test_branches_tags_commits_and_pull_requests(hub: FakeHub, folder: Path) -> None:
    first = HfApi().model_info(REPO).sha
    (folder / "config.json").write_text('{"later": 1}')
    second = hub.add(REPO, folder, "refs/pr/3", "v2")
    for revision, commit in ((None, first), ("main", first), ("v2", second), ("refs/pr/3", second), (second, second)):
        assert HfApi().model_info(REPO, revision=revision).sha == commit
    assert Path(hf_hub_download(REPO, "config.json", revision="refs/pr/3")).read_text() == '{"later": 1}'


def test_what_may_not_be_seen(hub: FakeHub, folder: Path) -> None:
    hub.add("some/gated", folder, access="gated")
    hub.add("some/private", folder, access="private")
    for repo, raised in (
        ("some/gated", errors.GatedRepoError),
        ("some/private", errors.RepositoryNotFoundError),
        ("some/missing", errors.RepositoryNotFoundError),
    ):
        with pytest.raises(raised):
            HfApi().model_info(repo)
        with pytest.raises(raised):
            get_hf_file_metadata(hf_hub_url(repo, "config.json"), token=False)
    assert HfApi(token=hub.token).model_info("some/private").private
    with pytest.raises(errors.RevisionNotFoundError):
        HfApi().model_info(REPO, revision="nowhere")
    with pytest.raises(errors.RemoteEntryNotFoundError):
        get_hf_file_metadata(hf_hub_url(REPO, "nothing.bin"))


def test_a_download_that_breaks_is_begun_again(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.fail(Fault(after=1000, then="close"))
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
    # The client keeps what it has in pieces of 10 MiB.
    assert [each.sent for each in hub.requests("cdn", "GET")] == [1000, len(WEIGHTS)]


def test_ranges_expiry_and_forged_urls(hub: FakeHub) -> None:
    def ask(url: str, **headers: str) -> tuple[int, bytes]:
        answer = get_session().get(url, headers=headers)
        return answer.status_code, answer.content

    location = get_hf_file_metadata(hf_hub_url(REPO, "model.safetensors")).location
    assert ask(location, Range="bytes=10-19") == (206, WEIGHTS[10:20])
    assert ask(location, Range=f"bytes={len(WEIGHTS)}-") == (416, b"")
    assert ask(location[:-1] + "x")[0] == 403
    hub.expire_urls()
    assert ask(location, Range="bytes=10-19")[0] == 403
    hub.url_seconds = -1
    assert ask(get_hf_file_metadata(hf_hub_url(REPO, "model.safetensors")).location)[0] == 403


def test_a_quota_is_told_and_kept(hub: FakeHub) -> None:
    hub.quota = (2, 60)
    for left in (1, 0):
        answer = get_session().head(hf_hub_url(REPO, "config.json"))
        assert answer.headers["RateLimit"].startswith(f'"resolvers";r={left};t=')
    with pytest.raises(errors.HfHubHTTPError) as raised:
        get_hf_file_metadata(hf_hub_url(REPO, "config.json"))
    assert raised.value.response.status_code == 429
    assert int(raised.value.response.headers["Retry-After"]) > 50


def test_latency_and_bandwidth(hub: FakeHub) -> None:
    url = get_hf_file_metadata(hf_hub_url(REPO, "model.safetensors")).location
    hub.latency_seconds, hub.bandwidth = 0.05, 1e6
    begun = time.monotonic()
    get_session().get(url)
    # A new connection and an answer take a round trip each.
    assert time.monotonic() - begun > 0.1 + 0.25


def test_it_ends_with_a_stalled_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub() as hub:
        hub.use(monkeypatch)
        hub.add(REPO, folder)
        hub.fail(Fault(after=10, then="stall"))
        url = get_hf_file_metadata(hf_hub_url(REPO, "model.safetensors")).location
        failed = threading.Event()

        def read() -> None:
            with pytest.raises(Exception):  # noqa: B017 - whatever the client calls it
                get_session().get(url)
            failed.set()

        threading.Thread(target=read, daemon=True).start()
        while not hub.sent("cdn"):
            time.sleep(0.001)
    assert failed.wait(5)


def test_a_process_of_its_own(folder: Path, tmp_path: Path, hermetic: dict[str, str]) -> None:
    big = folder / "holes.bin"
    with big.open("wb") as file:
        file.truncate(10 << 30)
        file.seek(9 << 30)
        file.write(b"here")
    command = [sys.executable, "-m", "tests.support.fake_hub", f"{REPO}={folder}"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=hermetic)
    assert server.stdout is not None
    origins = server.stdout.readline()
    ask = (
        "from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url\n"
        f"metadata = get_hf_file_metadata(hf_hub_url({REPO!r}, 'holes.bin'))\n"
        "answer = get_session().get(metadata.location, headers={'Range': f'bytes={9 << 30}-{(9 << 30) + 3}'})\n"
        "print(metadata.size, answer.text)"
    )
    variables = {**hermetic, **environment(json.loads(origins)["endpoint"])}
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env=variables)
    assert done.stdout.split() == [str(10 << 30), "here"]
    said, _ = server.communicate(timeout=10)
    seen = json.loads(said)
    assert 0 < seen.pop("seconds") < 10
    assert seen == {"sent": 4, "requests": {"cdn GET": 1, "hub HEAD": 1}}
