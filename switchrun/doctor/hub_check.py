"""How the Hub is set up, whether it answers, how fast it is, and what its rate limit leaves. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from typing import Any

from switchrun.checkpoint.hub import ask_hub, cache_folder, choose_files, is_weights
from switchrun.checkpoint.remote import HubRanges, Patience
from switchrun.checkpoint.types import RemoteFile
from switchrun.doctor.check import Check
from switchrun.errors import NetworkError, SwitchrunError
from switchrun.machine.disks import nearest_folder
from switchrun.units import MIB, format_bytes, format_count, format_rate, format_seconds

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_SEE = "see docs/troubleshooting.md"
_SECONDS = 5.0
#: What is read of a model to time it.
_SAMPLE_BYTES = 8 * MIB
_LEFT = re.compile(r"\br=(\d+)")
_RESET = re.compile(r"\bt=(\d+)")


def check_hub(model: tuple[str, str | None] | None, online: bool) -> Check:
    """How is the Hub set up, and does it know the model, (id, revision)?

    It is asked for a model that is named, and if `online`; only then it is a failure if it does not answer.
    """
    from huggingface_hub import constants, get_token

    cache = cache_folder()
    if cache is None:
        return Check("hub", "there is no home folder to keep downloads in", "set HF_HOME to a folder for them")
    # Whether there is a token, and which variable sets a proxy: their values are secrets.
    proxy = next((name for name in _PROXIES if os.environ.get(name)), None)
    place = nearest_folder(cache)
    finding = f"cache {cache}, {format_bytes(shutil.disk_usage(place).free)} free"
    try:
        token = get_token()
    except OSError:  # it lies where this user may not look
        token = None
    finding += "" if token else ", no token"
    finding += ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    finding += f", proxy from {proxy}" if proxy else ""
    if online and constants.HF_HUB_OFFLINE:
        return Check("hub", f"{finding}; so it is not asked", "unset HF_HUB_OFFLINE", NetworkError)
    details: Mapping[str, Any] = {}
    if online or (model is not None and not constants.HF_HUB_OFFLINE):
        repo, revision = model or ("google/switch-base-8", None)
        try:
            ask_hub(repo, revision, timeout=_SECONDS)
            finding += f"; it knows {repo}"
            if model is not None:
                words, details = _measure(repo, revision)
                finding += words
        except SwitchrunError as error:
            return Check("hub", error.message, error.hint or _SEE, type(error) if online else None)
    if not os.access(place, os.W_OK | os.X_OK):
        return Check("hub", f"{cache} cannot be written", "set HF_HOME to a folder that you may write to")
    return Check("hub", finding, details=details)


def _measure(repo: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Time one range of a model's largest file of weights, and ask what the rate limit leaves: words, and details."""
    patience = Patience(connect_seconds=_SECONDS, stall_seconds=_SECONDS, attempts=1)
    with HubRanges(patience) as ranges:
        listed = {file.name: file for file in ranges.list_files(repo, revision).files}
        weights = [listed[name] for name in choose_files(listed) if is_weights(name)]
        if not weights:
            return "", {}
        file = max(weights, key=lambda each: each.size)
        ranges.read(file, 0, 1)  # its URL is known from here on, and the connection open
        length = min(_SAMPLE_BYTES, file.size)
        start = time.perf_counter()
        ranges.read(file, file.size - length, length)
        rate = length / (time.perf_counter() - start)
    left, reset = _rate_limit(file)
    words = f", {format_rate(rate)} on one connection ({format_bytes(length)} of {file.name})"
    if left is not None:
        words += f", {format_count(left, 'request')} left"
        words += "" if reset is None else f" for {format_seconds(reset)}"
    return words, {"read_bytes_per_second": rate, "requests_left": left, "requests_reset_seconds": reset}


def _rate_limit(file: RemoteFile) -> tuple[int | None, int | None]:
    """Return how many files' URLs the Hub may still be asked for, and for how many seconds; None if it does not say."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # it is documented there

    said = ""
    with contextlib.suppress(Exception):  # whatever the HTTP library raises; the range came, so the Hub works
        url = hf_hub_url(file.repo, file.name, revision=file.commit)
        answer = get_session().head(url, headers=build_hf_headers(), follow_redirects=False, timeout=_SECONDS)
        said = answer.headers.get("RateLimit", "")
    left, reset = _LEFT.search(said), _RESET.search(said)
    return int(left[1]) if left else None, int(reset[1]) if reset else None
