"""Import torch and transformers in less time than they take by themselves; nothing of theirs at the top."""

from __future__ import annotations

import gc
from importlib import import_module


def import_libraries(packed: bool = False) -> None:
    """Import what `model/` needs, for a process that is switchrun's own; blocks for seconds.

    Garbage is not collected meanwhile, which saves a fifth of the time; and the million objects that stay are not
    looked through ever after.

    Args:
        packed: Also import what int8 and nf4 need; else the first product would wait for it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        import_module("switchrun.model.session")
        if packed:
            import_module("bitsandbytes")
    finally:
        if enabled:
            gc.enable()
    gc.freeze()
