"""The store that belongs to a checkpoint: what names it, and what lies in it."""

from __future__ import annotations

from pathlib import Path

from switchrun.checkpoint.locate import demo_folder
from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.store.expert_store import ExpertStore, Warn
from switchrun.store.layout import Layout, layout_of


def open_checkpoint_store(
    offload: str | Path,
    checkpoint: SwitchCheckpoint,
    dtype: str,
    *,
    limit_bytes: int | None = None,
    read_only: bool = False,
    must_write: bool = False,
    warn: Warn | None = None,
) -> ExpertStore:
    """Open the store of a checkpoint's experts in a packed dtype; arguments and errors are those of `ExpertStore.open`.

    Everybody who reads or writes stored experts opens them here, so that they find one another's.
    """
    return ExpertStore.open(
        offload,
        store_model(checkpoint),
        checkpoint.fingerprint,
        dtype,
        expert_layout(checkpoint, dtype),
        limit_bytes=limit_bytes,
        read_only=read_only,
        must_write=must_write,
        warn=warn,
    )


def store_model(checkpoint: SwitchCheckpoint) -> str:
    """Name a checkpoint's model for the store: `id@commit` of the Hub, `demo`, or the folder, absolute."""
    if checkpoint.revision is not None:
        return f"{checkpoint.id}@{checkpoint.revision}"
    # Not by its id: a folder of the user's may be called demo too.
    return "demo" if checkpoint.path == demo_folder() else str(checkpoint.path)


def expert_layout(checkpoint: SwitchCheckpoint, dtype: str) -> Layout:
    """Give what an expert of a checkpoint is in a packed dtype.

    Raises:
        ValueError: It is not a packed dtype.
    """
    return layout_of(dtype, int(checkpoint.config["d_model"]), int(checkpoint.config["d_ff"]))
