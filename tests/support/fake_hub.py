"""A Hub on 127.0.0.1 for the real huggingface_hub client: two origins, signed URLs, a request log and faults.

    with FakeHub() as hub:
        hub.add("google/switch-tiny", folder)
        hub.fail(Fault(after=1000), path="model.safetensors")   # once: the connection breaks after 1,000 bytes
        ...                                                     # a child process with hub.environment()
    assert hub.sent("cdn") == 5000

Folders are served in place, by sendfile: sparse files of any size cost nothing. A process of its own, so that its work
is not measured, with `python -m tests.support.fake_hub google/switch-tiny=FOLDER`: it prints its two origins, and ends
when its stdin does.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import hmac
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

Origin = Literal["hub", "cdn"]
Access = Literal["public", "gated", "private"]

#: What the Hub keeps in large file storage, and so answers with a redirect.
_LARGE = (".bin", ".safetensors", ".pt", ".model", ".h5", ".onnx")
_LARGE_BYTES = 10_000_000
#: Of a larger file only the ends are hashed.
_HASHED_BYTES = 16 << 20
_SEND_BYTES = 4 << 20
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    Attributes:
        status: Answer with this status instead, with `headers` and `body`.
        after: Send so many bytes of the body, then do `then`; 0 is before the first.
        then: `reset` the connection, `close` it, or `stall`: send nothing more until the hub closes.
        silent: Do not even send the headers before `then`.
        whole: Ignore the range that was asked for: 200 and the whole file.
        shift: Answer a range with another one, so many bytes later.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    after: int | None = None
    then: Literal["reset", "close", "stall"] = "reset"
    silent: bool = False
    whole: bool = False
    shift: int = 0


@dataclass
class Request:
    """One request as it was answered; `sent` counts bytes of the body, `seconds` what the answer took."""

    origin: Origin
    method: str
    path: str
    range: tuple[int, int] | None = None
    authorized: bool = False
    status: int = 0
    sent: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Blob:
    path: Path
    size: int
    hash: str
    large: bool

    @classmethod
    def of(cls, name: str, path: Path) -> _Blob:
        size = path.stat().st_size
        if not name.endswith(_LARGE) and size < _LARGE_BYTES:
            data = path.read_bytes()
            return cls(path, size, hashlib.sha1(b"blob %d\0" % size + data).hexdigest(), large=False)
        if size <= _HASHED_BYTES:
            return cls(path, size, hashlib.sha256(path.read_bytes()).hexdigest(), large=True)
        with path.open("rb") as file:
            ends = file.read(_HASHED_BYTES // 2)
            file.seek(-_HASHED_BYTES // 2, os.SEEK_END)
            return cls(path, size, hashlib.sha256(b"%d\0" % size + ends + file.read()).hexdigest(), large=True)


@dataclass
class _Repo:
    access: Access
    commits: dict[str, dict[str, _Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


@dataclass
class _Rule:
    fault: Fault
    origin: Origin | None
    method: str | None
    path: str
    times: int | None


class FakeHub:
    """See the module's text.

    Args:
        latency_seconds: One round trip: before every answer, and once more for a new connection.
        bandwidth: Bytes per second of one connection; None for no limit.
        line: Bytes per second of all connections together; None for no limit.
        quota: Requests to the Hub's own origin (not the API, not the CDN) in a window of so many seconds.
        url_seconds: How long a signed URL is good for.
        compresses: Ignore ranges of clients that also take compressed answers, as some of the CDN's machines do.
    """

    token = "hf_fake"

    def __init__(
        self,
        *,
        latency_seconds: float = 0.0,
        bandwidth: float | None = None,
        line: float | None = None,
        quota: tuple[int, float] | None = None,
        url_seconds: float = 3600.0,
        compresses: bool = False,
    ) -> None:
        self.latency_seconds = latency_seconds
        self.bandwidth = bandwidth
        self.line = line
        self._line_free = 0.0
        self.quota = quota
        self.url_seconds = url_seconds
        self.compresses = compresses
        self.log: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._repos: dict[str, _Repo] = {}
        self._blobs: dict[str, _Blob] = {}
        self._rules: list[_Rule] = []
        self._resolved: list[float] = []
        self._key = os.urandom(16)
        self._signed = 0
        self._expired = 0
        self._servers = [_Server(self, origin) for origin in ("hub", "cdn")]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections and threads."""
        self.closing.set()
        for server in self._servers:
            server.end()

    def wait_for_line(self, size: int) -> None:
        """Block for as long as the line needs for so many bytes, after all that others send before."""
        if self.line is not None:
            with self._lock:
                self._line_free = max(self._line_free, time.monotonic()) + size / self.line
                due = self._line_free
            self.closing.wait(max(0.0, due - time.monotonic()))

    # What it serves.

    def add(self, repo: str, folder: Path, *refs: str, access: Access = "public") -> str:
        """Serve a folder as a new commit of a repository, to which `refs` (`main` if none) then point; the commit."""
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        blobs = {name: _Blob.of(name, folder / name) for name in names}
        listing = "".join(f"{name} {blob.hash}\n" for name, blob in blobs.items())
        commit = hashlib.sha1(f"{repo}\n{listing}".encode()).hexdigest()
        with self._lock:
            found = self._repos.setdefault(repo, _Repo(access))
            found.access = access
            found.commits[commit] = blobs
            found.refs.update(dict.fromkeys(refs or ("main",), commit))
            self._blobs.update({blob.hash: blob for blob in blobs.values()})
        return commit

    def replace(self, repo: str, name: str, path: Path) -> None:
        """Change a file under its commits, as a broken Hub or mirror does."""
        blob = _Blob.of(name, path)
        with self._lock:
            self._blobs[blob.hash] = blob
            for files in self._repos[repo].commits.values():
                files[name] = blob

    def expire_urls(self) -> None:
        """Refuse every URL that was signed until now."""
        with self._lock:
            self._expired = self._signed

    def fail(
        self,
        fault: Fault,
        *,
        origin: Origin | None = "cdn",
        method: str | None = None,
        path: str = "",
        times: int | None = 1,
    ) -> None:
        """Let the next requests fail (`times=None`: all) whose path contains `path`, which for the CDN's is a hash."""
        with self._lock:
            self._rules.append(_Rule(fault, origin, method, path, times))

    def heal(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._rules.clear()

    # What it saw.

    def requests(self, origin: Origin | None = None, method: str | None = None, path: str = "") -> list[Request]:
        """The requests so far, in the order of their arrival."""
        with self._lock:
            return [
                each
                for each in self.log
                if origin in (None, each.origin) and method in (None, each.method) and path in each.path
            ]

    def sent(self, origin: Origin | None = None) -> int:
        """Bytes of bodies sent so far."""
        return sum(each.sent for each in self.requests(origin))

    def environment(self) -> dict[str, str]:
        """Variables for a child process that is to use this Hub, without a token."""
        return environment(self.endpoint)

    def use(self, monkeypatch: Any, *, endpoint: str | None = None) -> None:
        """Let huggingface_hub use this Hub in this process, though it has read its environment."""
        from huggingface_hub import close_session, constants

        url = endpoint or self.endpoint
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        home = Path(os.environ["HF_HOME"])
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        close_session()

    # For the handlers.

    def fault(self, request: Request) -> Fault:
        with self._lock:
            for rule in self._rules:
                fits = rule.origin in (None, request.origin) and rule.method in (None, request.method)
                if fits and rule.path in request.path and rule.times != 0:
                    rule.times = rule.times and rule.times - 1
                    return rule.fault
        return Fault()

    def repo(self, name: str) -> _Repo | None:
        return self._repos.get(name)

    def count_resolve(self) -> tuple[int, int] | None:
        """Count one request against the quota; requests left (-1: refused) and seconds until there are more."""
        if self.quota is None:
            return None
        most, window = self.quota
        now = time.monotonic()
        with self._lock:
            self._resolved = [each for each in self._resolved if each > now - window]
            reset = int((self._resolved[0] + window - now if self._resolved else window) + 1)
            if len(self._resolved) >= most:
                return -1, reset
            self._resolved.append(now)
            return most - len(self._resolved), reset

    def sign(self, blob: _Blob) -> str:
        with self._lock:
            self._signed += 1
            claim = f"{blob.hash}?Number={self._signed}&Expires={time.time() + self.url_seconds:.3f}"
        return f"{self.cdn}/{claim}&Signature={self._signature(claim)}"

    def signed(self, path: str) -> _Blob | None:
        """The file that a signed path names; None if the signature is wrong or has expired."""
        claim, _, signature = path.removeprefix("/").rpartition("&Signature=")
        if not hmac.compare_digest(signature, self._signature(claim)):
            return None
        asked = parse_qs(urlsplit(claim).query)
        if int(asked["Number"][0]) <= self._expired or float(asked["Expires"][0]) < time.time():
            return None
        return self._blobs[claim.partition("?")[0]]

    def _signature(self, claim: str) -> str:
        return hmac.new(self._key, claim.encode(), "sha256").hexdigest()


def environment(endpoint: str) -> dict[str, str]:
    """Variables for a child process that is to use the Hub at `endpoint`, without a token."""
    # With telemetry it asks the Hub for a list of names, some of which it puts into its user agent.
    return {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: FakeHub, origin: Origin) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, hub, origin))
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are expected; a bug of the fake is not."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def end(self) -> None:
        self.shutdown()
        self.server_close()
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub: FakeHub, origin: Origin, *args: Any) -> None:
        self.hub = hub
        self.origin = origin
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.hub.closing.wait(self.hub.latency_seconds)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        start = time.monotonic()
        self.hub.closing.wait(self.hub.latency_seconds)
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        self.entry = Request(
            self.origin,
            self.command,
            self.path,
            (int(match[1] or 0), int(match[2] or -1)) if match else None,
            "Authorization" in self.headers,
        )
        with self.hub._lock:
            self.hub.log.append(self.entry)
        self._fault = self.hub.fault(self.entry)
        try:
            self._respond()
        finally:
            self.entry.seconds = time.monotonic() - start

    def _respond(self) -> None:
        if self._fault.silent:
            self._break()
        elif self._fault.status:
            self._answer(self._fault.status, self._fault.headers, self._fault.body)
        elif self.origin == "cdn":
            self._cdn()
        else:
            self._route([unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")])

    # The Hub's own origin.

    def _route(self, parts: list[str]) -> None:
        if parts[0] == "mirror":
            # As some mirrors do: the same path somewhere else.
            self._answer(308, {"Location": self.hub.endpoint + self.path.removeprefix("/mirror")})
            return
        api = parts[:2] == ["api", "models"]
        if api:
            parts = parts[2:]
        verbs = [i for i, part in enumerate(parts) if part in ("revision", "tree", "resolve")]
        at = verbs[0] if verbs else len(parts)
        name, rest = "/".join(parts[:at]), parts[at:]
        repo = self.hub.repo(name)
        if repo is None or not self._may(name, repo):
            if repo is None or repo.access == "private":
                self._error(404 if self.entry.authorized else 401, "RepoNotFound", "Repository not found")
            return
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.refs.get(revision, revision)
        files = repo.commits.get(commit)
        if files is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif rest[:1] == ["resolve"]:
            self._resolve(commit, files.get("/".join(rest[2:])))
        elif rest[:1] == ["tree"]:
            self._json([_tree_entry(name, blob) for name, blob in files.items()])
        else:
            siblings = [_sibling(name, blob) for name, blob in files.items()]
            gated = "auto" if repo.access == "gated" else False
            private = repo.access == "private"
            self._json({"id": name, "sha": commit, "private": private, "gated": gated, "siblings": siblings})

    def _may(self, name: str, repo: _Repo) -> bool:
        if repo.access == "public" or self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        if repo.access == "gated":
            status = 403 if self.entry.authorized else 401
            self._error(status, "GatedRepo", f"Access to model {name} is restricted.")
        return False

    def _resolve(self, commit: str, blob: _Blob | None) -> None:
        headers = {"X-Repo-Commit": commit}
        left = self.hub.count_resolve()
        if left is not None and self.hub.quota is not None:
            most, window = self.hub.quota
            headers["RateLimit"] = f'"resolvers";r={max(left[0], 0)};t={left[1]}'
            headers["RateLimit-Policy"] = f'"fixed window";"resolvers";q={most};w={window:.0f}'
            if left[0] < 0:
                self._answer(429, {**headers, "Retry-After": str(left[1])}, b"Too Many Requests")
                return
        if blob is None:
            self._error(404, "EntryNotFound", "Entry not found", headers)
        elif blob.large:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.hash}"'}
            self._answer(302, {**headers, "Location": self.hub.sign(blob)}, b"Found. Redirecting")
        else:
            self._file(blob, headers)

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        named = {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message}
        self._json({"error": message}, status, named)

    # The other one.

    def _cdn(self) -> None:
        blob = self.hub.signed(self.path)
        if blob is None:
            text = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
            self._answer(403, {"Content-Type": "application/xml"}, text)
        else:
            self._file(blob, {})

    # Answers.

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self._head(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self._body(memoryview(body)[at : at + size] for at, size in _pieces(0, len(body), self._piece()))

    def _file(self, blob: _Blob, headers: Mapping[str, str]) -> None:
        first, last = 0, blob.size - 1
        status = 200
        headers = {**headers, "ETag": f'"{blob.hash}"', "Accept-Ranges": "bytes"}
        whole = self._fault.whole or (self.hub.compresses and "gzip" in self.headers.get("Accept-Encoding", ""))
        if self.entry.range is not None and not whole:
            first, end = self.entry.range
            if first > last:
                self._answer(416, {"Content-Range": f"bytes */{blob.size}"})
                return
            last = last if end < 0 else min(end, last)
            first, last = first + self._fault.shift, last + self._fault.shift
            status = 206
            headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
        self._head(status, {"Content-Length": str(last - first + 1), **headers})
        if self.command != "HEAD":
            with blob.path.open("rb") as file:
                self._body((file.fileno(), at, size) for at, size in _pieces(first, last + 1, self._piece()))

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.entry.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _piece(self) -> int:
        # A hundredth of a second of a slow line, so that it flows evenly.
        slowest = min(self.hub.bandwidth or _SEND_BYTES * 100, self.hub.line or _SEND_BYTES * 100)
        return max(1, int(slowest / 100))

    def _body(self, pieces: Iterator[memoryview | tuple[int, int, int]]) -> None:
        left = self._fault.after
        due = time.monotonic()
        for piece in pieces:
            size = len(piece) if isinstance(piece, memoryview) else piece[2]
            if left is not None:
                size = min(size, left)
                left -= size
            # Counted first: who has received the last byte finds it in the log.
            self.entry.sent += size
            sent = 0
            try:
                while sent < size:
                    if isinstance(piece, memoryview):
                        sent += self.connection.send(piece[sent:size])
                    else:
                        sent += os.sendfile(self.connection.fileno(), piece[0], piece[1] + sent, size - sent)
            finally:
                self.entry.sent -= size - sent
            if left == 0:
                self._break()
                return
            if self.hub.bandwidth:
                due += size / self.hub.bandwidth
                self.hub.closing.wait(max(0.0, due - time.monotonic()))
            self.hub.wait_for_line(size)
        if left is not None:
            self._break()

    def _break(self) -> None:
        self.close_connection = True
        if self._fault.then == "stall":
            self.hub.closing.wait()
        elif self._fault.then == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Another descriptor of it is open in the server: the reset goes out when both are closed.
            self.connection.close()


def _pieces(first: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    return ((at, min(size, end - at)) for at in range(first, end, size))


def _sibling(name: str, blob: _Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name, "size": blob.size, "blobId": _blob_id(blob)}
    if blob.large:
        entry["lfs"] = {"size": blob.size, "sha256": blob.hash, "pointerSize": 135}
    return entry


def _tree_entry(name: str, blob: _Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": blob.size, "oid": _blob_id(blob)}
    if blob.large:
        entry["lfs"] = {"size": blob.size, "oid": blob.hash, "pointerSize": 135}
    return entry


def _blob_id(blob: _Blob) -> str:
    # A large file's is the hash of the pointer that git keeps.
    return hashlib.sha1(blob.hash.encode()).hexdigest() if blob.large else blob.hash


def main() -> None:
    """Serve folders until stdin ends."""
    parser = argparse.ArgumentParser(description="A fake Hub on 127.0.0.1.")
    parser.add_argument("repos", nargs="+", metavar="REPO=FOLDER")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--bandwidth", type=float, metavar="BYTES_PER_SECOND")
    parser.add_argument("--line", type=float, metavar="BYTES_PER_SECOND", help="of all connections together")
    options = parser.parse_args()
    with FakeHub(latency_seconds=options.latency, bandwidth=options.bandwidth, line=options.line) as hub:
        for each in options.repos:
            repo, _, folder = each.partition("=")
            hub.add(repo, Path(folder))
        _say({"endpoint": hub.endpoint, "cdn": hub.cdn})
        sys.stdin.read()
        seen = [(each.origin, each.method) for each in hub.requests()]
        counts = {f"{origin} {method}": seen.count((origin, method)) for origin, method in sorted(set(seen))}
        cdn = hub.requests("cdn")
        _say({"sent": hub.sent("cdn"), "seconds": sum(each.seconds for each in cdn), "requests": counts})


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
