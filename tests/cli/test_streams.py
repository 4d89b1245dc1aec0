"""Reading lines as bytes, and writing whole lines."""

from __future__ import annotations

import io

import pytest

from switchrun.cli.streams import MAX_LINE_BYTES, Entry, read_arguments, read_lines, report
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
    entries = list(read_lines(io.BytesIO(data)))
    assert entries == [Entry(position, text) for position, text in enumerate(texts)]


def test_a_line_that_is_not_utf8_spoils_only_itself() -> None:
    entries = list(read_lines(io.BytesIO(b"a\nb\xe4c\nd")))
    assert [entry.text for entry in entries] == ["a", "b\ufffdc", "d"]
    assert [entry.error is None for entry in entries] == [True, False, True]
    assert isinstance(entries[1].error, InputError)
    assert entries[1].error.message == "not UTF-8: byte 0xe4 at offset 1"


@pytest.mark.parametrize("end", [b"", b"\n", b"\nnext"])
@pytest.mark.parametrize("excess", [0, 1, MAX_LINE_BYTES])
def test_a_line_without_end_is_refused(end: bytes, excess: int) -> None:
    entries = list(read_lines(io.BytesIO(b"x" * (MAX_LINE_BYTES + excess) + end)))
    assert entries[0].error is not None
    assert "longer than 1 MiB" in entries[0].error.message
    assert [entry.text for entry in entries[1:]] == ([] if end in (b"", b"\n") else ["next"])


def test_the_longest_line() -> None:
    line = b"x" * (MAX_LINE_BYTES - 1)
    assert [entry.error for entry in read_lines(io.BytesIO(line + b"\n" + line))] == [None, None]


def test_arguments_with_bytes_that_are_not_utf8() -> None:
    good, bad = read_arguments(["ö", "a\udcff"])
    assert good == Entry(0, "ö")
    assert bad.error is not None


def test_report_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report("two\nlines  and\tmore")
    assert capsys.readouterr().err == "switchrun: two lines and more\n"
