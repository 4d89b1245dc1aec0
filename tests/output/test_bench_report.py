"""The report page: valid and whole in itself; in a browser nothing is wider than a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from switchrun.bench.records import Record
from switchrun.bench.verdict import verdict
from switchrun.output.bench_report import render_page
from tests.support.bench_records import GIB, failed, measured

PHONE = 390
MANY = {"experts_per_layer": 2048, "num_experts": 61440}
PAGES = {
    "one": [measured(used=90)],
    "many experts": [measured(plan=MANY, used=3000, layers=15, model="/models/" + "a-long-name-" * 9)],
    "many cells": [
        *(measured(batch_size=size, cpu_memory_bytes=size * GIB) for size in range(1, 12)),
        failed(batch_size=12),
    ],
    "failed": [failed(model="/models/<script>alert(1)</script>")],
}


def plain(page: str) -> str:
    """A page without what keeps words together."""
    return page.replace("&nbsp;", " ").replace("<code>", "").replace("</code>", "")


@pytest.mark.parametrize("records", PAGES.values(), ids=PAGES)
def test_a_page_is_whole_in_itself(records: list[Record]) -> None:
    page = render_page(records)
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert checker.headings[0] == 1
    assert "script" not in checker.seen
    assert not re.search(r"https?:|url\(|@import|src=", page)
    assert f'<p class="verdict">{escape(verdict(records))}</p>' in plain(page)
    assert plain(page).count("it needs 5 GiB (raise --cpu-memory)") >= sum(
        record["status"] == "failed" for record in records
    )


def test_the_map_of_many_experts() -> None:
    page = plain(render_page(PAGES["many experts"]))
    layers = re.findall(r"<li><span>(\w+ \d+)</span>.*?<span>(.*?)</span><span class=\"busy soft\">(.*?)</span>", page)
    assert len(layers) == 30
    assert layers[17][0] == "decoder 2"
    assert layers[17][1] == "100 of 2,048 used"
    assert re.fullmatch(r"(\d+ \(7\), ){4}\d+ \(7\)", layers[17][2])
    widths = {float(width) for width in re.findall(r"h([\d.]+)v1", page)}
    assert widths == {2048 / 250}, "a mark is wide enough to be seen"


def test_the_map_of_few_experts() -> None:
    page = render_page([measured(used=2, plan={"experts_per_layer": 8})])
    assert 'viewBox="0 0 8 1"' in page
    assert "M0 0h1v1h-1z" in page


@pytest.mark.slow
@pytest.mark.parametrize("records", PAGES.values(), ids=PAGES)
def test_nothing_is_wider_than_a_phone(records: list[Record], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium on the PATH")
    page = render_page(records).replace("<details>", "<details open>")
    script = (
        "const root = frames[0].document.scrollingElement;"
        "const labels = [...frames[0].document.querySelectorAll('tbody th')].map(label => label.offsetHeight);"
        "document.body.textContent = `width ${root.scrollWidth} of ${root.clientWidth}, height ${root.scrollHeight}, "
        "labels ${Math.max(...labels)}`;"
    )
    wrapper = tmp_path / "wrapper.html"
    frame = f'<iframe width="{PHONE}" height="800" frameborder="0" srcdoc="{escape(page)}"></iframe>'
    wrapper.write_text(f"<!DOCTYPE html><body>{frame}<script>onload = () => {{ {script} }}</script></body>")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    command = [browser, *options, "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r"width (\d+) of (\d+), height (\d+), labels (\d+)", done.stdout)
    assert found, done.stderr
    assert (int(found[1]), int(found[2])) == (PHONE, PHONE)
    assert int(found[3]) > 400
    assert int(found[4]) < 120, "labels of rows are not a column of letters"


class _Checker(HTMLParser):
    """Notes elements that are not closed in their order, and the levels of headings."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            assert int(tag[1]) <= (self.headings or [0])[-1] + 1, "no level is left out"
            self.headings.append(int(tag[1]))
        assert tag != "svg" or dict(attrs)["aria-label"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Of paths; nothing is left open."""
