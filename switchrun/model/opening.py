"""What is done before a model is built: its dense weights are fetched and read, while the libraries are imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from switchrun.checkpoint.steps import NO_STEPS, Steps
from switchrun.kernels import libraries
from switchrun.machine.limits import check_limits
from switchrun.model.preload import DensePreload
from switchrun.planning import Plan
from switchrun.planning.opening import PlannedModel

#: Imports torch, transformers and what else a plan needs.
ImportLibraries = Callable[[Plan], None]


@contextmanager
def read_while_importing(
    planned: PlannedModel, import_libraries: ImportLibraries, steps: Steps = NO_STEPS
) -> Iterator[DensePreload]:
    """Begin to read dense weights, and import the libraries meanwhile; reads that still wait at the end are dropped."""
    check_limits()
    libraries.path()  # refuses one that this machine does not have
    with DensePreload(planned.checkpoint, planned.plan) as preload:
        steps("import")
        import_libraries(planned.plan)
        yield preload


def import_model(plan: Plan) -> None:
    """Import the model's code and the libraries that a plan needs; blocks for seconds."""
    import_module("switchrun.model.engine")
    if plan.precision.packed is not None and plan.gpus:
        from switchrun.kernels import bitsandbytes_ops

        bitsandbytes_ops.operations()  # else the first product would wait for it


def fetch_dense_weights(planned: PlannedModel, steps: Steps = NO_STEPS) -> PlannedModel:
    """Return a planned model with its dense weights on this machine; see `switchrun.model.dense_fetch`."""
    hub = planned.hub
    if hub is None:
        return planned
    from switchrun.model.dense_fetch import with_dense_weights

    try:
        return with_dense_weights(planned, lambda done, total: steps("fetch", done, total))
    except BaseException:
        hub.close()
        raise
