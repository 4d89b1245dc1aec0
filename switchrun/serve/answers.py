"""What is sent back: the records of the command line, and events while they come about."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from switchrun.errors import SwitchrunError
from switchrun.model.records import SCHEMA_VERSION, Progress
from switchrun.serve.calls import Call
from switchrun.serve.scheduler import BugError, Event, ResultEvent, Ticket, TokenEvent

if TYPE_CHECKING:
    from switchrun.model.session import Session


class Answer(Protocol):
    """How one request is answered; `call` is what it asks for."""

    call: Call

    def document(self, results: Mapping[int, ResultEvent]) -> Any:
        """Return the answer, with a result for each input."""

    def events(self, ticket: Ticket, event: Event) -> Iterator[str]:
        """Write server-sent events for what came about."""

    def end(self) -> str:
        """Write what comes after the last event."""


class RecordAnswer:
    """Answers with the records that `fill`, `generate` and `score` write, and events of their own kinds."""

    def __init__(self, call: Call, session: Session) -> None:
        self.call = call
        self._session = session

    def document(self, results: Mapping[int, ResultEvent]) -> Any:
        """Return one record, or all of them under `results`."""
        records = [self._record(results[number]) for number in range(len(self.call.inputs))]
        return records[0] if self.call.single else {"results": records}

    def events(self, ticket: Ticket, event: Event) -> Iterator[str]:
        """Write an event: `stage`, `token`, `result` or `error`."""
        if isinstance(event, Progress):
            yield sent("stage", {"stage": event.stage, "done": event.done, "total": event.total})
        elif isinstance(event, TokenEvent):
            yield sent("token", {"id": event.id, "tokens": len(event.ids) - 1, **self._so_far(ticket, event)})
        else:
            yield sent("error" if isinstance(event.result, Exception) else "result", self._record(event))

    def end(self) -> str:
        """Nothing: the last result is the end."""
        return ""

    def _record(self, event: ResultEvent) -> dict[str, Any]:
        if not isinstance(event.result, Exception):
            return event.result.as_record()
        shown = {"id": event.id, "input": self.call.shown[event.id]}
        return {"schema_version": SCHEMA_VERSION, **shown, "error": error_record(event.result)}

    def _so_far(self, ticket: Ticket, event: TokenEvent) -> dict[str, Any]:
        if self.call.task == "generate":
            return {"text": self._session.text_of(event.ids)}
        spans = self._session.spans_of(ticket.encoded(event.id), event.ids)
        return {"spans": [{"sentinel": span.sentinel, "text": span.text} for span in spans]}


def error_record(error: Exception) -> dict[str, Any]:
    """Return an error as records have it; one of ours also with the id that finds it in the log."""
    if not isinstance(error, SwitchrunError):
        raise TypeError("only errors of switchrun's own are shown") from error
    found = {"kind": error.kind, "message": error.message, "hint": error.hint}
    return found | ({"id": error.id} if isinstance(error, BugError) else {})


def sent(name: str | None, data: Any) -> str:
    """Write a server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {dumps(data)}\n\n"


def dumps(record: Any) -> str:
    """Write JSON; no line breaks, no NaN."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)
