"""One thread that owns the session: it takes the oldest input, and answers with it all that can share its batch.

Nothing is waited for: the queue fills while the model works.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from switchrun.errors import BudgetError, InputError, SwitchrunError
from switchrun.model.control import RowControl
from switchrun.model.records import GenerationOptions, Progress, SessionStats
from switchrun.model.sentinels import Filling
from switchrun.serve.calls import Call

if TYPE_CHECKING:
    from switchrun.model.records import GenerateResult, ScoreResult
    from switchrun.model.session import Session


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """The tokens of one of the request's inputs so far, the start token included."""

    id: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ResultEvent:
    """The answer to one of the request's inputs, or why there is none."""

    id: int
    result: GenerateResult | ScoreResult | Exception


#: `Progress` is that of the batch that the request is in.
Event = Progress | TokenEvent | ResultEvent


class BusyError(SwitchrunError):
    """The queue is full."""

    kind = "busy"


class ClosingError(SwitchrunError):
    """The server takes no more requests: it is closing, or has not opened the model yet."""

    kind = "unavailable"


@dataclass(eq=False, slots=True)
class _Row:
    """One input of a request that waits or is being worked on."""

    ticket: Ticket
    id: int
    encoded: Any
    control: RowControl


class Ticket:
    """A request in the queue; `cancel` takes it back."""

    def __init__(self, scheduler: Scheduler, call: Call, options: GenerationOptions, on_event: Callable[[Event], None]):
        self.call = call
        self.options = options
        self.on_event = on_event
        self.submitted = time.perf_counter()
        #: What inputs must have in common to share a batch: each has its own limit, and its own draws.
        self.way = call.task, replace(options, max_new_tokens=1, seed=0)
        self._scheduler = scheduler
        self.rows: list[_Row] = []

    def encoded(self, number: int) -> Any:
        """Return what the session made of one of the inputs."""
        return next(row.encoded for row in self.rows if row.id == number)

    def cancel(self) -> None:
        """Forget what waits, and stop what is being worked on at its next layer or token; from any thread."""
        self._scheduler._cancel(self)


@dataclass
class Tally:
    """What the model thread has done so far; see `Scheduler.tally`."""

    batches: int = 0
    rows: int = 0
    cancelled_rows: int = 0
    failed_rows: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    queue_seconds: float = 0.0
    work_seconds: float = 0.0


