"""Import torch and transformers in less time than they take by themselves; nothing of theirs at the top."""

from __future__ import annotations

import gc
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from switchrun.planning import Plan


def import_libraries(plan: Plan) -> None:
    """Import what `model/` needs, for a process that is switchrun's own; blocks for seconds.

    Garbage is not collected meanwhile, which saves a fifth of the time; and the million objects that stay are not
    looked through ever after.

    Args:
        plan: If a GPU computes with int8 or nf4, what that needs is imported too: else the first product would wait for
            it. The CPU needs nothing besides torch.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        import_module("switchrun.model.session")
        if plan.gpus and plan.precision.packed is not None:
            import_module("bitsandbytes")
    finally:
        if enabled:
            gc.enable()
    gc.freeze()
