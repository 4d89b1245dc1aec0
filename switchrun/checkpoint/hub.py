"""Checkpoints on the Hugging Face Hub: from its local cache, or downloaded into it.

`huggingface_hub` reads HF_HOME, HF_TOKEN and HF_HUB_OFFLINE itself; it is imported only when a Hub id is opened.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from switchrun.errors import ModelError, NetworkError, SwitchrunError
from switchrun.units import format_bytes

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
_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt"})


def find_snapshot(repo: str, revision: str | None, weights: bool = True) -> Path:
    """Return a model's folder in the Hub's local cache, named by its commit; download what is missing of it.

    Without `weights` that is configuration and tokenizer.

    Raises:
        ModelError: The Hub has no such model or revision, refuses it, or the disk is too small for it.
        NetworkError: The Hub could not be reached, and the model is not in the local cache.
    """
    from huggingface_hub import HfApi, snapshot_download

    if cache_folder() is None:
        raise ModelError(f"{repo} cannot be stored: there is no home folder", "set HF_HOME to a folder for downloads")
    # Exception and no less: huggingface_hub's HTTP library, and so what it raises, changes with its version.
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:
        # A model that is here already needs no Hub; if it is incomplete, the index finds that.
        cached = cached_snapshot(repo, revision)
        if cached is not None:
            return cached
        raise explain(repo, revision, error) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    files = choose_files(sizes) if weights else sorted(_SMALL_FILES & sizes.keys())
    _check_space(repo, info.sha, {name: sizes[name] for name in files})
    try:
        # The branch and not the commit: snapshot_download then notes it, which is how it is found offline.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except Exception as error:
        raise explain(repo, revision, error) from error


def cache_folder() -> Path | None:
    """Return the folder of the Hub's local cache; None if it would be in a home folder, and there is none."""
    from huggingface_hub import constants

    # It is then not replaced, and huggingface_hub would make a folder of this name in the current one.
    return None if constants.HF_HUB_CACHE.startswith("~") else Path(constants.HF_HUB_CACHE)


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
    chosen = [name for name in top if name in _SMALL_FILES]
    for suffix, index in _CONTAINERS:
        weights = [name for name in top if name.endswith(suffix) and name not in _NOT_WEIGHTS]
        if weights:
            return sorted({*chosen, *weights, *({index} & set(top))})
    return sorted(chosen)


def _check_space(repo: str, commit: str | None, sizes: dict[str, int]) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    missing = sum(
        size for name, size in sizes.items() if not isinstance(try_to_load_from_cache(repo, name, revision=commit), str)
    )
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
    if isinstance(error, OSError) and not isinstance(error, (errors.HfHubHTTPError, ConnectionError, TimeoutError)):
        return ModelError(f"{repo} cannot be stored in the Hub's local cache: {reason}")
    return NetworkError(
        f"{repo} is not complete in the local cache, and the Hub could not be reached: {reason}",
        "check the connection, or give a folder",
    )


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
