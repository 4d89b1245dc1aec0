"""Does the model open, and does a plan for it fit? From its headers, as `switchrun plan`; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.locate import NotDownloadedError
from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.doctor.check import Check, failed, passed, warned
from switchrun.errors import SwitchrunError, command
from switchrun.planning import Budgets, make_plan
from switchrun.units import format_bytes, format_count

NAME = "model"


def open_model(model: str | None, offload: Path) -> SwitchCheckpoint | Exception:
    """Open a model that is here already; an error is given back, for `check_model` to tell.

    Args:
        model: What the user gave; None is the demo model.
        offload: Where its parsed index is kept.
    """
    try:
        return open_checkpoint(model, cache_dir=offload / "index", download=False)
    except Exception as error:
        return error


def check_model(model: str | None, opened: SwitchCheckpoint | Exception, budgets: Budgets) -> Check:
    """Tell what the model is, and whether a plan for it fits.

    Args:
        model: What the user gave.
        opened: What came of opening it.
        budgets: What a plan may take.

    Raises:
        Exception: `opened`, if it is an error that a user should never meet.
    """
    if isinstance(opened, NotDownloadedError):
        return warned(NAME, opened.message, f"{opened.hint}; or let fill download it", model_id=model)
    if isinstance(opened, SwitchrunError):
        return failed(NAME, opened.message, _mend(opened), opened, model_id=model)
    if isinstance(opened, Exception):
        raise opened
    checkpoint = opened
    details: dict[str, Any] = {
        "model_id": checkpoint.id,
        "revision": checkpoint.revision,
        "stored_dtype": checkpoint.stored_dtype,
        "num_experts": len(checkpoint.experts),
        "expert_bytes": checkpoint.expert_bytes,
        "model_bytes": checkpoint.total_bytes,
        "repairs": list(checkpoint.repairs),
        "cpu_budget_bytes": budgets.cpu_bytes,
    }
    finding = f"{checkpoint.id}, {format_bytes(checkpoint.total_bytes)} in {checkpoint.stored_dtype}"
    finding += f", {len(checkpoint.experts)} experts of {format_bytes(checkpoint.expert_bytes)}"
    if checkpoint.repairs:
        finding += f", {format_count(len(checkpoint.repairs), 'repair')} (see: {command('plan', model=model)})"
    try:
        plan = make_plan(checkpoint, budgets)
    except SwitchrunError as error:
        return failed(NAME, f"{finding}; {error.message}", _mend(error), error, **details)
    memory = [use for use in plan.tiers if use.budget_bytes]
    slots = {use.tier: use.expert_slots for use in memory}
    details |= {"minimum_cpu_bytes": plan.minimum_cpu_bytes, "expert_slots": slots}
    for use in memory:
        finding += f"; {format_bytes(use.budget_bytes or 0)} on {use.tier} hold {use.expert_slots} of them"
    return passed(NAME, finding, **details)


def _mend(error: SwitchrunError) -> str:
    return error.hint or "see docs/troubleshooting.md"
