"""`Client` against a warm demo model, which must answer as a `Session` does, and against servers that are hostile."""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from switchrun import Client, Filling, GenerationOptions, Session
from switchrun.errors import InputError, NetworkError, SwitchrunError, UsageError
from switchrun.model.records import FillResult, GenerateResult, Routing, ScoreResult, read_record
from switchrun.planning.options import OpenOptions
from tests.cli.fakes import FakeSession
from tests.servers import refusal, response, serving, stub, without_costs

TEXTS = ["A <extra_id_0> walks into a bar.", "The <extra_id_0> is <extra_id_1>.", "größer <extra_id_0>\n"]
FILLINGS = [Filling("A <extra_id_0> walks", ["man"]), Filling("A <extra_id_0> b <extra_id_1>", ["", "c"])]


def record() -> dict[str, Any]:
    """A record of a fill, with all that there can be."""
    fake = FakeSession(OpenOptions(), None, print, lambda _plan: None)
    encoded, options = [fake.encode("A <extra_id_0>")], GenerationOptions(alternatives=2, explain=True)
    [detailed] = fake.fill(encoded, options, ids=[0])
    return json.loads(json.dumps(detailed.as_record()))  # type: ignore[no-any-return]


# Against the real server.


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("offload")
    return Session.open(cpu_memory="64GiB", offload_folder=folder, batch_size="auto", num_beams=4)


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    with serving(session) as found:
        yield found.url


def same(here: Any, there: Any) -> None:
    """Both are results of the same kind, equal but for what they cost."""
    assert type(here) is type(there)
    assert without_costs(here.as_record()) == without_costs(there.as_record())
    if isinstance(here, GenerateResult):
        assert isinstance(here.routing, Routing) == isinstance(there.routing, Routing)


@pytest.mark.parametrize(
    "options",
    [
        None,
        GenerationOptions(max_new_tokens=5, explain=True),
        GenerationOptions(num_beams=2, max_new_tokens=6),
        GenerationOptions(alternatives=2, explain=True, max_new_tokens=6),
        GenerationOptions(sample=True, seed=7, temperature=2.0, top_k=50, top_p=0.9, max_new_tokens=6),
    ],
)
def test_a_client_fills_as_a_session_does(session: Session, url: str, options: GenerationOptions | None) -> None:
    here = session.fill(TEXTS, options, ids=[3, 4, 9])
    with Client(url) as client:
        for one, other in zip(here, client.fill(TEXTS, options, ids=[3, 4, 9]), strict=True):
            same(one, other)
        same(session.fill(TEXTS[0], options), client.fill(TEXTS[0], options))


def test_a_client_generates_and_scores_as_a_session_does(session: Session, url: str) -> None:
    client = Client(url)
    for options in (None, GenerationOptions(sample=True, seed=2, max_new_tokens=6)):
        same(session.generate("Hello", options, prefix="x: "), client.generate("Hello", options, prefix="x: "))
    for one, other in zip(session.score(FILLINGS), client.score(FILLINGS), strict=True):
        same(one, other)
    assert isinstance(client.score(FILLINGS[0]), ScoreResult)
    assert client.fill([]) == []


def test_an_iterator_is_gone_over_as_results_are_asked_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchrun.client.WINDOW", 2)
    taken = itertools.count()
    results = Client(url).fill(TEXTS[next(taken) % 3] for _ in range(5))
    assert next(taken) == 0
    assert next(results).input == TEXTS[1]
    assert next(taken) == 3
    assert [result.id for result in results] == [1, 2, 3, 4]


