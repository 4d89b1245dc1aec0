"""How a session is opened: plan, then read the dense weights while torch and transformers are imported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from switchrun.kernels import libraries
from switchrun.machine.limits import check_limits
from switchrun.model.preload import DensePreload
from switchrun.model.records import Progress, ProgressCallback
from switchrun.model.session import Session
from switchrun.planning import Plan
from switchrun.planning.opening import EXPECTED_NEW_TOKENS, PlannedModel, plan_model
from switchrun.planning.options import OpenOptions

#: Imports torch, transformers and what else a plan needs.
ImportLibraries = Callable[[Plan], None]


@contextmanager
def read_while_importing(planned: PlannedModel, import_libraries: ImportLibraries) -> Iterator[DensePreload]:
    """Begin to read dense weights, and import the libraries meanwhile; reads that still wait at the end are dropped."""
    check_limits()
    libraries.path()  # refuses one that this machine does not have
    with DensePreload(planned.checkpoint, planned.plan) as preload:
        import_libraries(planned.plan)
        yield preload


def import_model(plan: Plan) -> None:
    """Import the model's code and the libraries that a plan needs; blocks for seconds."""
    import_module("switchrun.model.engine")
    if plan.precision.packed is not None and plan.gpus:
        from switchrun.kernels import bitsandbytes_ops

        bitsandbytes_ops.operations()  # else the first product would wait for it


def open_session(
    options: OpenOptions,
    *,
    progress: ProgressCallback | None = None,
    warn: Callable[[str], None] | None = None,
    started: float | None = None,
    import_libraries: ImportLibraries = import_model,
    on_plan: Callable[[Plan], object] = lambda _plan: None,
) -> Session:
    """Open a model; torch and transformers are imported while its dense weights are being read.

    `progress` is called while the session works, in a download from other threads; `warn` with warnings, from any
    thread; without it they are logged.
    `started` is `time.perf_counter()` when opening began, None now; `import_libraries` imports in the caller's own way;
    `on_plan` is called with the plan before a weight is read.

    Raises:
        SwitchrunError: One of its kinds. A wrong model or budget is noticed before torch is imported.
    """
    started = time.perf_counter() if started is None else started

    def on_download(done: int, most: int) -> None:
        if progress is not None:
            progress(Progress("fetch", done, most, 0, done))

    planned = plan_model(options, hub_output_tokens=EXPECTED_NEW_TOKENS, warn=warn, on_download=on_download)
    on_plan(planned.plan)
    planned = fetch_dense_weights(planned, progress)
    with read_while_importing(planned, import_libraries) as preload:
        return Session(planned, preload=preload, progress=progress, warn=warn, started=started)


def fetch_dense_weights(planned: PlannedModel, progress: ProgressCallback | None = None) -> PlannedModel:
    """Return a planned model with its dense weights on this machine; see `switchrun.model.dense_fetch`."""
    hub = planned.hub
    if hub is None:
        return planned
    from switchrun.model.dense_fetch import with_dense_weights

    def on_bytes(done: int, most: int) -> None:
        if progress is not None:
            progress(Progress("fetch", done, most, 0, hub.traffic.bytes))

    try:
        return with_dense_weights(planned, on_bytes)
    except BaseException:
        hub.close()
        raise
