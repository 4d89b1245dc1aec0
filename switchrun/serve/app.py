"""The routes: who may ask, what is answered, and how errors look."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from switchrun import __version__
from switchrun.errors import BudgetError, InputError, SwitchrunError, UsageError
from switchrun.model.records import Progress
from switchrun.serve.answers import Answer, RecordAnswer, dumps, error_record
from switchrun.serve.calls import MOST_BODY_BYTES, BodyError, Task, parse
from switchrun.serve.completions import CompletionAnswer
from switchrun.serve.metrics import Requests, exposition
from switchrun.serve.openapi import document
from switchrun.serve.scheduler import (
    BugError,
    BusyError,
    ClosingError,
    Event,
    ResultEvent,
    Scheduler,
    Ticket,
    TokenEvent,
)

#: A body may take so many seconds to come.
_BODY_SECONDS = 30.0
_RETRY_SECONDS = 1
_PAGE_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)


@dataclass(frozen=True, slots=True)
class Guard:
    """Who may ask: whoever has the token, if there is one; without one, whoever calls the server by its own name.

    A web page of somebody else's, opened in a browser on this machine, must reach nothing: its requests say where they
    come from, and one that has a name of its own lead here says that name.

    Attributes:
        token: What `Authorization: Bearer` must say; None is nothing.
        hosts: Names that `Host` may say; None is any.
    """

    token: str | None
    hosts: frozenset[str] | None

    def refusal(self, scope: Scope) -> Response | None:
        """Return what to answer instead, if the request may not pass."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.hosts is not None and _name_of(host) not in self.hosts:
            return _error(403, "forbidden", "the server is not known by that name")
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            return _error(403, "forbidden", "pages of other servers may not ask")
        if self.token is None or scope["path"] in ("/", "/health"):
            return None
        given = headers.get("authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            return None
        return _error(401, "unauthorized", "the token is missing or wrong", "send Authorization: Bearer TOKEN")


class _Guarded:
    """Refuses what the guard refuses, and counts all requests."""

    def __init__(self, app: ASGIApp, guard: Guard, requests: Requests) -> None:
        self._app = app
        self._guard = guard
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # the client left
        start = time.perf_counter()

        async def count_and_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._guard.refusal(scope)
            await (self._app if refusal is None else refusal)(scope, receive, count_and_send)
        finally:
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "other"
            self._requests.count(path, status, time.perf_counter() - start)


def make_app(
    scheduler: Scheduler, guard: Guard, on_bug: Callable[[Exception], str], requests: Requests | None = None
) -> ASGIApp:
    """Return the server's app: what it answers comes from the scheduler's session."""
    requests = requests or Requests()

    def answers(task: Task) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            call = parse(task, await _body(request))
            return await _answer(request, scheduler, RecordAnswer(call, _session_of(scheduler)))

        return answer

    async def complete(request: Request) -> Response:
        return await _answer(request, scheduler, CompletionAnswer(await _body(request), _session_of(scheduler)))

    async def models(_request: Request) -> Response:
        session = _session_of(scheduler)
        entry = {"id": session.checkpoint.id, "object": "model", "owned_by": "switchrun", "dtype": session.plan.dtype}
        return _json({"object": "list", "data": [entry]})

    async def health(_request: Request) -> Response:
        return _json({"status": "alive", "version": __version__})

    async def ready(_request: Request) -> Response:
        if scheduler.ready:
            return _json({"status": "ready"})
        opening = scheduler.opening
        status = "closing" if scheduler.session else "opening"
        stage = {} if opening is None else {"stage": opening.stage, "done": opening.done, "total": opening.total}
        return _json({"status": status, **stage}, 503)

    async def metrics(_request: Request) -> Response:
        return PlainTextResponse(exposition(scheduler, requests), media_type="text/plain; version=0.0.4")

    async def openapi(_request: Request) -> Response:
        return _json(document())

    text, policy = _page()

    async def page(_request: Request) -> Response:
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(text, headers=headers)

    async def on_own_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, SwitchrunError)
        return _refused(error)

    async def on_http_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {404: "there is nothing at this path", 405: "this path takes another method"}
        headers = error.headers or {}
        return _error(error.status_code, "request", words.get(error.status_code, error.detail), "", headers)

    async def on_left(_request: Request, _error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it

    async def on_any_error(_request: Request, error: Exception) -> Response:
        return _refused(BugError(on_bug(error)))

    routes = [
        Route("/v1/fill", answers("fill"), methods=["POST"]),
        Route("/v1/generate", answers("generate"), methods=["POST"]),
        Route("/v1/score", answers("score"), methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        Route("/", page),
    ]
    handlers: Any = {
        SwitchrunError: on_own_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_left,
        Exception: on_any_error,
    }
    return _Guarded(Starlette(routes=routes, exception_handlers=handlers), guard, requests)


def _page() -> tuple[str, str]:
    """Return the page, and the policy that lets nothing but its own script and style run."""
    text = (files("switchrun.serve") / "page.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        _, _, rest = text.partition(f"<{tag}")
        inside = rest.partition(">")[2].partition(f"</{tag}>")[0]
        hashes[tag] = f"sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}"
    return text, _PAGE_POLICY.format(**hashes)


# One request.


async def _body(request: Request) -> bytes:
    """Read the body, which is neither large nor slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > MOST_BODY_BYTES:
                    raise HTTPException(413, f"the body has more than {MOST_BODY_BYTES} bytes", _CLOSE)
    except TimeoutError as error:
        raise HTTPException(408, f"the body took more than {_BODY_SECONDS:.0f} seconds", _CLOSE) from error
    return bytes(body)


#: What is still to come of a request is not read.
_CLOSE = {"Connection": "close"}


class _Inbox:
    """What the model thread has for a request, and the loop has not sent yet; no more than it can be in all."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._stage: Progress | None = None
        self._tokens: dict[int, TokenEvent] = {}
        self._results: list[ResultEvent] = []

    def put(self, event: Event) -> None:
        """Take an event, from any thread; one that is overtaken before it was sent is dropped."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._stage = event
        elif isinstance(event, TokenEvent):
            self._tokens[event.id] = event
        else:
            self._tokens.pop(event.id, None)
            self._results.append(event)
        self._news.set()

    async def next(self) -> list[Event]:
        """Wait for events, and return them: how far it is, then tokens, then results."""
        await self._news.wait()
        self._news.clear()
        events: list[Event] = [*([] if self._stage is None else [self._stage]), *self._tokens.values(), *self._results]
        self._stage, self._tokens, self._results = None, {}, []
        return events


async def _answer(request: Request, scheduler: Scheduler, answer: Answer) -> Response:
    """Have a call answered: with a document once all is there, or with events as they come."""
    inbox, call = _Inbox(), answer.call
    ticket = scheduler.submit(call, inbox.put)
    if call.stream:
        events = _events(ticket, inbox, answer)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    results: dict[int, ResultEvent] = {}
    gone = asyncio.ensure_future(_left(request))
    try:
        while len(results) < len(call.inputs):
            news = asyncio.ensure_future(inbox.next())
            await asyncio.wait({news, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                news.cancel()
                raise ClientDisconnect
            results |= {event.id: event for event in news.result() if isinstance(event, ResultEvent)}
        failures = [each.result for each in results.values() if isinstance(each.result, Exception)]
        for failure in failures:
            # What is wrong with one of several inputs stands in its record; all else is about the request.
            if call.single or not isinstance(failure, InputError):
                raise failure
        return _json(answer.document(results))
    finally:
        gone.cancel()
        ticket.cancel()


async def _left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(ticket: Ticket, inbox: _Inbox, answer: Answer) -> AsyncIterator[str]:
    """Write server-sent events until all inputs have their results."""
    left = len(answer.call.inputs)
    try:
        while left:
            for event in await inbox.next():
                left -= isinstance(event, ResultEvent)
                for text in answer.events(ticket, event):
                    yield text
        yield answer.end()
    finally:
        ticket.cancel()


def _refused(error: SwitchrunError) -> Response:
    """Answer with an error of switchrun's own."""
    if isinstance(error, BodyError):
        status = 400
    elif isinstance(error, InputError | UsageError | BudgetError):
        status = 422
    elif isinstance(error, BusyError):
        status = 429
    elif isinstance(error, ClosingError):
        status = 503
    else:
        status = 500
    headers = {"Retry-After": str(_RETRY_SECONDS)} if status in (429, 503) else {}
    return _json({"error": error_record(error)}, status, headers)


def _error(status: int, kind: str, message: str, hint: str = "", headers: Mapping[str, str] | None = None) -> Response:
    return _json({"error": {"kind": kind, "message": message, "hint": hint}}, status, headers)


def _json(record: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(record), status, headers, media_type="application/json")


def _session_of(scheduler: Scheduler) -> Any:
    if scheduler.session is None:
        raise ClosingError("the model is still being opened")
    return scheduler.session


def _name_of(host: str) -> str:
    """Return the name in a `Host` header, without its port."""
    return _split(f"//{host}").hostname or ""


def _split(url: str) -> SplitResult:
    """Split a URL that a client sent; one that is none has no parts."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