def test_several_requests_have_each_its_results(session: Session, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchrun.client.MOST_INPUTS", 2)
    batches: list[list[int]] = []
    found = Client(url).fill(TEXTS, on_results=lambda results: batches.append([each.id for each in results]))
    assert batches == [[0, 1], [2]]
    assert [each.text for each in found] == [each.text for each in session.fill(TEXTS)]


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (lambda it: it.fill("no sentinel"), InputError),
        (lambda it: it.fill(["A <extra_id_0>", "<extra_id_1>"]), InputError),
        (lambda it: it.fill("\ud800 <extra_id_0>"), InputError),
        (lambda it: it.fill("A <extra_id_0>", GenerationOptions(num_beams=100)), SwitchrunError),
        (lambda it: it.fill([1]), UsageError),
        (lambda it: it.fill(TEXTS, ids=[1]), UsageError),
        (lambda it: it.fill(TEXTS, 3), UsageError),
        (lambda it: it.generate("A", GenerationOptions(alternatives=2)), UsageError),
        (lambda it: it.score(["A"]), UsageError),
    ],
)
def test_both_fail_in_the_same_way(session: Session, url: str, ask: Callable[[Any], Any], kind: Any) -> None:
    with pytest.raises(kind) as here:
        ask(session)
    with pytest.raises(type(here.value)) as there:
        ask(Client(url))
    if "half of a character" in there.value.message:
        return
    assert there.value.message == here.value.message
    if "memory is reserved" not in there.value.message:  # what helps is said to whoever started the server
        assert there.value.hint == here.value.hint


def test_each_answer_or_what_is_wrong_with_its_input(url: str) -> None:
    several = ["A <extra_id_0>", "no", "\ud800", "B <extra_id_0>", "x" * 5_000_000]
    found = Client(url).answer_each("fill", several, [10, 11, 12, 13, 14], GenerationOptions())
    assert [type(each) for each in found] == [FillResult, InputError, InputError, FillResult, InputError]
    assert [each.id for each in found if isinstance(each, FillResult)] == [10, 13]


def test_a_socket_and_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session.open(cpu_memory="64GiB", offload_folder=tmp_path)
    with serving(session, token="secret", path=tmp_path / "s") as served:
        url = served.url
        assert url == f"unix:{tmp_path}/s"
        assert Client(url, "secret").fill(TEXTS[0]).input == TEXTS[0]
        for wrong in (None, "Secret"):
            with pytest.raises(UsageError, match=r"the token is missing or wrong \(set SWITCHRUN_TOKEN"):
                Client(url, wrong).fill(TEXTS)
            with pytest.raises(UsageError, match="the token is missing or wrong"):
                Client(url, wrong).wait_until_ready()
    with pytest.raises(NetworkError, match="cannot be reached: No such file or directory"):
        Client(url, "secret").fill(TEXTS)


# Whatever else a server may do.


