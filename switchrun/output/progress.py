"""The line at the bottom of a terminal that shows how far the work is, erased before anything else is written.

It is our own, and not rich's: rich takes 0.14 s to import, and the first line has to be there at once.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePath
from typing import Any, TextIO

from switchrun.errors import printable
from switchrun.model.records import Progress
from switchrun.output.terminal import columns_of, cut, obeys_codes, width
from switchrun.units import format_bytes, format_rate, format_seconds

#: The line is drawn at most this often, in seconds: terminals are slow, and the work should not wait for one.
REDRAW_SECONDS = 0.1
#: Where no line can be drawn, in a job's log, one is written this often.
REPORT_SECONDS = 30.0
#: A rate is that of so many seconds, and of no less than so many: it would jump.
_WINDOW_SECONDS, _SETTLING_SECONDS = 10.0, 1.0
#: Bytes a second below which the digits of a rate say nothing.
_LEAST_RATE = 5_000
#: From then on a step shows how long it has taken, or may take.
_LONG_SECONDS = 2.0
#: Nobody works that is silent for so long.
_IDLE_SECONDS = 5.0
#: What a model's name takes of the line at most; and where less important things have room, too.
_NAME_COLUMNS, _WIDE_COLUMNS = 32, 100

#: The stages in which inputs are answered; before them the model is opened.
_WORK = ("encode", "decode", "score")

_ERASE = "\r\x1b[2K"


class Line:
    """A line that is drawn over and over; where that cannot be, in a log, it is written now and then. For any thread.

    Args:
        stream: Where to draw; stderr.
        wanted: False to draw and write nothing.
    """

    def __init__(self, stream: TextIO, *, wanted: bool = True) -> None:
        self._stream = stream
        self._wanted = wanted
        self._draws = wanted and obeys_codes(stream)
        self._lock = threading.RLock()
        self._shown = False
        self._drawn_at = 0.0
        self._written_at = time.monotonic()

    def clear(self) -> None:
        """Erase the line; the next update draws it at once."""
        with self._lock:
            if self._shown:
                self._write(_ERASE)
            self._shown, self._drawn_at = False, 0.0

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Erase the line, and draw none for as long as the block runs, in which something else is written."""
        with self._lock:
            self.clear()
            yield

    def begin(self, text: str) -> None:
        """Say at once what is being done, also on a terminal that no line can be drawn on, but in no log."""
        with self._lock:
            if self._draws:
                self._draw([text])
            elif self._wanted and self._stream.isatty():
                self._write(f"{text}\n")

    def update(self, describe: Callable[[], Sequence[str]], *, at_once: bool = False) -> None:
        """Draw what is described, or write it, if it is time to.

        The description has parts, the most important first: the last ones are left out where there is no room.
        """
        with self._lock:
            now = time.monotonic()
            if self._draws:
                if at_once or now - self._drawn_at >= REDRAW_SECONDS:
                    self._draw(describe())
            elif self._wanted and now - self._written_at >= REPORT_SECONDS:
                self._written_at = now
                self._write(f"switchrun: {', '.join(describe())}\n")

    def _draw(self, parts: Sequence[str]) -> None:
        self._drawn_at, self._shown = time.monotonic(), True
        # One column is left free: a terminal would wrap after the last one.
        columns = columns_of(self._stream) - 1
        text = ", ".join(parts)
        while len(parts) > 1 and width(text) > columns:
            parts = parts[:-1]
            text = ", ".join(parts)
        self._write(_ERASE + cut(text, columns))

    def _write(self, text: str) -> None:
        with suppress(OSError):  # without stderr the work goes on
            self._stream.write(text)
            self._stream.flush()


