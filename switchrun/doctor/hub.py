"""How is the Hub set up, and does it answer? The token is looked for and never shown."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from switchrun.checkpoint.hub import ask_hub
from switchrun.doctor.check import Check, failed, passed, warned
from switchrun.errors import NetworkError, SwitchrunError
from switchrun.units import format_bytes

NAME = "hub"

#: Asked for if the user's model is not on the Hub.
SOME_MODEL = "google/switch-base-8"
TIMEOUT_SECONDS = 5.0

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def check_hub(model: tuple[str, str | None] | None, *, online: bool) -> Check:
    """Tell the settings, and ask the Hub for a model if `online`; there is no network access otherwise.

    Args:
        model: Id and revision of the user's model; None if it is not on the Hub.
        online: Whether to ask.
    """
    try:
        from huggingface_hub import constants, get_token
    except ImportError as error:
        mend = "pip install --force-reinstall huggingface-hub"
        return failed(NAME, f"huggingface_hub cannot be imported: {error}", mend)
    cache = Path(constants.HF_HUB_CACHE)
    offline = bool(constants.HF_HUB_OFFLINE)
    token = get_token() is not None
    proxy = next((name for name in _PROXIES if os.environ.get(name)), None)
    place = _existing(cache)
    writable = os.access(place, os.W_OK | os.X_OK)
    free = shutil.disk_usage(place).free
    details: dict[str, Any] = {
        "hub_cache": str(cache),
        "hub_cache_writable": writable,
        "free_bytes": free,
        "offline": offline,
        "token": token,
        # Its value may hold a password.
        "proxy_variable": proxy,
        "endpoint": constants.ENDPOINT,
        "reached": None,
    }
    finding = f"cache {cache}, {format_bytes(free)} free" + ("" if token else ", no token")
    finding += ", offline (HF_HUB_OFFLINE)" if offline else ""
    finding += f", proxy from {proxy}" if proxy else ""
    if online and offline:
        return failed(NAME, f"{finding}; so it is not asked", "unset HF_HUB_OFFLINE", NetworkError, **details)
    if online:
        repo, revision = model or (SOME_MODEL, None)
        try:
            ask_hub(repo, revision, timeout=TIMEOUT_SECONDS)
        except SwitchrunError as error:
            return failed(NAME, error.message, error.hint, error, **{**details, "reached": False})
        finding += f"; it knows {repo}"
        details["reached"] = True
    if not writable:
        return warned(NAME, f"{cache} cannot be written", "set HF_HOME to a folder that you may write to", **details)
    return passed(NAME, finding, **details)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