def fails(data: bytes, message: str, **client: Any) -> None:
    with stub(lambda connection, _head, _body: connection.sendall(data)) as url:
        with pytest.raises(NetworkError, match=message) as caught:
            Client(url, **client).fill("A <extra_id_0>")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "broke off, or does not speak HTTP: Remote end closed connection"),
        (b"\xff\x00\x1b[31m garbage\r\n\r\n", "broke off, or does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, "broke off, or does not speak HTTP: got more than 65536 bytes"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200, "broke off, or does not speak HTTP: got more than 100 headers"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", "broke off, or does not speak HTTP: IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}", "broke off, or does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-9\r\n{}", "broke off, or does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "the answer is damaged: it has not 1 results"),
        (response(b"<html>", 502), "answers 502, and not as switchrun serve does: Expecting value"),
        (response([]), "answers 200, and not as switchrun serve does: no object"),
        (response(b"[" * 100_000), "nested too deeply"),
        (response(b"[" + b"{}," * 2_000_000 + b"{}]"), "more values than any model needs"),
        (response(b'{"results": NaN}'), "NaN is no number"),
        (response(b"\xff"), "not as switchrun serve does"),
        (response({"error": 3}, 400), "answers 400, and not as switchrun serve does"),
        (response({}, 200), "it has not 1 results"),
        (response({"results": [1, 2]}), "it has not 1 results"),
        (response({}, 301, Location="http://127.0.0.2/\x1b"), r"sends elsewhere: http://127.0.0.2/\\x1b"),
        (response(b"", 204), "answers 204"),
        (refusal(404, "request"), r"it is so \(do this\)"),
        (response({"status": "closing"}, 503), "answers 503|closing"),
        (refusal(422, "network"), r"^it is so \(do this\)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n{", "it has more than 64 MiB"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_answers_that_are_none(data: bytes, message: str) -> None:
    fails(data, message)


def test_an_answer_without_end_is_not_read_to_its_end() -> None:
    sent = 0

    def answer(connection: socket.socket, _head: str, _body: bytes) -> None:
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sent += connection.send(b" " * 1_000_000)

    with stub(answer) as url, pytest.raises(NetworkError, match="more than 64 MiB"):
        Client(url).fill("A <extra_id_0>")
    assert sent < 100_000_000


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_that_does_not_answer(begin: bytes) -> None:
    gone = threading.Event()

    def answer(connection: socket.socket, _head: str, _body: bytes) -> None:
        connection.sendall(begin)
        while not connection.recv(1):  # until the client closes the connection
            gone.set()
            return

    with stub(answer) as url, pytest.raises(NetworkError, match=r"does not answer within 0\.2 seconds"):
        Client(url, timeout=0.2).fill("A <extra_id_0>")
    assert gone.wait(10)


def test_a_server_whose_machine_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise TimeoutError(110, "Connection timed out")

    monkeypatch.setattr("switchrun.client.Client._whole", fail)
    with (
        stub(lambda connection, _head, _body: connection.sendall(response({}))) as url,
        pytest.raises(NetworkError, match="does not answer any more"),
    ):
        Client(url, timeout=None).fill("A <extra_id_0>")


def test_a_server_that_trickles() -> None:
    def answer(connection: socket.socket, _head: str, _body: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b" ")
            time.sleep(0.02)

    with stub(answer) as url, pytest.raises(NetworkError, match="does not answer"):
        Client(url, timeout=0.3).fill("A <extra_id_0>")


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(NetworkError, match=f"{url} cannot be reached: Connection refused") as caught:
        Client(url).fill("A <extra_id_0>")
    assert caught.value.exit_code == 8
    with pytest.raises(NetworkError, match="cannot be reached"):
        Client("http://nobody.invalid").wait_until_ready()
    with pytest.raises(NetworkError, match="cannot be reached"):
        Client("http://" + "a" * 70 + "..b").wait_until_ready()


def test_plain_http_is_no_https() -> None:
    with (
        stub(lambda connection, _head, _body: connection.sendall(response({}))) as url,
        pytest.raises(NetworkError, match=r"cannot be reached: .*SSL"),
    ):
        Client(url.replace("http:", "https:")).fill("A <extra_id_0>")


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8080", "ftp://x", "http://", "http:///x", "http://h:99999", "http://h:x", "http://u:p@h", "unix:",
     "http://h/?a", "http://h/#a", "http://h x", "http://ö", "http://[::1", "unix:a\0b", "http://h\n"],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match=r"is no server's URL \(write http://HOST:PORT"):
        Client(url)


@pytest.mark.parametrize(
    "wrong", [{"token": "a\nb"}, {"token": "ö"}, {"token": ""}, {"token": "a b"}, {"timeout": 0}, {"timeout": -1.0}]
)
def test_arguments_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Client("http://h", **wrong)


def test_a_closed_client() -> None:
    with Client("http://h") as client:
        pass
    assert repr(client) == "<Client of http://h, closed>"
    for use in (client.__enter__, lambda: client.fill("A <extra_id_0>")):
        with pytest.raises(UsageError, match="this client is closed"):
            use()


@pytest.mark.parametrize(
    ("kind", "code"),
    [("input", 4), ("usage", 2), ("model", 5), ("budget", 6), ("corrupt", 7), ("network", 8), ("storage", 9),
     ("internal", 1), ("busy", 8), ("forbidden", 8)],
)  # fmt: skip
def test_errors_are_what_they_were_there(kind: str, code: int) -> None:
    with (
        stub(lambda connection, _head, _body: connection.sendall(refusal(422, kind))) as url,
        pytest.raises(SwitchrunError, match=r"it is so \(do this\)") as caught,
    ):
        Client(url).fill("A <extra_id_0>")
    assert caught.value.exit_code == code


def results(body: bytes, seeds: list[Any] | None = None) -> bytes:
    """Write what a server would answer to a request to fill."""
    asked = json.loads(body)
    if seeds is not None:
        seeds.append((len(asked["texts"]), asked.get("seed")))
    return response({"results": [record() | {"id": number} for number in range(len(asked["texts"]))]})