class _Rate:
    """How fast a count grows, over the last few seconds, and as it last grew until then; 0 once it has stood still.

    Args:
        patience_seconds: After so long without growth it stands still.
    """

    def __init__(self, patience_seconds: float = _IDLE_SECONDS) -> None:
        self._patience = patience_seconds
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        #: When it grew, and to what.
        self._grown: deque[tuple[float, int]] = deque()
        self._noted_at = 0.0

    def note(self, count: int) -> None:
        """Note what has been counted until now; what is less than before is another count."""
        now, grown = time.monotonic(), self._grown
        if grown and count < grown[-1][1]:
            grown.clear()
        if not grown:
            grown.append((now, count))
        elif count > grown[-1][1]:
            if now - grown[-1][0] > self._patience:  # it stood still until lately
                before = grown[-1][1]
                grown.clear()
                grown.append((self._noted_at, before))
            if len(grown) > 1 and now - grown[-2][0] < REDRAW_SECONDS:
                grown.pop()
            grown.append((now, count))
        while len(grown) > 2 and now - grown[1][0] >= _WINDOW_SECONDS:
            grown.popleft()
        self._noted_at = now

    @property
    def per_second(self) -> float:
        """The rate."""
        if len(self._grown) < 2 or time.monotonic() - self._grown[-1][0] > self._patience:
            return 0.0
        (start, before), (end, after) = self._grown[0], self._grown[-1]
        return (after - before) / (end - start) if end - start >= _SETTLING_SECONDS else 0.0


class SessionProgress(Line):
    """A callback for a session: what it does in words, how far it is, and how fast it reads.

    Args:
        stream: Where to draw; stderr.
        model: What the user calls the model; None is the demo.
        label: What an input is called (`line`); None if there is only one.
        wanted: False to draw and write nothing.

    Attributes:
        expected_hub_bytes: What is expected to come from the Hub until the first fill is done; 0 if nothing is.
    """

    _at_most, _times_steps = "at most ", True

    def __init__(
        self, stream: TextIO, model: str | None = None, label: str | None = None, *, wanted: bool = True
    ) -> None:
        super().__init__(stream, wanted=wanted)
        self.expected_hub_bytes = 0
        self._model, self._label = _short_name(model), label
        self._batch = 0
        self._last = Progress("replay", 0, 0, 0)  # nothing that a session begins with
        self._stage_at = self._called_at = time.monotonic()
        self._stage_done = self._stage_hub_bytes = 0
        self._tokens, self._read, self._fetched = _Rate(math.inf), _Rate(), _Rate()

    def opening(self) -> None:
        """Say that the model is being opened, before anything else is known of it."""
        self.begin(f"opening {self._model}…")

    def __call__(self, progress: Progress) -> None:
        """Draw it, at once if the stage is another."""
        with self._lock:
            now = time.monotonic()
            if now - self._called_at > _IDLE_SECONDS:
                self._written_at = now  # it waited for inputs
            self._called_at = now
            changed = progress.stage != self._last.stage or progress.ids != self._last.ids
            if changed:
                self._stage_at, self._stage_done, self._stage_hub_bytes = now, progress.done, progress.hub_bytes
                self._tokens.reset()
            self._batch += progress.ids != self._last.ids
            self._last = progress
            self._read.note(progress.load_bytes)
            self._fetched.note(progress.hub_bytes)
            if progress.stage == "decode":
                self._tokens.note(progress.done)
            self.update(self._describe, at_once=changed)

    def _describe(self) -> list[str]:
        step = self._last
        opening = "" if step.stage in _WORK else f"opening {self._model}: "
        first, *rest = self._describe_step(step)
        return [f"{opening}{first}", *rest]

    def _describe_step(self, step: Progress) -> list[str]:
        if step.stage not in _WORK:
            return self._describe_opening(step)
        first, *rest = self._describe_work(step)
        return [f"{self._where(step.ids)}{first}", *rest]

    def _describe_opening(self, step: Progress) -> list[str]:
        seconds = time.monotonic() - self._stage_at
        rate = self._fetched.per_second
        if step.stage in ("download", "fetch") and step.total:
            # Pieces are counted when they are whole; what has come of them is known too.
            arrived = self._stage_done + step.hub_bytes - self._stage_hub_bytes
            done = min(max(step.done, arrived), step.total)
            verb = "downloading" if step.stage == "download" else "fetching"
            return [f"{verb} {_of(done, step.total)}", *_rest(step.total - done, rate)]
        if step.stage == "index" and step.total > 1:
            parts = [f"reading headers, {step.done} of {step.total} files"]
            parts += [format_bytes(step.hub_bytes), *_rest(0, rate)] if step.hub_bytes else []
            left = seconds / step.done * (step.total - step.done)
            return parts + ([f"{_rough(left)} left"] if seconds >= _LONG_SECONDS and left else [])
        if step.stage == "open":
            return [f"reading dense weights, {_of(step.done, step.total)}"]
        words = {
            "ask": "asking the Hub",
            "index": "reading headers",
            "plan": "planning",
            "fetch": "another process fetches the dense weights",
            "import": "importing torch and transformers",
        }[step.stage]
        return [words, *([_rough(seconds)] if seconds >= _LONG_SECONDS and self._times_steps else [])]

    def _describe_work(self, step: Progress) -> list[str]:
        speed: list[str] = []
        if step.stage == "decode":
            what, speed = f"token {step.done} of {self._at_most}{step.total}", self._speed(len(step.ids))
        elif step.stage == "encode" and step.done == step.total:
            what = "waiting for the first token"
        else:
            layer = "layer" if step.stage == "score" else "encoder layer"
            what = f"{layer} {min(step.done + 1, step.total)} of {step.total}"
        if fetching := self._fetched.per_second:
            left = self.expected_hub_bytes - step.hub_bytes
            expected = f" of ~{format_bytes(self.expected_hub_bytes)}" if left > 0 else ""
            return [what, f"Hub: {format_bytes(step.hub_bytes)}{expected}", *_rest(left, fetching), *speed]
        if reading := self._read.per_second:
            return [what, f"{format_bytes(step.load_bytes)} read at {format_rate(reading)}", *speed]
        return [what, *speed, *([f"{format_bytes(step.load_bytes)} read"] if step.load_bytes else [])]

    def _speed(self, inputs: int) -> list[str]:
        rate = self._tokens.per_second
        if not rate:
            return []
        each = " each" if inputs > 1 else ""
        return [f"{rate:.1f} tokens/s{each}" if rate >= 1 else f"{_rough(1 / rate)} a token"]

    def _where(self, ids: Sequence[int]) -> str:
        """Say which inputs are worked on."""
        if self._label is None or not ids:
            return ""
        first, last = min(ids) + 1, max(ids) + 1
        if len(ids) == 1:
            return f"{self._label} {first}: "
        batch = f"batch {self._batch}, " if not self._draws or columns_of(self._stream) >= _WIDE_COLUMNS else ""
        if last - first + 1 == len(ids):
            return f"{batch}{self._label}s {first}–{last}: "
        return f"{batch}{len(ids)} {self._label}s: "


