"""switchrun runs Google's Switch Transformers, up to 1.6 trillion parameters, on an ordinary machine.

    from switchrun import Session, plan

    with Session.open("google/switch-base-8", cpu_memory="6GiB") as session:
        print(session.fill(["A <extra_id_0> walks into a bar."])[0].text)

Importing this package imports neither torch nor transformers; opening a session does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from switchrun._plan import plan

if TYPE_CHECKING:
    from switchrun.model.records import FillResult, GenerationOptions
    from switchrun.model.session import Session

__version__ = "0.1.0"

__all__ = ["FillResult", "GenerationOptions", "Session", "__version__", "plan"]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for (PEP 562)."""
    if name == "Session":
        from switchrun.model.session import Session

        return Session
    if name in ("FillResult", "GenerationOptions"):
        from switchrun.model import records

        return getattr(records, name)
    raise AttributeError(f"module 'switchrun' has no attribute '{name}'")
