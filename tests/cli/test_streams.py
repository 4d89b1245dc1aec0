"""Reading lines as bytes, and writing whole lines."""

from __future__ import annotations

import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchrun.cli.streams import MAX_LINE_BYTES, Entry, LineReader, read_arguments, report
from switchrun.errors import InputError


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"", []),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\n\nb\n", ["a", "", "b"]),
        (b"a\r", ["a"]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "\ufeffb"]),
        ("größer\u2028x\x0by\n".encode(), ["größer\u2028x\x0by"]),
    ],
)
def test_lines(data: bytes, texts: list[str]) -> None:
    entries = list(LineReader(io.BytesIO(data)))
    assert entries == [Entry(position, text) for position, text in enumerate(texts)]


@given(data=st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b"\xc3\xb6", b"\xff"]), max_size=30), cuts=st.data())
def test_lines_however_they_come(data: list[bytes], cuts: st.DataObject) -> None:
    """In pieces that end anywhere; `ready` waits for none, and knows of every line that is there."""
    whole = b"".join(data)
    places = sorted(cuts.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    pieces = [whole[begin:end] for begin, end in zip([0, *places], [*places, len(whole)], strict=True)]
    reading, writing = os.pipe()
    found = []
    with open(reading, "rb") as stream:
        lines = LineReader(stream)
        written = b""
        for piece in pieces:
            written += piece
            os.write(writing, piece)
            while lines.ready():
                found.append(next(lines))
            assert len(found) == written.count(b"\n")
        os.close(writing)
        assert lines.ready()
        found += lines
    texts = [text.removesuffix("\r") for text in whole.decode("utf-8", "replace").split("\n")]
    if whole.endswith(b"\n") or not whole:
        texts.pop()
    assert [(entry.id, entry.text) for entry in found] == list(enumerate(texts))


def test_a_line_that_is_not_utf8_spoils_only_itself() -> None:
    entries = list(LineReader(io.BytesIO(b"a\nb\xe4c\nd")))
    assert [entry.text for entry in entries] == ["a", "b\ufffdc", "d"]
    assert [entry.error is None for entry in entries] == [True, False, True]
    assert isinstance(entries[1].error, InputError)
    assert entries[1].error.message == "not UTF-8: byte 0xe4 at offset 1"


@pytest.mark.parametrize("end", [b"", b"\n", b"\nnext"])
@pytest.mark.parametrize("excess", [0, 1, MAX_LINE_BYTES])
def test_a_line_without_end_is_refused(end: bytes, excess: int) -> None:
    entries = list(LineReader(io.BytesIO(b"x" * (MAX_LINE_BYTES + excess) + end)))
    assert entries[0].error is not None
    assert "longer than 1 MiB" in entries[0].error.message
    assert [entry.text for entry in entries[1:]] == ([] if end in (b"", b"\n") else ["next"])


def test_the_longest_line() -> None:
    line = b"x" * (MAX_LINE_BYTES - 1)
    assert [entry.error for entry in LineReader(io.BytesIO(line + b"\n" + line))] == [None, None]


def test_arguments_with_bytes_that_are_not_utf8() -> None:
    good, bad = read_arguments(["ö", "a\udcff"])
    assert good == Entry(0, "ö")
    assert bad.error is not None


def test_report_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report("two\nlines  and\tmore")
    assert capsys.readouterr().err == "switchrun: two lines and more\n"
