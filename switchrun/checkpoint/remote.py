"""Files of the Hub, read by byte range and never downloaded whole.

The Hub answers a question for a file with a signed URL on another origin, which expires after about an hour. Only the
questions count against its rate limit, so each file is resolved once, and ranges are asked of that URL. All of it goes
through `huggingface_hub`'s own client: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, proxies and certificates work as there.

What may take long without a word, to resolve a file and to open a connection, runs in a daemon thread, so that whoever
waits for it can be woken; the body is read by the caller, straight into its memory.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from switchrun.checkpoint.files import plausible
from switchrun.checkpoint.hub import explain, is_storage
from switchrun.checkpoint.types import RemoteFile, RemoteRepo
from switchrun.errors import CorruptCheckpointError, ModelError, NetworkError, SwitchrunError, printable

T = TypeVar("T")

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_RATE_LIMIT_RESET = re.compile(r";\s*t\s*=\s*(\d+)")
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_HASH = re.compile(r"[0-9A-Za-z]{1,128}", re.ASCII)
#: However long a server asks to wait, it is asked again after that.
_LONGEST_TOLD_SECONDS = 3600.0
#: After so long without an answer, its reason is said.
_SILENT_SECONDS = 3.0
#: Of a refusal's body, what is read and what is shown.
_EXCERPT_BYTES = 4096
_EXCERPT_CHARACTERS = 300
#: And for how long more of it is waited for.
_EXCERPT_SECONDS = 2.0
#: How often `ask_all` looks what is done.
_POLL_SECONDS = 0.01
_CHECK = "check the connection, HTTPS_PROXY and HF_TOKEN"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the Hub is waited for.

    Attributes:
        connect_seconds: For a connection.
        stall_seconds: For the next byte of an answer.
        attempts: After so many failures in a row, without one byte between them, the Hub counts as unreachable.
        first_wait_seconds: Between the first failure and the next attempt; doubled each time up to the longest.
    """

    connect_seconds: float = 10.0
    stall_seconds: float = 10.0
    attempts: int = 6
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 8.0

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.first_wait_seconds * 2.0 ** (failures - 1), self.longest_wait_seconds)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was asked of the Hub until now.

    Attributes:
        bytes: Of files, as they arrived.
        requests: For ranges.
        resolves: To the Hub's own origin, for a file's URL or a repository's list: they count against its rate limit.
        retries: How many of both were repeated ones.
        seconds: In which at least one read was under way.
    """

    bytes: int = 0
    requests: int = 0
    resolves: int = 0
    retries: int = 0
    seconds: float = 0.0


class HubClosedError(NetworkError):
    """A read that `HubRanges.close` ended, or that came after it."""

    def __init__(self) -> None:
        super().__init__("reading from the Hub was stopped")


class HubRanges:
    """Reads ranges of the Hub's files, from any number of threads, until it is closed.

    Args:
        patience: When to give up.
        on_wait: Called, from some thread, with the seconds that the Hub asks to wait: its rate limit is reached, or it
            is down for longer than is waited without a word.
        on_silence: Called likewise with a reason, when nothing has come for some seconds and it is tried again.
    """

    def __init__(
        self,
        patience: Patience | None = None,
        on_wait: Callable[[float], None] | None = None,
        on_silence: Callable[[str], None] | None = None,
    ) -> None:
        self._patience = patience or Patience()
        self._on_wait = on_wait
        self._on_silence = on_silence
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        # All below is guarded by the lock.
        self._urls: dict[RemoteFile, Future[_Url]] = {}
        self._running: set[Future[Any]] = set()
        self._sockets: set[socket.socket] = set()
        self._not_before = 0.0
        self._answered = time.monotonic()
        self._traffic = _Counters()

    def __enter__(self) -> HubRanges:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all reads, which raise HubClosedError at once. Does not block."""
        with self._lock:
            self._stopped.set()
            for future in self._running:
                future.cancel()
            for each in self._sockets:
                # Closing a socket does not wake whoever waits for it. socket's own shutdown: that of ssl also forgets
                # the session that another thread is reading by.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(each, socket.SHUT_RDWR)

    def reopened(self) -> HubRanges:
        """Return one that goes on where this one was closed: with its URLs, its counts and what it knows of waiting."""
        with self._lock:
            other = HubRanges(self._patience, self._on_wait, self._on_silence)
            other._lock, other._traffic, other._not_before = self._lock, self._traffic, self._not_before
            done = {file: url for file, url in self._urls.items() if url.done() and not url.cancelled()}
            other._urls = {file: url for file, url in done.items() if url.exception() is None}
        return other

    @property
    def traffic(self) -> Traffic:
        """The counts so far."""
        with self._lock:
            return self._traffic.taken()

    def list_files(self, repo: str, revision: str | None = None, attempts: int | None = None) -> RemoteRepo:
        """List a repository's files at a revision: a branch, a tag, a commit, `refs/pr/N`, or None for `main`.

        `attempts` takes the place of those of the patience.

        Raises:
            ModelError: The Hub has no such model or revision, or refuses it.
            NetworkError: The Hub could not be reached.
        """
        from huggingface_hub import HfApi

        def ask() -> Any:
            timeout = self._patience.stall_seconds
            return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)

        info = self._result(self._start(lambda: self._ask(repo, repo, revision, ask, attempts)))
        # Names of folders are made of it.
        if not _matches(_COMMIT, info.sha):
            raise NetworkError(f"{repo}: the Hub lists it without its commit", _CHECK)
        files = []
        for file in info.siblings or ():
            content = file.lfs.sha256 if file.lfs else file.blob_id
            if not _is_name(file.rfilename):
                raise NetworkError(f"{repo}: the Hub lists a file under what is no name", _CHECK)
            if not plausible((file.size,)) or not _matches(_HASH, content):
                raise NetworkError(f"{repo}: the Hub lists {file.rfilename} without its size or hash", _CHECK)
            files.append(RemoteFile(repo, info.sha, file.rfilename, file.size, content))
        return RemoteRepo(repo, info.sha, tuple(files))

    def ask_all(self, questions: Mapping[RemoteFile, Callable[[], object]], threads: int = 8) -> None:
        """Have huggingface_hub do something with each file, such as download it, until it is done.

        It is begun again after what passes. When `close` is called, or anything is raised, nothing more is begun, and
        nobody waits for what is under way.

        Raises:
            ModelError: The Hub no longer has the model, or refuses it; the disk is full, or may not be written.
            NetworkError: The Hub could not be reached.
            HubClosedError: `close` was called.
        """
        left = deque(questions.items())

        def work() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    file, question = left.popleft()
                    self._ask(str(file), file.repo, file.commit, question)

        futures = [self._start(work) for _ in range(min(threads, len(left)))]
        try:
            while futures:
                for future in filter(Future.done, list(futures)):
                    futures.remove(future)
                    self._result(future)
                self._sleep(_POLL_SECONDS if futures else 0)
        finally:
            left.clear()

    def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`; errors are those of `read_into`."""
        data = bytearray(length)
        self.read_into(file, offset, memoryview(data))
        return bytes(data)

    def read_into(self, file: RemoteFile, offset: int, into: memoryview) -> None:
        """Fill `into` with the file's bytes from `offset`. Blocks; after an error `into` holds anything.

        What breaks is gone on with at the byte that was reached, and each byte renews the patience.

        Raises:
            CorruptCheckpointError: The file ends before that, or is not what it was when the repository was listed.
            ModelError: The Hub no longer has the model, or refuses it.
            NetworkError: The Hub could not be reached, or does not serve ranges; HF_HUB_OFFLINE is set.
            HubClosedError: `close` was called.
        """
        view = into.cast("B")
        if not 0 <= offset <= offset + len(view) <= file.size:
            raise CorruptCheckpointError(
                f"{file}: the file is truncated: it has {file.size} bytes, not {offset + len(view)} or more"
            )
        with self._lock:
            self._begin_to_wait()
            self._traffic.begin()
        try:
            self._read_all(file, offset, view)
        finally:
            with self._lock:
                self._traffic.end()

    def _read_all(self, file: RemoteFile, offset: int, view: memoryview) -> None:
        done = failures = 0
        refused: _Url | None = None
        while done < len(view):
            url = self._url(file, refused)
            part = _Part(file, offset + done, view[done:])
            try:
                self._receive(url, part)
            except _RefusedError as error:
                # Not every refusal is an expired URL: one fresh URL, then its words.
                if refused is not None:
                    raise NetworkError(f"{file}: the Hub's storage refused: {error}", _CHECK) from error
                refused = url
                self._count_retry()
            except _PassingError as error:
                if part.filled:
                    failures, refused = 0, None
                failures += 1
                self._pause(str(file), failures, error)
            done += part.filled

    # One attempt at a range.

    def _receive(self, url: _Url, part: _Part) -> None:
        response = self._open(url, part)
        try:
            with self._interruptible(response):
                _check_answer(response, part)
                for chunk in response.iter_raw():
                    part.add(chunk)
                    with self._lock:
                        self._traffic.bytes += len(chunk)
                        self._answered = time.monotonic()
        except (SwitchrunError, _RefusedError, _PassingError):
            raise
        except Exception as error:
            self._check_open()
            raise _PassingError(_words(error)) from error
        finally:
            with contextlib.suppress(Exception):
                response.close()
        if part.filled < len(part.view):
            self._check_open()
            raise _PassingError("the answer ended early")

    def _open(self, url: _Url, part: _Part) -> Any:
        from huggingface_hub import get_session

        patience = self._patience
        last = part.offset + len(part.view) - 1
        headers = {**url.headers, "Accept-Encoding": "identity", "Range": f"bytes={part.offset}-{last}"}

        def send() -> Any:
            # Fetched each time: huggingface_hub closes the client that all share, and makes another one.
            session = get_session()
            # Connect, read, write; and no limit for the turn in the client's pool.
            timeout = (patience.connect_seconds, patience.stall_seconds, patience.stall_seconds, None)
            request = session.build_request("GET", url.location, headers=headers, timeout=timeout)
            return session.send(request, stream=True, follow_redirects=True)

        with self._lock:
            self._traffic.requests += 1
        future = self._start(send, undo=lambda response: response.close())
        try:
            return self._result(future)
        except HubClosedError:
            raise
        except Exception as error:
            self._check_open()
            raise _passing(error) or _explained(str(part.file), part.file.repo, part.file.commit, error) from error
        except BaseException:  # Ctrl-C: nobody waits for the answer any more.
            future.cancel()
            raise

    @contextlib.contextmanager
    def _interruptible(self, response: Any) -> Iterator[None]:
        stream = response.extensions.get("network_stream")
        found = stream.get_extra_info("socket") if stream is not None else None
        if not isinstance(found, socket.socket):  # A transport of the user's own.
            yield
            return
        with self._lock:
            self._check_open()
            self._sockets.add(found)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(found)

    # The Hub's own origin.

    def _url(self, file: RemoteFile, refused: _Url | None) -> _Url:
        """Return the file's URL, but not the refused one; one thread asks for it, all others wait for that."""
        with self._lock:
            self._check_open()
            future = self._urls.get(file)
            if future is None or (future.done() and (future.exception() is not None or future.result() is refused)):
                future = self._urls[file] = self._start(lambda: self._resolve(file))
        return self._result(future)

    def _resolve(self, file: RemoteFile) -> _Url:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # it is documented there

        asked = hf_hub_url(file.repo, file.name, revision=file.commit)

        def ask() -> Any:
            return get_hf_file_metadata(asked, timeout=self._patience.stall_seconds)

        found = self._ask(str(file), file.repo, file.commit, ask)
        # A mirror that only redirects says neither; the first range then says the size.
        if found.size not in (None, file.size) or found.etag not in (None, file.hash):
            raise _changed(file)
        location = urljoin(asked, found.location)
        # The token is for the Hub alone.
        own = urlsplit(location)[:2] == urlsplit(asked)[:2]
        return _Url(location, build_hf_headers(token=None if own else False))

    def _ask(
        self, what: str, repo: str, revision: str | None, question: Callable[[], T], attempts: int | None = None
    ) -> T:
        self._begin_to_wait()
        failures = 0
        while True:
            self._sleep(self._not_before - time.monotonic())
            with self._lock:
                self._traffic.resolves += 1
            try:
                answer = question()
                self._answered = time.monotonic()
                return answer
            except Exception as error:
                passing = _passing(error)
                if passing is None:
                    raise _explained(what, repo, revision, error) from error
            failures += 1
            self._pause(what, failures, passing, attempts)

    # Waiting.

    def _pause(self, what: str, failures: int, error: _PassingError, attempts: int | None = None) -> None:
        """Wait for the next attempt, or raise NetworkError if there were too many."""
        if failures >= (attempts or self._patience.attempts):
            raise NetworkError(f"{what}: the Hub could not be reached: {error}", _CHECK) from error
        self._count_retry()
        self._say_silence(error)
        seconds = self._patience.wait(failures) if error.seconds is None else error.seconds
        if error.limited or seconds > self._patience.longest_wait_seconds:
            with self._lock:
                until = time.monotonic() + seconds
                # Several threads are told the same.
                said = until < self._not_before + 1
                self._not_before = max(self._not_before, until)
            if self._on_wait is not None and not said:
                self._on_wait(seconds)
        self._sleep(seconds)

    def _begin_to_wait(self) -> None:
        if not self._traffic.reading:
            self._answered = time.monotonic()

    def _say_silence(self, error: _PassingError) -> None:
        with self._lock:
            silent = error.seconds is None and time.monotonic() - self._answered > _SILENT_SECONDS
            if silent:
                self._answered = time.monotonic()  # not said again at once, by this thread or another
        if silent and self._on_silence is not None:
            self._on_silence(str(error))

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(max(seconds, 0.0)):
            raise HubClosedError

    def _count_retry(self) -> None:
        with self._lock:
            self._traffic.retries += 1

    def _check_open(self) -> None:
        if self._stopped.is_set():
            raise HubClosedError

    # Threads that nobody waits for any more once this is closed.

    def _start(self, work: Callable[[], T], undo: Callable[[T], object] | None = None) -> Future[T]:
        """Run `work` in a thread; `undo` takes back a result that comes too late."""
        future: Future[T] = Future()

        def run() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = work()
            except BaseException as raised:
                error = raised
            with self._lock:
                self._running.discard(future)
                wanted = future.set_running_or_notify_cancel()
            if wanted and error is not None:
                future.set_exception(error)
            elif wanted:
                future.set_result(result)
            elif error is None and undo is not None:
                with contextlib.suppress(Exception):
                    undo(result)

        with self._lock:
            self._check_open()
            self._running.add(future)
        threading.Thread(target=run, name="switchrun-hub", daemon=True).start()
        return future

    def _result(self, future: Future[T]) -> T:
        try:
            return future.result()
        except CancelledError:
            raise HubClosedError from None


@dataclass(frozen=True, slots=True, eq=False)
class _Url:
    """Where a file's ranges are asked for. Compared by identity: a fresh URL may read as the old one did."""

    location: str
    headers: Mapping[str, str]


class _Part:
    """What is still to be read of a range, and how much of that has arrived."""

    def __init__(self, file: RemoteFile, offset: int, view: memoryview) -> None:
        self.file = file
        self.offset = offset
        self.view = view
        self.filled = 0

    def add(self, chunk: bytes) -> None:
        end = self.filled + len(chunk)
        if end > len(self.view):
            raise NetworkError(f"{self.file}: the Hub's storage sent more than was asked for")
        self.view[self.filled : end] = chunk
        self.filled = end


class _Counters:
    """The changing side of `Traffic`."""

    def __init__(self) -> None:
        self.bytes = self.requests = self.resolves = self.retries = 0
        self._reads = 0
        self._since = 0.0
        self._seconds = 0.0

    @property
    def reading(self) -> bool:
        """Whether a read is under way."""
        return self._reads > 0

    def begin(self) -> None:
        if not self._reads:
            self._since = time.monotonic()
        self._reads += 1

    def end(self) -> None:
        self._reads -= 1
        if not self._reads:
            self._seconds += time.monotonic() - self._since

    def taken(self) -> Traffic:
        now = time.monotonic() - self._since if self._reads else 0.0
        return Traffic(self.bytes, self.requests, self.resolves, self.retries, self._seconds + now)


class _PassingError(Exception):
    """A failure after which it is worth trying again; `seconds` is what the server asks to wait, if it says so."""

    def __init__(self, reason: str, seconds: float | None = None, limited: bool = False) -> None:
        super().__init__(reason)
        self.seconds = seconds
        self.limited = limited


class _RefusedError(Exception):
    """The storage refuses the URL, which may have expired."""


def _check_answer(response: Any, part: _Part) -> None:
    """Return if the body is what was asked for; nothing of it has been read."""
    status = response.status_code
    passing = _passing_status(response)
    if passing is not None:
        raise passing
    if status == 416:
        raise _changed(part.file)
    if status not in (200, 206):
        raise _RefusedError(f"{status} {response.reason_phrase}: {_excerpt(response)}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise NetworkError(f"{part.file}: the Hub's storage sent the file compressed", "try again without a proxy")
    first, last, size = _range_of(response, part)
    if size != part.file.size:
        raise _changed(part.file)
    if (first, last) != (part.offset, part.offset + len(part.view) - 1):
        # Also a whole file, which is not read: it may have 9 GB.
        raise NetworkError(
            f"{part.file}: the Hub's storage does not send the range that was asked for",
            "if HF_ENDPOINT names a mirror, or a proxy is set, try without",
        )


def _range_of(response: Any, part: _Part) -> tuple[int, int, int]:
    """Which bytes of how many an answer holds, by its headers."""
    if response.status_code == 200:
        size = response.headers.get("Content-Length", "")
        # A file that was changed is not told from a server that ignores the range: both are refused.
        return 0, int(size) - 1 if size.isdecimal() else -1, part.file.size
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found is None:
        return -1, -1, part.file.size
    return int(found[1]), int(found[2]), part.file.size if found[3] == "*" else int(found[3])


def _excerpt(response: Any) -> str:
    data, end = b"", time.monotonic() + _EXCERPT_SECONDS
    for chunk in response.iter_raw():
        data += chunk
        if len(data) >= _EXCERPT_BYTES or time.monotonic() > end:
            break
    return printable(data[:_EXCERPT_BYTES].decode("utf-8", "replace"), _EXCERPT_CHARACTERS)


def _passing(error: Exception) -> _PassingError | None:
    """What to try again after; None for what stays as it is."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return _passing_status(error.response)
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _passing(error.__cause__)  # A download that failed.
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.HFValidationError)) or is_storage(error):
        return None
    # All else, whichever name the HTTP library gives it: names change with huggingface_hub's version, and a client
    # that another thread closes fails in many ways.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return None
        cause = cause.__cause__ or cause.__context__
    return _PassingError(_words(error))


def _passing_status(response: Any) -> _PassingError | None:
    status = response.status_code
    if status not in (408, 429) and status < 500:
        return None
    return _PassingError(f"{status} {response.reason_phrase}", _told_wait(response.headers), limited=status == 429)


def _told_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by an answer's headers, an hour at most; None if they say nothing."""
    told = headers.get("Retry-After", "").strip()
    reset = _RATE_LIMIT_RESET.search(headers.get("RateLimit", ""))
    seconds: float | None = None
    if told.isdecimal():
        seconds = float(told)
    else:
        # Dates can be any number of years away.
        with contextlib.suppress(ValueError, OverflowError):
            seconds = max(parsedate_to_datetime(told).timestamp() - time.time(), 0.0)
    if seconds is None and reset is not None:
        seconds = float(reset[1])
    return None if seconds is None else min(seconds, _LONGEST_TOLD_SECONDS)


def _explained(what: str, repo: str, revision: str | None, error: Exception) -> SwitchrunError:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled) and what != repo:
        return NetworkError(
            f"{what}: what is needed of it is not kept on this machine, and HF_HUB_OFFLINE is set", "unset it once"
        )
    known = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.OfflineModeIsEnabled)
    if isinstance(error, known) or is_storage(error):  # A gated repository is one that was not found, too.
        return explain(repo, revision, error)
    if isinstance(error, errors.HFValidationError):
        return ModelError(f"{what}: the Hub has no such names: {_words(error)}")
    if isinstance(error, errors.EntryNotFoundError):
        return CorruptCheckpointError(f"{what}: the file is gone from the Hub", "open the model again")
    if isinstance(error, errors.HfHubHTTPError):
        return NetworkError(f"{what}: the Hub refused: {error.server_message or _words(error)}", _CHECK)
    return NetworkError(f"{what}: the Hub could not be reached: {_words(error)}", _CHECK)


def _changed(file: RemoteFile) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{file}: the file on the Hub is not the one that commit {file.commit[:8]} names: its size or hash differs",
        "if HF_ENDPOINT names a mirror, try without it",
    )


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_name(value: object) -> bool:
    """Whether it is text that a file can be called by, here and in an address."""
    try:
        return isinstance(value, str) and "\0" not in value and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
