"""The disk tier that switchrun writes: a file for each expert. Bytes in, byte ranges out; no torch."""

from __future__ import annotations

from switchrun.store.expert_store import ExpertStore, open_checkpoint_store
from switchrun.store.files import StoredExpert
from switchrun.store.layout import Layout, Part, int8_layout, layout_of, nf4_layout
from switchrun.store.manifest import Manifest, mending_command, store_folder
from switchrun.store.paths import expert_path, model_name, stored_experts
from switchrun.store.upkeep import StoreInfo, VerifyReport, clear_store, list_stores, verify_store
from switchrun.store.writer import BackgroundWriter

__all__ = [
    "BackgroundWriter",
    "ExpertStore",
    "Layout",
    "Manifest",
    "Part",
    "StoreInfo",
    "StoredExpert",
    "VerifyReport",
    "clear_store",
    "expert_path",
    "int8_layout",
    "layout_of",
    "list_stores",
    "mending_command",
    "model_name",
    "nf4_layout",
    "open_checkpoint_store",
    "store_folder",
    "stored_experts",
    "verify_store",
]
