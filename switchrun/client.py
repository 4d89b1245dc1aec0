"""A client of `switchrun serve`: the model is open elsewhere, and asked as a `Session` is. No torch.

A server is not trusted: what it sends is bounded, and each record is checked.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar, overload
from urllib.parse import urlsplit

from switchrun.checkpoint.files import MOST_JSON_BYTES, parse_json
from switchrun.errors import (
    BudgetError,
    CorruptCheckpointError,
    InputError,
    ModelError,
    NetworkError,
    StorageError,
    SwitchrunError,
    UsageError,
    printable,
)
from switchrun.model.batching import WINDOW, one_or_many
from switchrun.model.records import FillResult, GenerateResult, GenerationOptions, ScoreResult, read_record
from switchrun.model.sentinels import Filling
from switchrun.serve.calls import HALF, MOST_BODY_BYTES, MOST_INPUTS, Task, no_number
from switchrun.units import MIB

_Result = TypeVar("_Result", bound="GenerateResult | ScoreResult")
_OnResults = Callable[[Sequence[Any]], None]

_RESULTS: Mapping[Task, type[GenerateResult | ScoreResult]] = {
    "fill": FillResult,
    "generate": GenerateResult,
    "score": ScoreResult,
}
_ERRORS: Mapping[str, type[SwitchrunError]] = {
    kind.kind: kind
    for kind in (
        SwitchrunError,
        UsageError,
        InputError,
        ModelError,
        BudgetError,
        CorruptCheckpointError,
        NetworkError,
        StorageError,
    )
}
#: To connect, and to say whether it is ready, a server may take so many seconds.
_GREETING_SECONDS = 30.0
#: How long a server may be busy, in seconds, and how long it may ask to wait at a time.
_BUSY_SECONDS, _MOST_RETRY_SECONDS = 300.0, 60.0
_OPENING_SECONDS = 0.2
_PIECE_BYTES = 64 * 1024
_TOO_LARGE = f"it has more than {MOST_JSON_BYTES // MIB} MiB"
#: What the JSON around inputs and fields takes at the most.
_FRAME_BYTES = 1024
#: Routing makes an answer as large as so many.
_EXPLAINED = 64
_FIELDS_OF_DRAWING = ("temperature", "top_p", "top_k", "seed")
#: On a connection on which nothing comes for a minute, the system asks whether its other end is still there.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))


class Client:
    """A model that `switchrun serve` keeps open, asked as a `Session` is; by several threads, if you like.

    Args:
        url: `http://HOST:PORT`, `https://HOST` or `unix:PATH`.
        token: The server's token, if it has one.
        timeout: Seconds that the server may take for an answer, and to open its model; None is as long as it takes.

    Raises:
        UsageError: The URL or the token is none.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float | None = 600.0) -> None:
        if token is not None and not re.fullmatch("[!-~]+", token):
            raise UsageError("the token is empty, or has characters that no token has")
        if timeout is not None and not timeout > 0:
            raise UsageError(f"timeout: {timeout!r} is no number above 0", option="timeout")
        self.url = printable(url, 200)
        self._connect, self._base = _address(url)
        self._headers = {"Connection": "close"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._timeout = timeout
        self._closed = False

    @overload
    def fill(  # type: ignore[overload-overlap] # a text is a collection of texts, too
        self,
        texts: str,
        options: GenerationOptions | None = None,
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[FillResult]], None] | None = None,
    ) -> FillResult: ...
    @overload
    def fill(
        self,
        texts: Collection[str],
        options: GenerationOptions | None = None,
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[FillResult]], None] | None = None,
    ) -> list[FillResult]: ...
    @overload
    def fill(
        self,
        texts: Iterator[str],
        options: GenerationOptions | None = None,
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[FillResult]], None] | None = None,
    ) -> Iterator[FillResult]: ...
    def fill(self, texts: Any, options: Any = None, *, ids: Any = None, on_results: Any = None) -> Any:
        """Fill texts, as `Session.fill` does; `on_results` is called with the results of each request.

        Raises:
            InputError: A text cannot be filled; others may have been.
            NetworkError: The server cannot be reached, is busy for minutes, or answers what no server should.
            SwitchrunError: As `Session.fill`.
        """
        fields = _fields(GenerationOptions() if options is None else options)
        return one_or_many(texts, (str,), ids, WINDOW, partial(self._answer, "fill", fields, on_results))

    @overload
    def generate(  # type: ignore[overload-overlap] # a text is a collection of texts, too
        self,
        texts: str,
        options: GenerationOptions | None = None,
        *,
        prefix: str = "",
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[GenerateResult]], None] | None = None,
    ) -> GenerateResult: ...
    @overload
    def generate(
        self,
        texts: Collection[str],
        options: GenerationOptions | None = None,
        *,
        prefix: str = "",
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[GenerateResult]], None] | None = None,
    ) -> list[GenerateResult]: ...
    @overload
    def generate(
        self,
        texts: Iterator[str],
        options: GenerationOptions | None = None,
        *,
        prefix: str = "",
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[GenerateResult]], None] | None = None,
    ) -> Iterator[GenerateResult]: ...
    def generate(
        self, texts: Any, options: Any = None, *, prefix: str = "", ids: Any = None, on_results: Any = None
    ) -> Any:
        """Answer texts, as `Session.generate` does: without `options` as the model's own settings say.

        Raises:
            SwitchrunError: As `fill`.
        """
        if isinstance(options, GenerationOptions) and options.alternatives:
            raise UsageError("alternatives: only fill has them", option="alternatives")
        fields = ({} if options is None else _fields(options)) | {"prefix": prefix}
        return one_or_many(texts, (str,), ids, WINDOW, partial(self._answer, "generate", fields, on_results))

    @overload
    def score(
        self,
        fillings: Filling,
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[ScoreResult]], None] | None = None,
    ) -> ScoreResult: ...
    @overload
    def score(
        self,
        fillings: Collection[Filling],
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[ScoreResult]], None] | None = None,
    ) -> list[ScoreResult]: ...
    @overload
    def score(
        self,
        fillings: Iterator[Filling],
        *,
        ids: Iterable[int] | None = None,
        on_results: Callable[[Sequence[ScoreResult]], None] | None = None,
    ) -> Iterator[ScoreResult]: ...
    def score(self, fillings: Any, *, ids: Any = None, on_results: Any = None) -> Any:
        """Score fillings, as `Session.score` does.

        Raises:
            SwitchrunError: As `fill`.
        """
        return one_or_many(fillings, (Filling,), ids, WINDOW, partial(self._answer, "score", {}, on_results))

    def answer_each(
        self,
        task: Task,
        inputs: Sequence[str | Filling],
        ids: Sequence[int],
        options: GenerationOptions | Mapping[str, Any],
    ) -> list[Any]:
        """Return the result of each input, or the InputError of one that has none.

        `options` may also be fields of the server's own: those of `POST /v1/fill` and its like.

        Raises:
            SwitchrunError: As `fill`, but no InputError.
        """
        fields = options if isinstance(options, Mapping) else _fields(options)
        found: dict[int, Any] = {}
        for answers in self._in_requests(task, inputs, ids, fields):
            found |= answers
        return [found[at] for at in range(len(inputs))]

    def wait_until_ready(self, on_wait: Callable[[], object] | None = None) -> None:
        """Wait while the server opens its model; `on_wait` is called once, if there is something to wait for.

        Raises:
            NetworkError: The server cannot be reached, is closing, or takes longer than `timeout`.
            UsageError: The token is missing or wrong.
        """
        end = None if self._timeout is None else time.monotonic() + self._timeout
        waited = False
        while True:
            status, _, found = self._ask("GET", "/ready", None, _GREETING_SECONDS)
            if status == 200 and found.get("status") == "ready":
                return
            if status != 503 or found.get("status") != "opening":
                raise self._refusal(status, found)
            if end is not None and time.monotonic() > end:
                raise NetworkError(f"{self.url} has been opening its model for {self._timeout:g} seconds and more")
            if on_wait is not None and not waited:
                on_wait()
            waited = True
            time.sleep(_OPENING_SECONDS)

    def close(self) -> None:
        """Ask no more; nothing is open between requests."""
        self._closed = True

    def __repr__(self) -> str:
        return f"<Client of {self.url}{', closed' if self._closed else ''}>"

    def __enter__(self) -> Client:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this client is closed", "make another one")

    # A request, and what comes back.

    def _answer(
        self,
        task: Task,
        fields: Mapping[str, Any],
        on_results: _OnResults | None,
        inputs: Sequence[str | Filling],
        ids: Sequence[int],
    ) -> list[Any]:
        found: dict[int, Any] = {}
        for answers in self._in_requests(task, inputs, ids, fields):
            for answer in answers.values():
                if isinstance(answer, InputError):
                    raise answer
            if on_results is not None and answers:
                on_results(list(answers.values()))
            found |= answers
        return [found[at] for at in range(len(inputs))]

    def _in_requests(
        self, task: Task, inputs: Sequence[str | Filling], ids: Sequence[int], fields: Mapping[str, Any]
    ) -> Iterator[dict[int, GenerateResult | ScoreResult | InputError]]:
        """Ask for all inputs, in as many requests as it takes; yields the answers to each, by the inputs' places."""
        self._check_open()
        fields = {name: value for name, value in fields.items() if value not in (None, "")}
        try:
            room = MOST_BODY_BYTES - _FRAME_BYTES - len(_json(fields))
        except UnicodeEncodeError as error:
            raise UsageError(f"prefix: {HALF}", option="prefix") from error
        sizes, refused = _sizes(inputs, room)
        yield refused
        drawn = task != "score" and fields.get("sample", task == "generate")
        share = 1 + fields.get("alternatives", 0) + (_EXPLAINED if fields.get("explain") else 0)
        for group in _groups(sizes, room // share, MOST_INPUTS // share, ids if drawn else None):
            # The server counts from 0 in each request, and draws with the seed plus that.
            seed = {"seed": fields.get("seed", 0) + ids[group[0]]} if drawn else {}
            several = [_as_json(inputs[at]) for at in group]
            body = _json({**fields, **seed, "fillings" if task == "score" else "texts": several})
            records = self._post(f"/v1/{task}", body).get("results")
            if not isinstance(records, list) or len(records) != len(group):
                raise self._misfit(f"it has not {len(group)} results")
            yield {
                at: self._read(task, record, number, ids[at], fields)
                for number, (at, record) in enumerate(zip(group, records, strict=True))
            }

    def _read(
        self, task: Task, record: Any, number: int, own_number: int, fields: Mapping[str, Any]
    ) -> GenerateResult | ScoreResult | InputError:
        """Return what a record says of the input that has this number in the request, and another one here."""
        if isinstance(record, dict) and record.get("id") != number:
            raise self._misfit(f"result {number} has another id")
        if isinstance(record, dict) and "error" in record:
            error = self._refusal(200, record)
            if isinstance(error, InputError):
                return error
            raise error
        try:
            result = replace(read_record(_RESULTS[task], record), id=own_number)
        except ValueError as error:
            raise self._misfit(str(error)) from error
        if isinstance(result, FillResult) and len(result.alternatives or ()) > fields.get("alternatives", 0):
            raise self._misfit("it has more alternatives")
        return result

    def _post(self, path: str, body: bytes) -> dict[str, Any]:
        """Return the answer to a request, which waits its turn if the server is busy."""
        waited = 0.0
        while True:
            status, pause, found = self._ask("POST", path, body, self._timeout)
            if status == 200:
                return found
            if status not in (429, 503) or waited + pause > _BUSY_SECONDS:
                raise self._refusal(status, found)
            if status == 503:
                self.wait_until_ready()
            time.sleep(pause)
            waited += pause

    def _ask(
        self, method: str, path: str, body: bytes | None, seconds: float | None
    ) -> tuple[int, float, dict[str, Any]]:
        """Send a request; returns the status, how long to wait before another one, and the object that was sent."""
        headers = self._headers | ({} if body is None else {"Content-Type": "application/json"})
        end = None if seconds is None else time.monotonic() + seconds
        with contextlib.closing(self._connect(timeout=_GREETING_SECONDS)) as connection:
            try:
                connection.connect()
            except (OSError, ValueError) as error:
                absent = isinstance(error, ConnectionRefusedError | FileNotFoundError)
                hint = "start one: switchrun serve" if absent else ""
                raise NetworkError(f"{self.url} cannot be reached: {_words(error)}", hint) from error
            try:
                _look_after(connection.sock, seconds)
                # It may have answered before it has read all.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, self._base + path, body, headers)
                with connection.getresponse() as response:
                    status, moved = response.status, response.headers.get("Location")
                    pause = _pause(response.headers.get("Retry-After"))
                    text = self._whole(response, end)
            except TimeoutError as error:
                within = "any more" if seconds is None else f"within {seconds:g} seconds"
                raise NetworkError(f"{self.url} does not answer {within}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise NetworkError(f"{self.url} broke off, or does not speak HTTP: {_words(error)}") from error
        if status in range(300, 400):
            raise NetworkError(f"{self.url} sends elsewhere: {moved}", "use that URL, if you trust it")
        try:
            found = parse_json(text, parse_constant=no_number)
            if not isinstance(found, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise NetworkError(f"{self.url} answers {status}, and not as switchrun serve does: {error}") from error
        return status, pause, found

    def _whole(self, response: http.client.HTTPResponse, end: float | None) -> bytes:
        text = bytearray()
        if (response.length or 0) > MOST_JSON_BYTES:
            raise self._misfit(_TOO_LARGE)
        while piece := response.read1(_PIECE_BYTES):
            text += piece
            if len(text) > MOST_JSON_BYTES:
                raise self._misfit(_TOO_LARGE)
            if end is not None and time.monotonic() > end:
                raise TimeoutError
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return bytes(text)

    def _misfit(self, reason: str) -> NetworkError:
        return NetworkError(f"{self.url}: the answer is damaged: {reason}", "is it another version of switchrun?")

    def _refusal(self, status: int, found: Mapping[str, Any]) -> SwitchrunError:
        """Return what to raise for an answer that is none."""
        error = found.get("error")
        if status == 401:
            return UsageError(
                f"{self.url}: the token is missing or wrong", "set SWITCHRUN_TOKEN, or use --token-file FILE"
            )
        if found.get("status") == "closing":
            return NetworkError(f"{self.url}: the server is closing")
        if not isinstance(error, dict):
            return NetworkError(f"{self.url} answers {status}, and not as switchrun serve does")
        kind, message, hint = (printable(error.get(name, "")) for name in ("kind", "message", "hint"))
        if kind in _ERRORS:
            return _ERRORS[kind](message, hint)
        return NetworkError(f"{self.url}: {message}", hint)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's file."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _address(url: str) -> tuple[Callable[..., http.client.HTTPConnection], str]:
    """Return what makes a connection, and what paths begin with."""
    kind, _, path = url.partition(":")
    if kind == "unix" and path and "\0" not in path:
        return partial(_UnixConnection, path), ""
    if kind in ("http", "https") and url.isascii() and url.isprintable() and " " not in url:
        with contextlib.suppress(ValueError):
            parts = urlsplit(url)
            if parts.hostname and "@" not in parts.netloc and not parts.query and not parts.fragment:
                base = parts.path.rstrip("/")
                if kind == "http":
                    return partial(http.client.HTTPConnection, parts.hostname, parts.port or 80), base
                context = ssl.create_default_context()
                return partial(http.client.HTTPSConnection, parts.hostname, parts.port or 443, context=context), base
    raise UsageError(f"{printable(url, 200)} is no server's URL", "write http://HOST:PORT, https://HOST or unix:PATH")


def _fields(options: GenerationOptions) -> dict[str, Any]:
    """Return options as the server has them."""
    if not isinstance(options, GenerationOptions):
        raise UsageError(f"options: {options!r} is no GenerationOptions", option="options")
    left_out = () if options.sample else _FIELDS_OF_DRAWING
    fields = {name: value for name, value in asdict(options).items() if name not in left_out}
    if not options.alternatives:
        del fields["alternatives"]
    return fields


def _as_json(given: str | Filling) -> Any:
    return given if isinstance(given, str) else {"text": given.text, "spans": list(given.spans)}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _sizes(inputs: Sequence[str | Filling], most: int) -> tuple[dict[int, int], dict[int, Any]]:
    """Return how many bytes each input takes, by its place, and an InputError for each that cannot be sent."""
    sizes: dict[int, int] = {}
    refused: dict[int, Any] = {}
    for at, given in enumerate(inputs):
        try:
            sizes[at] = len(_json(_as_json(given))) + len(", ")
        except UnicodeEncodeError:
            refused[at] = InputError(HALF)
            continue
        if sizes[at] > most:
            del sizes[at]
            refused[at] = InputError("the text is larger than a request may be", "shorten it")
    return sizes, refused


def _groups(
    sizes: Mapping[int, int], most_bytes: int, most_inputs: int, ids: Sequence[int] | None
) -> Iterator[list[int]]:
    """Divide inputs among requests; with `ids`, those of a request must follow one another."""
    group: list[int] = []
    total = 0
    for at, size in sizes.items():
        full = len(group) >= most_inputs or total + size > most_bytes
        if group and (full or (ids is not None and ids[at] != ids[group[-1]] + 1)):
            yield group
            group, total = [], 0
        group.append(at)
        total += size
    if group:
        yield group


def _look_after(connected: socket.socket, seconds: float | None) -> None:
    """Let a connection fail when nothing comes for so long, or when its other end is not there any more."""
    connected.settimeout(seconds)
    if connected.family != socket.AF_UNIX:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _pause(retry_after: str | None) -> float:
    """Return how long a server asks to wait, within reason."""
    try:
        return min(_MOST_RETRY_SECONDS, max(0.1, float(retry_after or 1)))
    except ValueError:  # a date
        return 1.0
