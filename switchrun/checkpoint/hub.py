"""The Hugging Face Hub and its local cache: what of a repository is needed, what is here, and what its errors mean.

`huggingface_hub` reads HF_HOME, HF_TOKEN and HF_HUB_OFFLINE itself; it is imported only when a Hub id is opened.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from switchrun.checkpoint.types import RemoteFile
from switchrun.errors import ModelError, NetworkError, SwitchrunError

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
    base = cache_of(file.repo)
    for path in (base / "snapshots" / file.commit / file.name, base / "blobs" / file.hash):
        with contextlib.suppress(OSError):
            if path.stat().st_size == file.size:
                return True
    return False


def cache_of(repo: str) -> Path:
    """Return the folder of a repository in the Hub's local cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


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
