"""What others may do with a row of a batch while it runs: limit it, stop it, and hear its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class RowControl:
    """One input's row.

    Attributes:
        max_new_tokens: Most tokens to generate for it, where that is less than for the batch; None is no limit of its
            own.
        on_tokens: Called after each step with the ids so far, the start token included, from the thread that works;
            not in beam search, which may still change them all.
    """

    def __init__(
        self, max_new_tokens: int | None = None, on_tokens: Callable[[Sequence[int]], object] | None = None
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self.on_tokens = on_tokens
        self._stopped = False

    def stop(self) -> None:
        """Let it load no expert from the next layer on, and generate no token after the next; from any thread."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called: what comes out for the row is worth nothing then."""
        return self._stopped
