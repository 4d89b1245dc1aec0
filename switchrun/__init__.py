"""switchrun runs Google's Switch Transformers, up to 1.6 trillion parameters, on an ordinary machine.

    from switchrun import Session, plan

    with Session.open("google/switch-base-8", cpu_memory="6GiB") as session:
        print(session.fill("A <extra_id_0> walks into a bar.").text)

A `Client` asks a session that `switchrun serve` keeps open. Importing this package imports neither torch nor
transformers; opening a session does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchrun.client import Client
    from switchrun.model.records import FillResult, GenerateResult, GenerationOptions, Progress, ScoreResult
    from switchrun.model.sentinels import Filling
    from switchrun.model.session import Session
    from switchrun.planning.opening import plan

__version__ = "0.1.0"

__all__ = [
    "Client",
    "FillResult",
    "Filling",
    "GenerateResult",
    "GenerationOptions",
    "Progress",
    "ScoreResult",
    "Session",
    "__version__",
    "plan",
]

#: Where each name is imported from when it is first asked for (PEP 562).
_HOMES = {
    "Client": "switchrun.client",
    "FillResult": "switchrun.model.records",
    "Filling": "switchrun.model.sentinels",
    "GenerateResult": "switchrun.model.records",
    "GenerationOptions": "switchrun.model.records",
    "Progress": "switchrun.model.records",
    "ScoreResult": "switchrun.model.records",
    "Session": "switchrun.model.session",
    "plan": "switchrun.planning.opening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'switchrun' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
