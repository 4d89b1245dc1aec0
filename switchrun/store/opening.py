"""The store that belongs to a checkpoint."""

from __future__ import annotations

from pathlib import Path

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.hardware import has_bf16_instructions
from switchrun.store.expert_store import ExpertStore, Warn
from switchrun.store.layout import Layout, layout_of, nf4_layout
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
    layout, *others = _layouts(checkpoint, dtype)
    return ExpertStore.open(
        offload,
        model_name(checkpoint),
        checkpoint.fingerprint,
        dtype,
        layout,
        other_layouts=others,
        limit_bytes=limit_bytes,
        read_only=read_only,
        must_write=must_write,
        warn=warn,
    )


def _layouts(checkpoint: SwitchCheckpoint, dtype: str) -> list[Layout]:
    """Give the layouts that stored experts may have, the best for this machine first: a store may come from another."""
    d_model, d_ff = checkpoint.config["d_model"], checkpoint.config["d_ff"]
    plain = layout_of(dtype, d_model, d_ff)
    if dtype != "nf4":
        return [plain]
    tiled = nf4_layout(d_model, d_ff, tiled=True)
    return [tiled, plain] if checkpoint.stored_dtype == "BF16" and has_bf16_instructions() else [plain, tiled]
