"""The page to try the model: as it is served, and in a real browser where there is one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from switchrun import Session
from tests.serve.conftest import Gate
from tests.servers import Served, serving, wait_for
from tests.support.browser import Browser, browser_path

TOKEN = "a-token"
TEXT = "A ___ walks into a ___ bar."
IDLE = "document.getElementById('status').dataset.state === 'ready' && !document.body.classList.contains('running')"
DONE = f"{IDLE} && !document.getElementById('time').hidden"
FAILED = f"{IDLE} && !document.getElementById('problem').hidden"
#: Answers requests for a path by a function, until `unfake()`.
FAKE = """
window.realFetch = fetch.bind(window);
window.fetch = (path, options) => path.startsWith(%s) ? (%s)(path, options) : realFetch(path, options);
window.unfake = () => { window.fetch = realFetch; };
"""
EVIL = "<img src=x onerror='window.evil = 1'>"


def page_text() -> str:
    return (files("switchrun.serve") / "page.html").read_text(encoding="utf-8")


def inside(tag: str) -> str:
    found = re.search(f"<{tag}[^>]*>(.*?)</{tag}>", page_text(), re.DOTALL)
    assert found
    return found[1]


def test_page_is_served_with_a_policy_for_its_own_script_and_style_alone(served: Served) -> None:
    answer = served.ask("GET", "/")
    assert answer.status == 200
    assert answer.body.decode() == page_text()
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(inside(tag).encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"


def test_page_names_no_other_host_and_writes_no_html() -> None:
    text = page_text()
    assert set(re.findall(r"https?://[^'\" ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|style=\"", text)
    assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= set(re.findall(r' id="([\w-]+)"', text))


def test_script_has_no_wrong_syntax(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    (tmp_path / "page.mjs").write_text(inside("script"), encoding="utf-8")
    done = subprocess.run([node, "--check", tmp_path / "page.mjs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Page:
    """The page in the browser."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser = browser
        self.url = url
        self.run, self.wait, self.text, self.type = browser.run, browser.wait, browser.text, browser.type
        self.press = browser.press

    def open(self, before: str = "", token: str | None = TOKEN) -> None:
        """Load the page anew, in a large window, after a script that runs before its own."""
        self.browser.resize(1280, 900)
        if self.run("location.href").startswith(self.url):
            self.run("sessionStorage.clear()")
        given = f"sessionStorage.setItem('switchrun-token', {json.dumps(token)});" if token else ""
        script = self.browser.send("Page.addScriptToEvaluateOnNewDocument", source=given + before)
        self.browser.open(self.url)
        self.browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])

    def fill(self, text: str = TEXT, until: str = DONE) -> None:
        """Type a text and press Enter."""
        self.wait(IDLE)
        self.run("document.getElementById('text').select()")
        self.type(text)
        self.press("Enter")
        self.wait(until)

    def set(self, name: str, value: Any) -> None:
        """Set an option."""
        key = "checked" if isinstance(value, bool) else "value"
        self.run(f"document.getElementById('{name}').{key} = {json.dumps(value)}")

    def marks(self, selector: str = "#sentence") -> list[str]:
        found = self.run(f"[...document.querySelectorAll('{selector} mark')].map((mark) => mark.textContent)")
        return list(found)

    def overflow(self) -> list[str]:
        """Return what is wider than the window."""
        found = self.run(
            "[...document.querySelectorAll('body *')].filter((each) => !each.closest('.scroll') && "
            "each.getBoundingClientRect().right > document.documentElement.clientWidth)"
            ".map((each) => each.outerHTML.slice(0, 80))"
        )
        wide = self.run("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        return [*found, *(["the page"] if wide else [])]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = browser_path()
    if path is None:
        pytest.skip("there is no Chromium")
    with Browser(path, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    session = Session.open(cpu_memory="8GiB", num_beams=8, offload_folder=tmp_path_factory.mktemp("offload"))
    with serving(session, token=TOKEN) as served:
        yield served


@pytest.fixture
def page(browser: Browser, demo: Served) -> Iterator[Page]:
    url = f"http://127.0.0.1:{demo.port}/"
    browser.requested.clear()
    browser.problems.clear()
    yield Page(browser, url)
    browser.run("0")  # so that all that came about is heard of
    assert browser.problems == []
    assert [each for each in browser.requested if not each.startswith((url, "data:", "about:"))] == []
    assert demo.bugs == []


@pytest.fixture
def gated(demo: Served) -> Iterator[Gate]:
    """Hold answers back until the gate is opened."""
    session = demo.scheduler.session
    assert session is not None
    before = session.answer_batch
    gate = Gate(session)
    yield gate
    gate.opened.set()
    session.answer_batch = before  # type: ignore[method-assign]


@pytest.mark.slow
def test_spans_arrive_in_their_places_one_after_another(
    page: Page, demo: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = demo.ask("POST", "/v1/fill", {"text": TEXT, "blank": "___"}, Authorization=f"Bearer {TOKEN}").record
    first, second = (span["text"] for span in record["spans"])
    session: Any = demo.scheduler.session
    answer_batch, seen = session.answer_batch, threading.Event()

    def wait_after_the_first_span(inputs: Any, options: Any, ids: Any, controls: Any) -> Any:
        on_tokens = controls[0].on_tokens

        def wait(tokens: Sequence[int]) -> None:
            on_tokens(tokens)
            assert len(tokens) != 3 or seen.wait(60)  # the start token, the sentinel and its word

        controls[0].on_tokens = wait
        return answer_batch(inputs, options, ids, controls)

    monkeypatch.setattr(session, "answer_batch", wait_after_the_first_span)
    page.open()
    marks = "[...document.querySelectorAll('#sentence mark')].map((mark) => mark.textContent).join()"
    page.fill(until=f"{marks} === {json.dumps(first + ',')}")
    assert page.run("document.body.classList.contains('running')")
    assert page.text("#sentence").startswith(f"A {first} walks into a ")
    seen.set()
    page.wait(DONE)
    assert page.marks() == [first, second]
    assert page.text("#sentence") == record["text"]
    assert f"{record['tokens']['output']} tokens" in page.text("#note")
    assert page.text("#spoken") == f"Answer: {record['text']}"
    page.run("document.getElementById('time').open = true")
    assert "Waiting in the queue" in page.text("#time")
    assert "cpu" in page.text("#tiers")


@pytest.mark.slow
def test_alternatives_and_the_map_of_experts(page: Page, demo: Served) -> None:
    page.open()
    page.set("alternatives", 3)
    page.set("explain", True)
    page.fill()
    body = {"text": TEXT, "blank": "___", "alternatives": 3, "explain": True}
    record = demo.ask("POST", "/v1/fill", body, Authorization=f"Bearer {TOKEN}").record
    rows = [page.text(f"#alternatives-rows tr:nth-child({number})") for number in (1, 2, 3)]
    for row, each in zip(rows, record["alternatives"], strict=True):
        assert each["text"] in row
        assert f"{each['log_probability']:.2f}".replace("-", "\u2212") in row
    told = page.run(
        "[...document.querySelectorAll('#maps .token:not(.labels)')]"
        ".map((token) => [...token.querySelectorAll('.cell')].map((cell) => Number(cell.textContent)))"
    )
    layers = record["routing"]["layers"]
    stacks = ([each["experts"] for each in layers if each["stack"] == stack] for stack in ("encoder", "decoder"))
    assert told == [list(column) for stack in stacks for column in zip(*stack, strict=True)]
    # By the keyboard: one stop, then arrows.
    page.run("document.querySelector('.cell[tabindex=\"0\"]').focus()")
    page.press("ArrowDown", "ArrowRight")
    probability = round(layers[1]["probabilities"][1] * 100)
    words = f"“blank 1”, encoder block {layers[1]['block']}: expert {layers[1]['experts'][1]}, probability"
    assert page.text("#told") == f"{words} {probability} %"
    page.run("document.getElementById('experts-table').open = true")
    page.wait("!!document.querySelector('#experts-table table')")
    assert f"{layers[0]['experts'][0]} ({layers[0]['probabilities'][0]:.0%}".replace("%", " %") in page.text(
        "#experts-table tbody tr"
    )


@pytest.mark.slow
def test_generating_and_scoring(page: Page) -> None:
    page.open()
    page.run("document.querySelector('[value=score]').click(); document.getElementById('text').focus()")
    page.type(TEXT)
    page.press("Tab")
    page.type("woman")
    page.press("Tab")
    page.type("new")
    page.press("Enter")
    page.wait(DONE)
    assert page.marks() == ["woman", "new"]
    assert "Log-probability \u2212" in page.text("#note")
    page.run("document.querySelector('[value=generate]').click()")
    page.fill("summarize: a bar")
    assert "tokens" in page.text("#note")


@pytest.mark.slow
def test_everything_works_by_keyboard_alone(page: Page) -> None:
    page.open()
    page.wait(IDLE)
    focused = "document.activeElement.id || document.activeElement.innerText"
    assert page.run(focused) == "text", "one can type at once"
    page.type("The cat sat on the")
    order = []
    for _ in range(3):
        page.press("Tab")
        order.append(page.run(focused))
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is seen"
    assert order == ["blank", "run", "Options"]
    page.press("Enter")
    assert page.run("document.getElementById('options').open")
    page.press("Tab", "Tab", "Tab", " ")
    assert page.run("document.getElementById('explain').checked")
    page.run("document.getElementById('blank').focus()")
    page.press("Enter")
    assert page.run("document.getElementById('text').value") == "The cat sat on the ___"
    page.press("Enter", control=True)
    page.wait(DONE)
    assert page.run("document.getElementById('experts').hidden") is False
    page.press("Enter", shift=True)
    assert page.run("document.getElementById('text').value").count("\n") == 1, "Shift+Enter is a new line"


@pytest.mark.slow
def test_a_request_that_is_cancelled_ends_on_the_server(page: Page, demo: Served, gated: Gate) -> None:
    page.open()
    page.fill(until="document.body.classList.contains('running')")
    wait_for(lambda: gated.batches)
    before = demo.scheduler.tally()[0].cancelled_rows
    assert page.run("getComputedStyle(document.getElementById('cancel')).visibility") == "visible"
    page.press("Escape")
    page.wait(IDLE)
    assert page.text("#note") == "Cancelled."
    wait_for(lambda: all(row.control.stopped for row in demo.scheduler._working))
    gated.opened.set()
    wait_for(lambda: demo.scheduler.tally()[0].cancelled_rows == before + 1)


@pytest.mark.slow
def test_errors_are_said_in_words(page: Page) -> None:
    page.open()
    page.fill("There is none.", until=FAILED)
    assert "no blank yet" in page.text("#problem")
    page.set("alternatives", 30)
    page.fill(until=FAILED)
    assert page.text("#problem").startswith("60 beams are asked for")
    page.set("alternatives", "")
    page.run(FAKE % ("'/v1/'", "() => Promise.reject(new TypeError('gone'))"))
    page.fill(until=FAILED)
    assert "Is switchrun serve still running?" in page.text("#problem")
    page.run("unfake()")
    page.fill()
    assert page.run("document.getElementById('problem').hidden")


@pytest.mark.slow
def test_page_waits_for_the_model_and_for_a_place_in_the_queue(page: Page) -> None:
    opening = {"status": "opening", "stage": "open", "done": 2**20, "total": 2**22}
    busy = {"error": {"kind": "busy", "message": "the queue is full", "hint": ""}}
    answers = f"(path) => Promise.resolve(path === '/ready' ? {_response(503, opening)} : {_response(429, busy)})"
    page.open(before=FAKE % ("'/'", answers))
    page.wait("document.getElementById('status').dataset.state === 'opening'")
    assert page.text("#status") == "Opening the model… 1.0 MiB of 4.0 MiB read"
    assert page.run("document.getElementById('opening').value / document.getElementById('opening').max") == 0.25
    page.type(TEXT)
    page.press("Enter")
    assert page.text("#note") == "Runs as soon as the model is open."
    page.run(FAKE.replace("window.realFetch = fetch.bind(window);", "") % ("'/v1/fill'", answers))
    page.wait("document.getElementById('note').textContent.startsWith('The queue is full. Trying again in 1 second')")
    page.run("unfake()")
    page.wait(DONE)


@pytest.mark.slow
def test_a_token_is_asked_for_and_kept_for_the_tab_alone(page: Page) -> None:
    page.open(token=None)
    shown = "!document.getElementById('token-form').hidden"
    page.wait(shown)
    page.type("wrong")
    page.press("Enter")
    page.wait(f"{shown} && document.getElementById('token-note').textContent === 'That token is wrong.'")
    page.type(TOKEN)
    page.press("Enter")
    page.wait(IDLE)
    assert page.run("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.fill()


@pytest.mark.slow
def test_what_the_model_says_is_never_html(page: Page) -> None:
    spans = [{"sentinel": "<extra_id_0>", "text": EVIL}, {"sentinel": "<extra_id_1>", "text": None}]
    layer = {"stack": "encoder", "block": 1, "experts": [7], "probabilities": [0.5], "dropped": [0]}
    record = {
        "input": TEXT.replace("___", "<extra_id_0>", 1).replace("___", "<extra_id_1>"),
        "text": EVIL,
        "spans": spans,
        "tokens": {"input": 1, "output": 2, "dropped": 1},
        "timing": {"ttft_seconds": 1, "itl_seconds": None, "total_seconds": 2},
        "experts": {"hit_rate": None, "load_bytes": 3 * 2**30, "hub_bytes": 2**30, "load_seconds": 1, "tiers": []},
        "memory": {"peak_rss_bytes": 1, "peak_gpu_bytes": 2**30},
        "finish_reason": "length",
        "alternatives": [{"text": EVIL, "spans": spans, "log_probability": -1.0}],
        "routing": {"input_tokens": [EVIL], "output_tokens": [], "layers": [layer]},
    }
    events = f"event: result\ndata: {json.dumps(record)}\n\n"
    page.open(before=FAKE % ("'/v1/fill'", f"() => Promise.resolve(new Response({json.dumps(events)}))"))
    page.fill()
    assert page.marks() == [EVIL, "no answer"]
    assert page.run("document.querySelectorAll('main img').length") == 0
    assert page.run("window.evil") is None
    assert EVIL in page.text("#maps")
    assert "dropped: the expert was full" in page.run("document.querySelector('.cell').getAttribute('aria-label')")
    page.run("document.getElementById('time').open = true")
    told = page.text("#bytes").split()
    assert " ".join(told[:10]) == "Read from disk 2.0 GiB Read from the network 1.0"
    assert "stopped at the limit" in page.text("#note")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(page: Page, scheme: str) -> None:
    page.browser.media(prefers_color_scheme=scheme)
    page.open()
    page.browser.resize(390, 844)
    page.wait(IDLE)
    assert page.overflow() == []
    page.set("alternatives", 3)
    page.set("explain", True)
    page.fill(f"{'verylong' * 20} {'The ___ and then she said a word of it. ' * 3}")
    page.run("for (const each of document.querySelectorAll('details')) each.open = true")
    page.wait("!!document.querySelector('#experts-table table')")
    assert page.overflow() == []
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 64) == (scheme == "dark")


def _response(status: int, body: Any) -> str:
    return f"new Response({json.dumps(json.dumps(body))}, {{ status: {status} }})"