class Scheduler:
    """The queue, and the thread that empties it.

    Args:
        open_session: Opens the session, in the model thread; called with what takes its progress.
        max_queue: So many requests may wait.
        on_open: Called in the model thread once the session is open, or with why it is not.
        on_bug: Called with an exception that is not switchrun's own; returns an id to find it by.
    """

    def __init__(
        self,
        open_session: Callable[[Callable[[Progress], None]], Session],
        max_queue: int,
        on_open: Callable[[BaseException | None], None],
        on_bug: Callable[[Exception], str],
    ) -> None:
        self._open_session = open_session
        self._max_queue = max_queue
        self._on_open = on_open
        self._on_bug = on_bug
        self._changed = threading.Condition()
        # Guarded by the condition's lock.
        self._waiting: deque[_Row] = deque()
        self._working: list[_Row] = []
        self._closing = False
        self._tally = Tally()
        self._stats: SessionStats | None = None
        self._shown: Progress | None = None
        self.session: Session | None = None
        self._thread = threading.Thread(target=self._run, name="switchrun-model", daemon=True)

    def start(self) -> None:
        """Begin to open the model."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.session is not None and not self._closing

    @property
    def opening(self) -> Progress | None:
        """How far the opening of the model is."""
        return self._shown

    def tally(self) -> tuple[Tally, SessionStats | None, int, int]:
        """Return the counts so far, the session's as of the last batch, and how many requests and rows wait or run."""
        with self._changed:
            rows = [*self._waiting, *self._working]
            return replace(self._tally), self._stats, len({row.ticket for row in rows}), len(rows)

    def submit(self, call: Call, on_event: Callable[[Event], None]) -> Ticket:
        """Queue what a request asks for; `on_event` is called in the model thread, once with a result for each input.

        Inputs that cannot be worked on have their results before this returns.

        Raises:
            BusyError: The queue is full.
            ClosingError: The server is closing, or still opening the model.
            SwitchrunError: The options cannot be had, or the only input cannot be worked on.
        """
        session = self.session
        if session is None or self._closing:
            raise ClosingError("the server is closing" if self._closing else "the model is still being opened")
        options = session.own_options(**call.options) if call.task == "generate" else GenerationOptions(**call.options)
        try:
            session.check_options(options)
        except BudgetError as error:
            hint = "ask for less, or start the server with more: --num-beams, --max-new-tokens"
            raise BudgetError(error.message, hint) from error
        ticket = Ticket(self, call, options, on_event)
        failures = []
        for number, given in enumerate(call.inputs):
            try:
                if isinstance(given, InputError):
                    raise given
                on_tokens = self._listener(ticket, number) if call.stream and call.task != "score" else None
                control = RowControl(options.max_new_tokens, on_tokens)
                ticket.rows.append(_Row(ticket, number, self._encode(session, call, given), control))
            except InputError as error:
                if call.single:
                    raise
                failures.append(ResultEvent(number, error))
        with self._changed:
            if self._closing:
                raise ClosingError("the server is closing")
            if len({row.ticket for row in self._waiting}) >= self._max_queue:
                raise BusyError("the queue is full", "try again later")
            self._waiting.extend(ticket.rows)
            self._changed.notify()
        for failure in failures:
            on_event(failure)
        return ticket

    def close(self) -> None:
        """Take no more requests; the thread ends when all that wait are answered."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def abort(self) -> None:
        """End at once: what waits is given up, what is being worked on stops at its next layer or token."""
        with self._changed:
            self._closing = True
            given_up = list(self._waiting)
            self._waiting.clear()
            for row in self._working:
                row.control.stop()
            self._changed.notify()
        for row in given_up:
            row.ticket.on_event(ResultEvent(row.id, ClosingError("the server is closing")))

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the thread to end; return whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            for row in ticket.rows:
                row.control.stop()
            kept = [row for row in self._waiting if row.ticket is not ticket]
            self._tally.cancelled_rows += len(self._waiting) - len(kept)
            self._waiting = deque(kept)

    def _encode(self, session: Session, call: Call, given: str | Filling) -> Any:
        if isinstance(given, Filling):
            return session.encode_filling(given)
        return session.encode(given) if call.task == "fill" else session.encode_text(given, call.prefix)

    def _listener(self, ticket: Ticket, number: int) -> Callable[[Sequence[int]], None]:
        return lambda ids: ticket.on_event(TokenEvent(number, tuple(ids)))

    # In the model thread.

    def _run(self) -> None:
        try:
            session = self._open_session(self._show)
        except BaseException as error:
            self._closing = True
            self._on_open(error)
            return
        with session:
            self.session = session
            self._on_open(None)
            while batch := self._next_batch(session):
                self._answer(session, *batch)
                with self._changed:
                    self._working = []
                    self._stats = session.stats()

    def _show(self, progress: Progress) -> None:
        if self.session is None:
            self._shown = progress
            return
        for ticket in {row.ticket for row in self._working if row.ticket.call.stream}:
            ticket.on_event(progress)

    def _next_batch(self, session: Session) -> tuple[list[_Row], GenerationOptions] | None:
        """Wait for an input, and return it with all that can share its batch, and how; None when it is time to end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return None
                way = self._waiting[0].ticket.way
                alike = [row for row in self._waiting if row.ticket.way == way]
            # Requests are taken meanwhile, and cancelled.
            most = max(row.ticket.options.max_new_tokens for row in alike)
            options = replace(way[1], max_new_tokens=most)
            chosen = {id(alike[at]) for at in session.together([row.encoded for row in alike], options)}
            with self._changed:
                self._working = batch = [row for row in self._waiting if id(row) in chosen]
                self._waiting = deque(row for row in self._waiting if id(row) not in chosen)
            if batch:
                return batch, options

    def _answer(self, session: Session, batch: list[_Row], options: GenerationOptions) -> None:
        start = time.perf_counter()
        # Each input is drawn with its request's seed plus its own number there, whatever the batch.
        seeds = [row.ticket.options.seed + row.id for row in batch]
        outcomes: Sequence[GenerateResult | ScoreResult | Exception]
        try:
            outcomes = session.answer_batch(
                [row.encoded for row in batch], options, seeds, [row.control for row in batch]
            )
            outcomes = [replace(each, id=row.id) for each, row in zip(outcomes, batch, strict=True)]
        except SwitchrunError as error:
            outcomes = [error] * len(batch)
        except Exception as error:  # a bug must not end the server
            outcomes = [BugError(self._on_bug(error))] * len(batch)
        self._count(batch, outcomes, start)
        for row, outcome in zip(batch, outcomes, strict=True):
            stopped = row.control.stopped and not isinstance(outcome, Exception)
            row.ticket.on_event(ResultEvent(row.id, ClosingError("the server is closing") if stopped else outcome))

    def _count(
        self, batch: list[_Row], outcomes: Sequence[GenerateResult | ScoreResult | Exception], start: float
    ) -> None:
        with self._changed:
            tally = self._tally
            tally.batches += 1
            tally.rows += len(batch)
            tally.work_seconds += time.perf_counter() - start
            for row, outcome in zip(batch, outcomes, strict=True):
                tally.queue_seconds += start - row.ticket.submitted
                if isinstance(outcome, Exception):
                    tally.failed_rows += 1
                    continue
                tally.cancelled_rows += row.control.stopped
                tally.input_tokens += outcome.tokens.input
                tally.output_tokens += outcome.tokens.output


class BugError(SwitchrunError):
    """An exception that is nobody's fault but ours; `id` finds it in the server's log."""

    def __init__(self, number: str) -> None:
        super().__init__(f"internal error {number}", "the server's log says more")
        self.id = number
