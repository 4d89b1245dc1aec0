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
        plan: If it makes use of bitsandbytes, that is imported too: else the first product would wait for it. A GPU
            does for int8 and nf4, a CPU for nf4 if it is fast there.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        import_module("switchrun.model.session")
        if _uses_bitsandbytes(plan):
            import_module("switchrun.experts.bnb").operations()
    finally:
        if enabled:
            gc.enable()
    gc.freeze()


def _uses_bitsandbytes(plan: Plan) -> bool:
    from switchrun.experts.nf4 import bitsandbytes_unpacks
    from switchrun.experts.slots import TORCH_DTYPES

    packed, compute = plan.precision.packed, plan.precision.compute
    return packed is not None and (
        bool(plan.gpus) or (packed == "nf4" and bitsandbytes_unpacks(TORCH_DTYPES[compute.stored]))
    )