def test_a_busy_server_is_asked_again() -> None:
    answers = iter([refusal(429, "busy", Retry_After="0"), refusal(429, "busy", Retry_After="nan")])

    def answer(connection: socket.socket, _head: str, body: bytes) -> None:
        connection.sendall(next(answers, results(body)))

    options = GenerationOptions(alternatives=2, explain=True)
    with stub(answer) as url:
        assert Client(url).fill("A <extra_id_0>", options).text == "A wörd\n[x]"


@pytest.mark.parametrize("wait", ["0", "-5", "1e400", "Sun, 06 Nov 1994 08:49:37 GMT", ""])
def test_a_server_that_stays_busy(monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    slept: list[float] = []
    monkeypatch.setattr("switchrun.client.time.sleep", slept.append)
    monkeypatch.setattr("switchrun.client._BUSY_SECONDS", 3.0)
    with (
        stub(lambda connection, _head, _body: connection.sendall(refusal(429, "busy", Retry_After=wait))) as url,
        pytest.raises(NetworkError, match=r"it is so \(do this\)"),
    ):
        Client(url).fill("A <extra_id_0>")
    assert sum(slept) <= 3
    assert all(0.1 <= each <= 60 for each in slept)


def test_a_server_that_opens_its_model() -> None:
    opening = response({"status": "opening", "stage": "open"}, 503)
    answers = iter([refusal(503, "unavailable", Retry_After="0"), opening, opening, response({"status": "ready"})])
    heads: list[str] = []

    def answer(connection: socket.socket, head: str, body: bytes) -> None:
        heads.append(head.split(" HTTP")[0])
        found = next(answers, None)
        connection.sendall(results(body) if found is None else found)

    with stub(answer) as url:
        client = Client(url)
        client.fill("A <extra_id_0>", GenerationOptions(alternatives=2))
    assert heads == ["POST /v1/fill", "GET /ready", "GET /ready", "GET /ready", "POST /v1/fill"]


def test_a_server_that_never_gets_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchrun.client._OPENING_SECONDS", 0.01)
    waited: list[bool] = []
    with stub(lambda it, _head, _body: it.sendall(response({"status": "opening"}, 503))) as url:
        with pytest.raises(NetworkError, match=r"has been opening its model for 0\.2 seconds"):
            Client(url, timeout=0.2).wait_until_ready(lambda: waited.append(True))
        assert waited == [True]
    with (
        stub(lambda it, _head, _body: it.sendall(response({"status": "closing"}, 503))) as url,
        pytest.raises(NetworkError, match="the server is closing"),
    ):
        Client(url).wait_until_ready()


def test_what_is_sent(tmp_path: Path) -> None:
    seen: list[str] = []

    def answer(connection: socket.socket, head: str, body: bytes) -> None:
        seen.extend([*head.split("\r\n"), body.decode()])
        connection.sendall(results(body))

    with stub(answer) as url:
        Client(f"{url}/below/", "secret").fill("A <extra_id_0>", GenerationOptions(alternatives=2))
    assert seen[0] == "POST /below/v1/fill HTTP/1.1"
    assert {"Authorization: Bearer secret", "Content-Type: application/json", f"Host: {url[7:]}"} <= set(seen)
    options = {"max_new_tokens": 64, "num_beams": 1, "sample": False, "alternatives": 2, "explain": False}
    assert json.loads(seen[-1]) == options | {"texts": ["A <extra_id_0>"]}


@pytest.mark.parametrize(
    ("texts", "options", "requests"),
    [
        (["A"] * 1025, {}, [(1024, None), (1, None)]),
        (["\x01" * 400_000] * 2, {}, [(1, None), (1, None)]),
        (["A"] * 20, {"explain": True}, [(15, None), (5, None)]),
        (["A"] * 3, {"alternatives": 511}, [(2, None), (1, None)]),
        (["A"] * 2, {"alternatives": 5000}, [(1, None), (1, None)]),
        (["A"] * 5, {"sample": True, "seed": 7}, [(2, 17), (3, 27)]),
    ],
)
def test_how_inputs_are_divided(texts: list[str], options: dict[str, Any], requests: list[Any]) -> None:
    """Sampling goes by the ids, which a server counts from 0 in each request."""
    ids = [10, 11, 20, 21, 22] if options.get("sample") else range(len(texts))
    found: list[Any] = []
    plain = {**record(), "alternatives": None}

    def answer(connection: socket.socket, _head: str, body: bytes) -> None:
        asked = json.loads(body)
        found.append((len(asked["texts"]), asked.get("seed")))
        connection.sendall(response({"results": [plain | {"id": at} for at in range(len(asked["texts"]))]}))

    with stub(answer) as url:
        assert len(Client(url).fill(texts, GenerationOptions(**options), ids=ids)) == len(texts)
    assert found == requests


def changed(path: str, value: Any) -> dict[str, Any]:
    """The record, with another value at a place, or none."""
    found = record()
    *way, last = path.split(".")
    at: Any = found
    for name in way:
        at = at[int(name) if isinstance(at, list) else name]
    if value is None and not isinstance(at, list):
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text", 3, "text is 3"),
        ("text", None, "text is missing"),
        ("id", 1, "result 0 has another id"),
        ("schema_version", 2, "it is no record of version 1"),
        ("output_ids", "abc", "output_ids is 'abc'"),
        ("output_ids", [0, 1.5], r"output_ids is 1\.5"),
        ("output_ids", [True], "output_ids is True"),
        ("output_ids", [10**30], "output_ids is 1000"),
        ("finish_reason", "\x1b[31m", r"finish_reason is '\\x1b"),
        ("finish_reason", [], r"finish_reason is \[\]"),
        ("tokens", [], r"tokens is \[\]"),
        ("tokens.input", None, "tokens.input is missing"),
        ("timing.itl_seconds", "1", "timing.itl_seconds is '1'"),
        ("timing.total_seconds", 1e30, "timing.total_seconds is 1e"),
        ("experts.hits", 10**400, "experts.hits is 1000"),
        ("memory", "x", "memory is 'x'"),
        ("spans.0.sentinel", 1, "spans.sentinel is 1"),
        ("alternatives.0.log_probability", None, "alternatives.log_probability is missing"),
        ("routing.layers.0.stack", "x", "routing.layers.stack is 'x'"),
        ("routing.layers.0.experts", [[]], r"routing.layers.experts is \[\]"),
    ],
)
def test_records_that_do_not_fit(path: str, value: Any, message: str) -> None:
    with (
        stub(lambda connection, _head, _body: connection.sendall(response({"results": [changed(path, value)]}))) as url,
        pytest.raises(NetworkError, match=f"the answer is damaged: {message}"),
    ):
        Client(url).fill("A <extra_id_0>", GenerationOptions(alternatives=2, explain=True))


def test_numbers_that_are_none() -> None:
    text = json.dumps({"results": [record()]}).replace('"log_probability": -1.5', '"log_probability": 1e999')
    fails(response(text.encode()), "log_probability is inf")


def test_more_alternatives_than_were_asked_for() -> None:
    fails(response({"results": [record()]}), "it has more alternatives")


def test_a_failing_record_of_another_kind() -> None:
    failing = {"id": 0, "input": "A", "error": {"kind": "corrupt", "message": "m", "hint": ""}}
    with (
        stub(lambda connection, _head, _body: connection.sendall(response({"results": [failing]}))) as url,
        pytest.raises(SwitchrunError, match=r"^m$") as caught,
    ):
        Client(url).fill("A <extra_id_0>")
    assert caught.value.exit_code == 7


def test_a_record_becomes_the_result_that_it_was_made_of() -> None:
    made = record()
    result = read_record(FillResult, made | {"new": 1})
    assert json.loads(json.dumps(result.as_record())) == made
    assert read_record(FillResult, json.loads(json.dumps(dataclasses.replace(result).as_record()))) == result
    for wrong in (None, [], "x", {}):
        with pytest.raises(ValueError, match="it is no record of version 1"):
            read_record(FillResult, wrong)
