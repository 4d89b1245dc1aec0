"""Downloads files of a model into the Hub's local cache, patiently, silently, and so that it can be interrupted."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from switchrun.checkpoint.hub import cache_of, is_cached
from switchrun.checkpoint.index import CONFIG
from switchrun.checkpoint.remote import HubRanges
from switchrun.checkpoint.steps import NO_STEPS, Steps
from switchrun.checkpoint.types import RemoteFile, RemoteRepo
from switchrun.errors import ModelError
from switchrun.machine.disks import free_bytes
from switchrun.units import format_bytes


def download(
    repo: RemoteRepo,
    revision: str | None,
    files: Iterable[RemoteFile],
    ranges: HubRanges,
    steps: Steps = NO_STEPS,
) -> Path:
    """Return a commit's folder in the Hub's local cache, with these files in it, of which missing ones are downloaded.

    `steps` takes the bytes so far and in all, from some thread. Nothing else is said of the progress.

    Raises:
        ModelError: The Hub no longer has the model, or the disk is too small for it.
        NetworkError: The Hub could not be reached.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    folder = cache_of(repo.id) / "snapshots" / repo.commit
    missing = [file for file in files if not (folder / file.name).exists()]
    fetched = [file for file in missing if not is_cached(file)]
    _check_space(repo.id, sum(file.size for file in fetched))
    progress = _Progress(sum(file.size for file in fetched), steps)
    ranges.ask_all({file: partial(_download, file, progress) for file in missing})
    noted = try_to_load_from_cache(repo.id, CONFIG, revision=revision)
    if not isinstance(noted, str) or Path(noted).parent != folder:
        # By the branch and not the commit: huggingface_hub then notes it, which is how it is found offline.
        config = RemoteFile(repo.id, repo.commit, CONFIG, 0, "")
        ranges.ask_all({config: partial(hf_hub_download, repo.id, CONFIG, revision=revision)})
    return folder


def _download(file: RemoteFile, progress: _Progress) -> None:
    from huggingface_hub import hf_hub_download

    known = "tqdm_class" in inspect.signature(hf_hub_download).parameters  # Old versions cannot say how far they are.
    quiet: dict[str, Any] = {"tqdm_class": progress.bar_of(file)} if known else {}
    hf_hub_download(file.repo, file.name, revision=file.commit, **quiet)


class _Progress:
    """Sums up what huggingface_hub would show in bars, none of which is shown."""

    def __init__(self, total: int, steps: Steps) -> None:
        self._total = total
        self._steps = steps
        self._lock = threading.Lock()
        self._done: dict[RemoteFile, int] = {}

    def bar_of(self, file: RemoteFile) -> type:
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        progress = self

        class Bar(tqdm):
            # Else tqdm starts a thread for each class, which would never end.
            monitor_interval = 0

            def __init__(self, *args: Any, **options: Any) -> None:
                # Files that are deduplicated have two; the other one is of bytes on the network.
                self._counts = not str(options.get("name")).endswith(".transfer")
                super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
                self._seen = int(options.get("initial") or 0)

            def update(self, n: float | None = 1) -> None:
                self._seen += int(n or 0)
                if self._counts:
                    progress._add(file, self._seen)

        return Bar

    def _add(self, file: RemoteFile, done: int) -> None:
        with self._lock:
            self._done[file] = min(done, file.size)
            self._steps("download", sum(self._done.values()), self._total)


def _check_space(repo: str, missing: int) -> None:
    from huggingface_hub import constants

    free = free_bytes(Path(constants.HF_HUB_CACHE))
    if missing > free:
        raise ModelError(
            f"{repo} needs another {format_bytes(missing)} on disk; {constants.HF_HUB_CACHE} has {format_bytes(free)}",
            "free some space, or set HF_HOME to a folder on a larger disk",
        )
