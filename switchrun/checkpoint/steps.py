"""The steps of opening a model and of its work, for whoever shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from switchrun.checkpoint.remote import HubRanges

#: In their order; `switchrun.model.records.Progress` says what is counted in each.
Stage = Literal[
    "ask", "download", "index", "plan", "fetch", "import", "open", "encode", "decode", "score",
    "generate", "replay",  # only where `eval` and `bench` measure: passages, and reads without a model
]  # fmt: skip


class Steps:
    """Takes each step as it comes, from any thread; this one drops them."""

    def __call__(self, stage: Stage, done: int = 0, total: int = 0) -> None:
        """Take one: so much of a stage is done, as far as it can be counted."""

    def reads(self, hub: HubRanges) -> None:
        """Take what reads from the Hub from now on, and counts the bytes."""


NO_STEPS = Steps()
