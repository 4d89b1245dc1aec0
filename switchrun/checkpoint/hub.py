"""Checkpoints on the Hugging Face Hub: from its local cache, or downloaded into it.

`huggingface_hub` reads HF_HOME, HF_TOKEN and HF_HUB_OFFLINE itself; it is imported only when a Hub id is opened.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import shutil
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchrun.checkpoint.types import RemoteFile, RemoteRepo
from switchrun.errors import ModelError, NetworkError, SwitchrunError
from switchrun.units import format_bytes

if TYPE_CHECKING:
    from switchrun.checkpoint.remote import HubRanges

_CONFIG = "config.json"
_SMALL_FILES = frozenset(
    {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "spiece.model",
    }
)  # fmt: skip
#: The containers in order of preference: how weights are called, and their index.
_CONTAINERS = (
    (".safetensors", "model.safetensors.index.json"),
    (".bin", "pytorch_model.bin.index.json"),
    (".pt", ""),
)
#: Of writing; those of opening and the like name a file.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt"})


def cache_folder() -> Path | None:
    """Return the folder of the Hub's local cache; None if it would be in a home folder, and there is none."""
    from huggingface_hub import constants

    # It is then not replaced, and huggingface_hub would make a folder of this name in the current one.
    return None if constants.HF_HUB_CACHE.startswith("~") else Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, as huggingface_hub read it."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def ask_hub(repo: str, revision: str | None, timeout: float) -> None:
    """Ask the Hub whether it has a model; wait `timeout` seconds at most.

    Raises:
        ModelError: The Hub has no such model or revision, or refuses it.
        NetworkError: The Hub did not answer.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repo, revision=revision, timeout=timeout)
    except Exception as error:
        explained = explain(repo, revision, error)
        if isinstance(explained, ModelError):
            raise explained from error
        raise NetworkError(
            f"the Hub could not be reached: {_first_line(error)}", "check the connection, HTTPS_PROXY and HF_TOKEN"
        ) from error


def choose_files(names: Iterable[str]) -> list[str]:
    """Return what to download: one container's weights (safetensors if there), configuration, tokenizer."""
    top = [name for name in names if "/" not in name]
    chosen = [name for name in top if is_setting(name)]
    for suffix, index in _CONTAINERS:
        weights = [name for name in top if name.endswith(suffix) and name not in _NOT_WEIGHTS]
        if weights:
            return sorted({*chosen, *weights, *({index} & set(top))})
    return sorted(chosen)


def is_setting(name: str) -> bool:
    """Whether a file is configuration or a tokenizer's."""
    return name in _SMALL_FILES


def is_weights(name: str) -> bool:
    """Whether a file that was chosen holds weights."""
    return name.endswith(tuple(suffix for suffix, _ in _CONTAINERS))


def require_cache(repo: str) -> None:
    """Raise ModelError if there is no place for the Hub's local cache."""
    if cache_folder() is None:
        raise ModelError(f"{repo} cannot be stored: there is no home folder", "set HF_HOME to a folder for downloads")


def is_cached(file: RemoteFile) -> bool:
    """Whether a file is in the Hub's local cache, be it by another commit that has it too."""
    base = _cache_of(file.repo)
    for path in (base / "snapshots" / file.commit / file.name, base / "blobs" / file.hash):
        with contextlib.suppress(OSError):
            if path.stat().st_size == file.size:
                return True
    return False


def download(
    repo: RemoteRepo,
    revision: str | None,
    files: Iterable[RemoteFile],
    ranges: HubRanges,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Path:
    """Return a commit's folder in the Hub's local cache, with these files in it, of which missing ones are downloaded.

    `on_bytes` is called from some thread, with the bytes so far and in all. Nothing else is said of the progress.

    Raises:
        ModelError: The Hub no longer has the model, or the disk is too small for it.
        NetworkError: The Hub could not be reached.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    folder = _cache_of(repo.id) / "snapshots" / repo.commit
    missing = [file for file in files if not (folder / file.name).exists()]
    fetched = [file for file in missing if not is_cached(file)]
    _check_space(repo.id, sum(file.size for file in fetched))
    progress = _Progress(sum(file.size for file in fetched), on_bytes)
    ranges.ask_all({file: partial(_download, file, progress) for file in missing})
    noted = try_to_load_from_cache(repo.id, _CONFIG, revision=revision)
    if not isinstance(noted, str) or Path(noted).parent != folder:
        # By the branch and not the commit: huggingface_hub then notes it, which is how it is found offline.
        config = RemoteFile(repo.id, repo.commit, _CONFIG, 0, "")
        ranges.ask_all({config: partial(hf_hub_download, repo.id, _CONFIG, revision=revision)})
    return folder


def _download(file: RemoteFile, progress: _Progress) -> None:
    from huggingface_hub import hf_hub_download

    known = "tqdm_class" in inspect.signature(hf_hub_download).parameters  # Old versions cannot say how far they are.
    quiet: dict[str, Any] = {"tqdm_class": progress.bar_of(file)} if known else {}
    hf_hub_download(file.repo, file.name, revision=file.commit, **quiet)


class _Progress:
    """Sums up what huggingface_hub would show in bars, none of which is shown."""

    def __init__(self, total: int, on_bytes: Callable[[int, int], None] | None) -> None:
        self._total = total
        self._on_bytes = on_bytes
        self._lock = threading.Lock()
        self._done: dict[RemoteFile, int] = {}

    def bar_of(self, file: RemoteFile) -> type:
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        progress = self

        class Bar(tqdm):
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
            if self._on_bytes is not None:
                self._on_bytes(sum(self._done.values()), self._total)


def _cache_of(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _check_space(repo: str, missing: int) -> None:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ModelError(
            f"{repo} needs another {format_bytes(missing)} on disk; {constants.HF_HUB_CACHE} has {format_bytes(free)}",
            "free some space, or set HF_HOME to a folder on a larger disk",
        )


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """Return a model's folder in the Hub's local cache; None if it is not there. Never asks the Hub."""
    from huggingface_hub import snapshot_download

    if cache_folder() is None:
        return None
    try:
        path = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["config.json"])
    except Exception:  # Not there, in whichever words.
        return None
    return Path(path)


def explain(repo: str, revision: str | None, error: Exception) -> SwitchrunError:
    """The error to raise for what huggingface_hub raised."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return ModelError(f"{repo} is gated on the Hub", "accept its terms there, and set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(f"{repo} has no revision {revision!r} on the Hub")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            f"there is no folder {repo!r}, and no model of that name on the Hub",
            "check the spelling; for a private model set HF_TOKEN",
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return NetworkError(f"{repo} is not in the local cache, and HF_HUB_OFFLINE is set", "unset it once to download")
    reason = _first_line(error)
    if is_storage(error):
        return ModelError(f"{repo} cannot be stored in the Hub's local cache: {reason}")
    return NetworkError(
        f"{repo} is not complete in the local cache, and the Hub could not be reached: {reason}",
        "check the connection, or give a folder",
    )


def is_storage(error: Exception) -> bool:
    """Whether an error is of the disk, and not of the network, whose errors are of many kinds."""
    return isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK_ERRORS)


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