class InputProgress(SessionProgress):
    """A callback for a session that answers a file: how many inputs are through, how fast, and how long it will take.

    Args:
        stream: Where to draw; stderr.
        model: What the user calls the model; None is the demo.
        total: How many inputs there are.
        done: How many were through before.
        wanted: False to draw and write nothing.
    """

    def __init__(self, stream: TextIO, model: str | None, total: int, done: int, *, wanted: bool = True) -> None:
        super().__init__(stream, model, wanted=wanted)
        self._done = self._before = done
        self._total = total
        self._start: float | None = None
        self._done_at = 0.0

    def __call__(self, progress: Progress) -> None:
        """As `SessionProgress`; but how far a batch is comes last, and how long it took to open does not count."""
        if self._start is None and progress.stage in _WORK:
            self._start = time.monotonic()
        super().__call__(progress)

    def answered(self, done: int) -> None:
        """Note that so many inputs are through."""
        self._done, self._done_at = done, time.monotonic()

    def describe(self) -> list[str]:
        """Say how far it is."""
        parts = [f"{self._done:,} of {self._total:,} inputs ({100 * self._done // max(1, self._total)} %)"]
        # Until the last answers: between two batches the rate would only sink.
        seconds = 0.0 if self._start is None else self._done_at - self._start
        if self._done == self._before or seconds < _SETTLING_SECONDS:
            return parts
        each = seconds / (self._done - self._before)
        parts.append(f"{1 / each:.1f} inputs/s" if each < 1 else f"{format_seconds(each)} an input")
        left = (self._total - self._done) * each - (time.monotonic() - self._done_at)
        return [*parts, *([f"{_rough(left)} left"] if left > 0 else [])]

    def _describe_work(self, step: Progress) -> list[str]:
        return [*self.describe(), *super()._describe_work(step)]


