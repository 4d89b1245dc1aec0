"""Which way a model of the Hub is opened: it is on this machine, it is downloaded, or its weights stay on the Hub.

What a repository holds is noted beside the indexes, so that a model whose weights stay there opens without the Hub.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from switchrun.checkpoint import hub
from switchrun.checkpoint.download import download
from switchrun.checkpoint.files import parse_json, plausible
from switchrun.checkpoint.index import CONFIG, no_weights
from switchrun.checkpoint.remote import HubClosedError, HubRanges
from switchrun.checkpoint.steps import NO_STEPS, Steps
from switchrun.checkpoint.types import HubWay, RemoteFile, RemoteRepo
from switchrun.errors import ModelError, NetworkError
from switchrun.machine.folders import read_cache_file, write_cache_file

#: `HubWay.AUTO` downloads less than this.
AUTO_BYTES = 1_000_000_000
#: If the Hub does not answer the first question, it is not waited for long.
_ATTEMPTS = 3
_MOST_LISTING_BYTES = 16 << 20
_LISTING_VERSION = 1


def find_model(
    repo: str, revision: str | None, ranges: HubRanges, way: HubWay, listings: Path, steps: Steps = NO_STEPS
) -> tuple[Path, RemoteRepo | None]:
    """Return a model's folder in the Hub's local cache, and the repository if its weights are read from there.

    What is missing in the folder is downloaded. Where all weights are in the local cache, they are used, whichever way.

    Args:
        repo: The Hub id.
        revision: None is `main`.
        ranges: Asks the Hub.
        way: What to do about weights that are missing.
        listings: The folder for what repositories hold.
        steps: Takes what is being done.

    Raises:
        ModelError: The Hub has no such model or revision, or refuses it, or the disk is too small for it.
        NetworkError: The Hub could not be reached, and the model is not in the local cache.
    """
    hub.require_cache(repo)
    steps("ask")
    kept = find_kept(repo, revision, listings)
    listed = _list(repo, revision, ranges, optional=kept is not None)
    if listed is None:
        assert kept is not None
        return kept
    _note(listings, listed)
    missing, weights = _choose(listed, way)
    folder = download(listed, revision, missing, ranges, steps)
    return folder, None if weights else listed


def find_settings(repo: str, revision: str | None, ranges: HubRanges) -> Path:
    """Return the folder of a model's configuration and tokenizer, downloading those; errors are as above."""
    hub.require_cache(repo)
    kept = hub.cached_snapshot(repo, revision)
    listed = _list(repo, revision, ranges, optional=kept is not None)
    if listed is None:
        assert kept is not None
        return kept
    return download(listed, revision, [file for file in listed.files if hub.is_setting(file.name)], ranges)


def _list(repo: str, revision: str | None, ranges: HubRanges, *, optional: bool) -> RemoteRepo | None:
    """Ask what a repository holds; None if there is no answer, and what is on this machine will do without one."""
    try:
        # What is here needs no Hub, which is asked once whether it has something newer.
        return ranges.list_files(repo, revision, attempts=1 if optional else _ATTEMPTS)
    except HubClosedError:
        raise
    except (ModelError, NetworkError):
        if not optional:
            raise
        return None


def find_kept(repo: str, revision: str | None, listings: Path) -> tuple[Path, RemoteRepo | None] | None:
    """Return the same from what is on this machine, without asking the Hub; None if that does not suffice."""
    folder = hub.cached_snapshot(repo, revision)
    if folder is None:
        return None
    listed = _noted(listings, repo, folder.name)
    if listed is None:
        # If some are missing, the index finds that; without any these are files that were read beside weights there.
        return (folder, None) if any(hub.is_weights(path.name) for path in folder.iterdir()) else None
    needed = [file.name for file in _chosen(listed) if not hub.is_setting(file.name)]
    return folder, None if all((folder / name).exists() for name in needed) else listed


def missing_bytes(repo: str, revision: str | None, ranges: HubRanges, way: HubWay) -> int:
    """Return how many bytes `find_model` would download; errors are the same."""
    missing, _ = _choose(ranges.list_files(repo, revision), way)
    return sum(file.size for file in missing if not hub.is_cached(file))


def download_bytes(listed: RemoteRepo, way: HubWay) -> int:
    """Return how many bytes of a listed model would be downloaded in a way; 0 if its weights stay on the Hub."""
    missing, weights = _choose(listed, way)
    return sum(file.size for file in missing if not hub.is_cached(file)) if weights else 0


def _choose(listed: RemoteRepo, way: HubWay) -> tuple[list[RemoteFile], bool]:
    """Return the files that must be in the local cache, and whether weights are among them."""
    chosen = _chosen(listed)
    names = {file.name for file in chosen}
    if CONFIG not in names:
        raise ModelError(f"{listed.id}: there is no {CONFIG}, so this is not a model's repository")
    if not any(map(hub.is_weights, names)):
        raise no_weights(listed.id)
    missing = [file for file in chosen if not hub.is_cached(file)]
    small = way is HubWay.AUTO and sum(file.size for file in missing) < AUTO_BYTES
    if way is HubWay.DOWNLOAD or small or not any(hub.is_weights(file.name) for file in missing):
        return chosen, True
    return [file for file in chosen if not hub.is_weights(file.name)], False


def _chosen(listed: RemoteRepo) -> list[RemoteFile]:
    names = set(hub.choose_files(file.name for file in listed.files))
    return [file for file in listed.files if file.name in names]


# What a repository holds at a commit, as the Hub said.


def _note(listings: Path, listed: RemoteRepo) -> None:
    files = [(file.name, file.size, file.hash) for file in listed.files]
    record = {"version": _LISTING_VERSION, "repo": listed.id, "commit": listed.commit, "files": files}
    text = json.dumps(record, separators=(",", ":")).encode()
    if _noted(listings, listed.id, listed.commit) != listed:
        write_cache_file(_listing(listings, listed.id, listed.commit), text)


def _noted(listings: Path, repo: str, commit: str) -> RemoteRepo | None:
    """Return what was noted; None if there is nothing, or anything in it is wrong."""
    try:
        record = parse_json(read_cache_file(_listing(listings, repo, commit), _MOST_LISTING_BYTES))
        if (record["version"], record["repo"], record["commit"]) != (_LISTING_VERSION, repo, commit):
            return None
        files = tuple(RemoteFile(repo, commit, *file) for file in record["files"])
        return RemoteRepo(repo, commit, files) if all(map(_is_true, files)) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _is_true(file: RemoteFile) -> bool:
    return type(file.name) is type(file.hash) is str and plausible((file.size,))


def _listing(listings: Path, repo: str, commit: str) -> Path:
    name = hashlib.sha256(f"{repo}\0{commit}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return listings / f"{name}.json"
