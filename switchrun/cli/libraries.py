"""What other people's libraries may write to stderr: nothing, unless somebody is looking for a bug."""

from __future__ import annotations

import logging
import os
import warnings

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def debugging() -> bool:
    """Tell whether `SWITCHRUN_DEBUG` asks for tracebacks and for what the libraries say."""
    return os.environ.get("SWITCHRUN_DEBUG", "0") not in ("", "0")


def quieten_libraries() -> None:
    """Silence torch, transformers and huggingface_hub; call it before they are imported."""
    if debugging():
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
