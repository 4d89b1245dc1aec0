"""The store that belongs to a checkpoint."""

from __future__ import annotations

from pathlib import Path

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.store.expert_store import ExpertStore, Warn
from switchrun.store.layout import layout_of
from switchrun.store.names import model_name


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
        model_name(checkpoint),
        checkpoint.fingerprint,
        dtype,
        layout_of(dtype, checkpoint.config["d_model"], checkpoint.config["d_ff"]),
        limit_bytes=limit_bytes,
        read_only=read_only,
        must_write=must_write,
        warn=warn,
    )
