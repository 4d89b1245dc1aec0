"""The disk tier that switchrun writes: a file for each expert. Bytes in, byte ranges out; no torch."""

from __future__ import annotations

from switchrun.store.expert_store import ExpertForm, ExpertStore, form_of, open_checkpoint_store, open_kept_stores
from switchrun.store.files import StoredExpert
from switchrun.store.layout import Layout
from switchrun.store.paths import clear_hint, expert_path, model_name, open_stored, store_folder, stored_experts
from switchrun.store.upkeep import StoreInfo, VerifyReport, clear_store, list_stores, verify_store
from switchrun.store.writer import BackgroundWriter

__all__ = [
    "BackgroundWriter",
    "ExpertForm",
    "ExpertStore",
    "Layout",
    "StoreInfo",
    "StoredExpert",
    "VerifyReport",
    "clear_hint",
    "clear_store",
    "expert_path",
    "form_of",
    "list_stores",
    "model_name",
    "open_checkpoint_store",
    "open_kept_stores",
    "open_stored",
    "store_folder",
    "stored_experts",
    "verify_store",
]
