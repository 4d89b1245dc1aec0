"""Where a checkpoint is, which tensors it holds and at which byte offsets. No torch, no models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchrun.checkpoint.opening import open_checkpoint

__all__ = ["open_checkpoint"]


def __getattr__(name: str) -> Any:
    # Lazy, so that whoever needs only `checkpoint.types` pays for no more.
    if name == "open_checkpoint":
        from switchrun.checkpoint.opening import open_checkpoint

        return open_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