class MeasurementProgress(SessionProgress):
    """Shows what `bench` or `eval` measures, for how long already, and how far the process is that measures it."""

    _at_most, _times_steps = "", False  # there are always as many, and the time is that of all steps

    def __init__(self, stream: TextIO, *, wanted: bool = True) -> None:
        super().__init__(stream, label="fill", wanted=wanted)
        self._what, self._began = "", 0.0

    def watch(self, what: str) -> Callable[[Mapping[str, Any] | None], None]:
        """Say what is measured from now on; return what takes the fields of a `Progress`, None while there is none."""
        with self._lock:
            self._what, self._began = printable(what), time.monotonic()
            if self._draws:
                self._draw([self._what])
            elif self._wanted:
                self._written_at = self._began
                self._write(f"switchrun: {self._what}\n")
        return self._take

    def _take(self, step: Mapping[str, Any] | None) -> None:
        if step is None:
            self.update(lambda: self._head)
        else:
            self(Progress(**{**step, "ids": tuple(step["ids"])}))

    @property
    def _head(self) -> list[str]:
        return [self._what, _rough(time.monotonic() - self._began)]

    def _describe(self) -> list[str]:
        step = self._last
        if step.stage == "replay":
            return [*self._head, "reading the same without a model"]
        if step.stage not in ("score", "generate"):
            return [*self._head, *self._describe_step(step)]
        parts = [f"passage {step.done + 1} of {step.total}"] if step.stage == "generate" else self._describe_work(step)
        left = (time.monotonic() - self._stage_at) / max(1, step.done) * (step.total - step.done)
        return [*self._head, parts[0], *([f"{_rough(left)} left"] if step.done and left else []), *parts[1:]]


class ByteProgress(Line):
    """A callback for work that is counted in bytes: how much is done, how fast, and how long it will take.

    Args:
        stream: Where to draw; stderr.
        label: What is being done, in a word.
        wanted: False to draw and write nothing.
    """

    def __init__(self, stream: TextIO, label: str, *, wanted: bool = True) -> None:
        super().__init__(stream, wanted=wanted)
        self._label = label
        # What comes before the first byte, such as importing torch, says nothing about the rate.
        self._rate = _Rate()

    def __call__(self, done: int, total: int) -> None:
        """Draw that `done` of `total` bytes are through, unless that was drawn just now."""
        with self._lock:
            self._rate.note(done)
            percent = f" ({100 * done // total} %)" if total else ""
            begin = f"{self._label}: {_of(done, total)}{percent}"
            self.update(lambda: [begin, *_rest(total - done, self._rate.per_second)])


def _short_name(model: str | None) -> str:
    """Return what a model is called in a line: the last part of its path or id."""
    if model is None:
        return "the demo model"
    name, at, revision = model.partition("@")
    return cut(printable(f"{PurePath(name).name or name}{at}{revision}"), _NAME_COLUMNS)


def _of(done: int, total: int) -> str:
    return f"{format_bytes(done)} of {format_bytes(total)}"


def _rest(left: int, rate: float) -> list[str]:
    """Write how fast bytes come, and how long the others will take, as far as that is known."""
    if rate < _LEAST_RATE:
        return []
    return [format_rate(rate), *([f"{_rough(left / rate)} left"] if left > 0 else [])]


def _rough(seconds: float) -> str:
    """Write a duration that is no more than a guess, or that is growing: `12 s`, `16 min`, `2 h 05 min`."""
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 119.5 * 60 else format_seconds(seconds)
