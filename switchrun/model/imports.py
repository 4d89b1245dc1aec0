"""Import torch and transformers in less time than they take by themselves; nothing of theirs at the top."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchrun.model.stand_ins import stand_ins

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
        try:
            with stand_ins():
                _import_model()
        except Exception:  # another version of torch or transformers cannot do without what they stand for
            _import_model()
        if _uses_bitsandbytes(plan):
            import_module("switchrun.experts.bnb").operations()
    finally:
        if enabled:
            gc.enable()
    gc.freeze()


def _import_model() -> None:
    _import_transformers()
    import_module("switchrun.model.session")


def _import_transformers() -> None:
    """Import transformers, and `transformers.models` without reading the files of all models a second time.

    Each of the two looks through 3,300 files for what they export, which takes 0.2 s. What is found is cached, but
    under another name each time, and for 128 folders of 1,100 (transformers 5.24).
    """
    transformers: Any = import_module("transformers")
    import_utils: Any = import_module("transformers.utils.import_utils")
    look = getattr(import_utils, "define_import_structure", None)
    if look is None:
        return
    models = Path(transformers.__file__).parent / "models"

    def look_once(path: str | Path, prefix: str | None = None) -> Any:
        if prefix is None and Path(path) == models / "__init__.py":
            with suppress(Exception):  # whatever another version has in its place
                return _below(look(models, prefix="models"), "models")
        return look(path, prefix)

    import_utils.define_import_structure = look_once
    try:
        import_module("transformers.models")
    finally:
        import_utils.define_import_structure = look


def _below(structure: Mapping[Any, Mapping[str, Any]], package: str) -> dict[Any, dict[str, Any]]:
    """Give the part of an import structure that belongs to a package, as that names it; transformers adds its own."""
    prefix = f"{package}."
    parts = {
        backends: {name.removeprefix(prefix): exported for name, exported in modules.items() if name.startswith(prefix)}
        for backends, modules in structure.items()
    }
    return {backends: modules for backends, modules in parts.items() if modules}


def _uses_bitsandbytes(plan: Plan) -> bool:
    from switchrun.experts.nf4 import bitsandbytes_unpacks
    from switchrun.experts.slots import TORCH_DTYPES

    packed, compute = plan.precision.packed, plan.precision.compute
    return packed is not None and (
        bool(plan.gpus) or (packed == "nf4" and bitsandbytes_unpacks(TORCH_DTYPES[compute.stored]))
    )
