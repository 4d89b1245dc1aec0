"""What each route answers: the records of a session, OpenAI's shape, events, and one shape for every error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from switchrun import Filling, GenerationOptions, Session
from switchrun.serve.calls import FIELDS, MOST_INPUTS
from tests.conftest import validate
from tests.serve.conftest import Gate, open_tiny
from tests.servers import Answered, Served, serving, wait_for

TEXTS = (
    "the <extra_id_0> sat on the <extra_id_1> .",
    "a <extra_id_0> walks into a bar",
    "the cat <extra_id_0>",
    "salt and <extra_id_0> " * 1 + "and a man walks into a bar with a beer",
)
#: What differs from run to run.
LATELY = ("timing", "memory", "experts")


def lasting(record: dict[str, Any]) -> Any:
    """The rest of a record; its numbers, which depend a little on the batch, as good as equal."""

    def near(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: near(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [near(each) for each in value]
        return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value

    return near({name: value for name, value in record.items() if name not in LATELY})


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    """Requests of many kinds, which come at once."""
    ways: list[dict[str, Any]] = [
        {},
        {"max_new_tokens": 3},
        {"max_new_tokens": 11},
        {"num_beams": 2, "max_new_tokens": 5},
        {"sample": True, "temperature": 3.0, "seed": 5},
        {"sample": True, "temperature": 3.0, "seed": 6, "max_new_tokens": 7},
        {"alternatives": 2, "max_new_tokens": 5},
        {"explain": True, "max_new_tokens": 4},
    ]
    return [
        {"text": TEXTS[at % 4], **way} if at % 3 else {"texts": list(TEXTS[: at % 4 + 1]), **way}
        for at, way in enumerate(ways * 3)
    ]


def test_records_are_the_sessions_whatever_else_comes(session: Session, cases: list[dict[str, Any]]) -> None:
    expected = []
    for case in cases:
        way = {name: value for name, value in case.items() if name not in ("text", "texts")}
        options = GenerationOptions(**{"max_new_tokens": 16} | way)
        texts = case.get("texts", [case.get("text")])
        expected.append([lasting(each.as_record()) for each in session.fill(texts, options)])
    gate = Gate(session)
    with serving(session) as served, ThreadPoolExecutor(len(cases)) as pool:
        answers = [pool.submit(served.post, "/v1/fill", **{"max_new_tokens": 16} | case) for case in cases]
        wait_for(lambda: served.scheduler.tally()[2] == len(cases))
        gate.opened.set()
        for case, answer, records in zip(cases, answers, expected, strict=True):
            found = answer.result().record
            if "text" in case:
                validate(found, "fill")
                assert lasting(found) == records[0]
            else:
                assert [lasting(each) for each in found["results"]] == records
    # Those of a kind came together: 8 kinds, of which some differ in their limits or seeds only.
    assert len(gate.batches) < len(cases) / 2


def test_generate_and_score(folder: Any, small_process: None) -> None:
    with open_tiny(folder) as session:
        own = session.own_options(max_new_tokens=5)
        generated = lasting(session.generate("a man", own, prefix="the cat ").as_record())
        scored = lasting(session.score(Filling(TEXTS[0], ["cat", "mat"])).as_record())
    with serving(open_tiny(folder)) as served:
        answer = served.post("/v1/generate", text="a man", prefix="the cat ", max_new_tokens=5)
        validate(answer.record, "generate")
        assert lasting(answer.record) == generated
        filling = {"text": TEXTS[0], "spans": ["cat", "mat"]}
        answer = served.post("/v1/score", **filling)
        validate(answer.record, "score")
        assert lasting(answer.record) == scored
        several = served.post("/v1/score", fillings=[filling] * 2).record["results"]
        assert [lasting(each) for each in several] == [scored, scored | {"id": 1}]


def test_one_of_several_texts_that_cannot_be_filled(served: Served) -> None:
    answer = served.post("/v1/fill", texts=[TEXTS[0], "no sentinel", TEXTS[1]], max_new_tokens=2)
    assert answer.status == 200
    records = answer.record["results"]
    assert [each["id"] for each in records] == [0, 1, 2]
    assert records[1]["error"]["kind"] == "input"
    validate(records[1], "fill")
    assert served.post("/v1/fill", texts=[]).record == {"results": []}


def test_blanks_become_sentinels(served: Served) -> None:
    record = served.post("/v1/fill", text="a ___ walks", blank="___", max_new_tokens=2).record
    assert record["input"] == "a <extra_id_0> walks"


def events_of(answer: Answered) -> Iterator[tuple[str | None, Any]]:
    for block in answer.body.decode().split("\n\n")[:-1]:
        found = re.fullmatch(r"(?:event: (\w+)\n)?data: (.*)", block)
        assert found, block
        yield found[1], found[2] if found[2] == "[DONE]" else json.loads(found[2])


def test_events(served: Served) -> None:
    answer = served.post("/v1/fill", texts=[TEXTS[0], "none", TEXTS[1]], max_new_tokens=5, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = list(events_of(answer))
    names = [name for name, _ in events]
    assert set(names) == {"stage", "token", "result", "error"}
    results = {data["id"]: data for name, data in events if name == "result"}
    assert sorted(results) == [0, 2]
    for number, record in results.items():
        last = [data for name, data in events if name == "token" and data["id"] == number][-1]
        assert [span["sentinel"] for span in last["spans"]] == [span["sentinel"] for span in record["spans"]]
    plain = served.post("/v1/fill", texts=[TEXTS[0], "none", TEXTS[1]], max_new_tokens=5).record["results"]
    assert [lasting(results[0]), lasting(results[2])] == [lasting(plain[0]), lasting(plain[2])]


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"temperature": 1.5, "seed": 3, "top_p": 0.9}])
def test_completions(served: Served, options: dict[str, Any]) -> None:
    answer = served.post("/v1/completions", prompt="the cat", suffix=" the mat", max_tokens=6, **options)
    assert answer.status == 200, answer.body
    record = answer.record
    assert record["object"] == "text_completion"
    # Of what a search finds, some may say the same.
    assert [each["index"] for each in record["choices"]] in ([0], [0, 1][: options.get("n", 1)])
    assert record["usage"]["total_tokens"] == record["usage"]["prompt_tokens"] + record["usage"]["completion_tokens"]
    streamed = served.post("/v1/completions", prompt="the cat", suffix=" the mat", max_tokens=6, stream=True, **options)
    events = [data for _, data in events_of(streamed)]
    assert events.pop() == "[DONE]"
    for choice in record["choices"]:
        pieces = [each["choices"][0] for each in events if each["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]


def test_several_prompts(served: Served) -> None:
    record = served.post("/v1/completions", prompt=["the cat", "a man"], max_tokens=3, user="me", model="any").record
    assert [each["index"] for each in record["choices"]] == [0, 1]


def test_the_other_routes(served: Served) -> None:
    assert served.ask("GET", "/health").record["status"] == "alive"
    assert served.ask("GET", "/ready").record == {"status": "ready"}
    assert [each["object"] for each in served.ask("GET", "/v1/models").record["data"]] == ["model"]
    page = served.ask("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    document = served.ask("GET", "/openapi.json").record
    for task, fields in FIELDS.items():
        schema = document["paths"][f"/v1/{task}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"].keys() == fields.keys()


def test_metrics(served: Served) -> None:
    served.post("/v1/fill", text=TEXTS[0], max_new_tokens=3)
    served.post("/v1/fill", text="none")
    text = served.ask("GET", "/metrics").body.decode()
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r'switchrun_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? \S+', line), line
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    assert found['switchrun_requests_total{route="/v1/fill",status="200"}'] == 1
    assert found['switchrun_requests_total{route="/v1/fill",status="422"}'] == 1
    assert found["switchrun_batches_total"] == found["switchrun_inputs_total"] == 1
    assert found['switchrun_tokens_total{kind="output"}'] == 3
    assert found['switchrun_expert_loads_total{tier="cpu"}'] > 0


# What is refused.


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/fill", b"", 400, "no JSON"),
        ("/v1/fill", b"{", 400, "no JSON"),
        ("/v1/fill", b"[1]", 400, "no JSON object"),
        ("/v1/fill", b"\xff", 400, "not UTF-8"),
        ("/v1/fill", b'{"text": NaN}', 400, "NaN is no number"),
        ("/v1/fill", b'{"text": ' + b"9" * 5000 + b"}", 400, "no JSON"),
        ("/v1/fill", b'{"text": ' + b"[" * 100_000, 400, "no JSON"),
        ("/v1/fill", b"{}", 422, "either text or texts"),
        ("/v1/fill", {"text": "a", "texts": ["a"]}, 422, "either text or texts"),
        ("/v1/fill", {"text": 3}, 422, "text: it must be a string"),
        ("/v1/fill", {"texts": "a"}, 422, "texts: it must be a list"),
        ("/v1/fill", {"texts": [3]}, 422, "texts: 3 is not a string"),
        ("/v1/fill", {"texts": ["a"] * (MOST_INPUTS + 1)}, 422, "at most 1024"),
        ("/v1/fill", {"txt": "a"}, 422, "there is no such field"),
        ("/v1/fill", {"text": "no sentinel"}, 422, "sentinel"),
        ("/v1/fill", b'{"text": "\\ud800 <extra_id_0>"}', 422, "half of a character"),
        ("/v1/fill", {"text": TEXTS[0], "max_new_tokens": 4000}, 422, "memory is reserved for "),
        ("/v1/fill", {"text": TEXTS[0], "max_new_tokens": True}, 422, "must be a whole number"),
        ("/v1/fill", {"text": TEXTS[0], "max_new_tokens": 0}, 422, "max_new_tokens"),
        ("/v1/fill", {"text": TEXTS[0], "max_new_tokens": 10**30}, 422, "max_new_tokens"),
        ("/v1/fill", {"text": TEXTS[0], "num_beams": 5}, 422, "memory is reserved for 4"),
        ("/v1/fill", {"text": TEXTS[0], "alternatives": 3}, 422, "6 beams are asked for"),
        ("/v1/fill", {"text": TEXTS[0], "temperature": 2}, 422, "nothing without sample"),
        ("/v1/fill", {"text": TEXTS[0], "sample": True, "top_p": 2}, 422, "top_p"),
        ("/v1/fill", {"text": TEXTS[0], "blank": ""}, 422, "blank"),
        ("/v1/fill", {"text": "a " * 200_000 + "<extra_id_0>"}, 422, "there is memory for"),
        ("/v1/generate", {"text": "a", "alternatives": 2}, 422, "no such field"),
        ("/v1/score", {"text": TEXTS[0]}, 422, "spans"),
        ("/v1/score", {"fillings": [{"text": "a"}]}, 422, "an object with text and spans"),
        ("/v1/score", {"text": TEXTS[0], "spans": ["one"]}, 422, "but 1 span came with it"),
        ("/v1/completions", {}, 422, "prompt"),
        ("/v1/completions", {"prompt": ""}, 200, ""),
        ("/v1/completions", {"prompt": "a <extra_id_0>"}, 422, "sentinel"),
        ("/v1/completions", {"prompt": "a", "stop": "."}, 422, "stop: there is no such field"),
    ],
)
def test_bodies(served: Served, path: str, body: Any, status: int, message: str) -> None:
    answer = served.ask("POST", path, body)
    assert answer.status == status, answer.body
    if status != 200:
        error = answer.record["error"]
        assert error.keys() == {"kind", "message", "hint"}
        assert message in f"{error['message']} ({error['hint']})"
    assert not served.bugs


def test_paths_and_methods(served: Served) -> None:
    for method, path, status in (("GET", "/v1/fill", 405), ("POST", "/health", 405), ("GET", "/none", 404)):
        answer = served.ask(method, path)
        assert (answer.status, answer.record["error"]["kind"]) == (status, "request")
