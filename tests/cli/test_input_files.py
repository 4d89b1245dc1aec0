"""Files of inputs: each format, and what is wrong in them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from switchrun.cli.input_files import InputFile, InputFormat, open_inputs
from switchrun.cli.streams import MAX_LINE_BYTES
from switchrun.errors import InputError, UsageError

Read = list[tuple[str, str]]


def opened(path: Path, field: str | None = None, what: InputFormat | None = None) -> InputFile:
    return open_inputs(path, what, field, lambda done, total: None)


def read(path: Path, field: str | None = None, what: InputFormat | None = None) -> Read:
    """Give the text and the error of each input, whose ids must count up."""
    inputs = opened(path, field, what)
    entries = list(inputs.entries())
    assert [entry.id for entry in entries] == list(range(inputs.count))
    return [(entry.text if entry.error is None else "", str(entry.error or "")) for entry in entries]


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\ntw\x00o\n\xff\n" + b"x" * MAX_LINE_BYTES + b"y\nlast")
    one, empty, nul, latin, long, last = read(path)
    assert (one, empty, nul, last) == (("one", ""), ("", ""), ("tw\0o", ""), ("last", ""))
    assert "not UTF-8" in latin[1]
    assert "the line is longer than 1 MiB" in long[1]


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "one"}\r',
        b'{"other": "x"}',
        b'{"text": 3}',
        b'{"text": null}',
        b'["text"]',
        b"",
        b"{",
        b'{"text": "\\ud800"}',
        b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}',
        b"[" * 100_000,
        b'{"text": ' + b"9" * 10_000 + b"}",
        b'{"text": "\xff"}',
        '{"text": "größer\\u0000"}'.encode(),
    ]
    path = tmp_path / "in.JSONL"
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = read(path)
    reasons = [
        "",
        "the line has no key 'text' (name the key with --field)",
        "'text' is no string, but 3",
        "'text' is no string, but None",
        "the line is no JSON object with the key 'text'",
        "the line is no JSON: ",
        "the line is no JSON: ",
        "'text' has half of a character at offset 0",
        "the line is longer than 1 MiB",
        "the line is no JSON: it is nested too deeply",
        "the line is no JSON: ",
        "not UTF-8",
        "",
    ]
    for (_, error), reason in zip(found, reasons, strict=True):
        assert error.startswith(reason)
        assert bool(error) == bool(reason)
    assert (found[0][0], found[-1][0]) == ("one", "größer\0")
    assert read(path, "other")[1] == ("x", "")


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(
        b'\xef\xbb\xbf"a",text\r\n'
        b'1,"two\nlines, ""quoted"""\r\n'
        b"\r\n"
        b"short\r\n"
        b"1,\xff\r\n"
        b"\xff,the text is good\r\n"
        b'1,"' + b"x" * (MAX_LINE_BYTES - 10) + b'"\r\n'
        b'1,"' + b"x" * MAX_LINE_BYTES + b'"\r\n'
        b"1,nul\x00\r\n"
        b"2," + "größer".encode()
    )
    two, short, latin, good, much, long, nul, last = read(path)
    assert two == ('two\nlines, "quoted"', "")
    assert short == ("", "the row has 1 field, and 'text' is number 2")
    assert "not UTF-8" in latin[1]
    assert (good, nul, last) == (("the text is good", ""), ("nul\0", ""), ("größer", ""))
    assert len(much[0]) == MAX_LINE_BYTES - 10
    assert long[1] == "the line is longer than 1 MiB (put one row on each line)"
    assert read(path, "a")[0] == ("1", "")


def test_a_quote_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b'text\n"good"\n"begins\n' + (b"x" * 1000 + b"\n") * 2000 + b"last\n")
    good, endless, *rest = read(path)
    assert good == ("good", "")
    assert endless[1] == "a field is longer than 1 MiB (look for a quote without an end)"
    assert rest[-1] == ("last", ""), "it goes on"
    rows = b'text,b\nx,"' + b"\n".join(b'","' + b"y" * 500_000 for _ in range(60)) + b'"\nlast,b\n'
    path.write_bytes(rows)
    assert any(error.startswith("the row is longer than 16 MiB") for _, error in read(path))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", InputError, "it has no header row"),
        (b"a,b\n", UsageError, "--field: .* has no columns 'text' in its first row: a, b"),
        (b"text,text\n", UsageError, "has 2 columns 'text'"),
        (b"a" * MAX_LINE_BYTES + b"\n", InputError, "its first row cannot be read: the line is longer"),
    ],
)
def test_a_bad_header(tmp_path: Path, content: bytes, error: type[Exception], message: str) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        opened(path)


def test_the_format_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b'{"q": "x"}\n')
    assert read(path, what=InputFormat.LINES) == [('{"q": "x"}', "")]
    assert read(path, "q", InputFormat.JSONL) == [("x", "")]
    with pytest.raises(UsageError, match="lines have no fields"):
        opened(path, "q", InputFormat.LINES)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (("fifo", "FIFO"), (".", "folder"), ("none", "No such file"), ("a\0b", "null")):
        with pytest.raises(UsageError, match=reason):
            opened(tmp_path / name)
    with pytest.raises(UsageError, match=r"cannot be - \(for a pipe there is: switchrun fill"):
        opened(Path("-"))


def test_a_file_that_changes(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"one\ntwo\n")
    inputs = opened(path)
    inputs.check_unchanged()
    path.write_bytes(b"one\ntwo\nthree\n")
    for read_it in (inputs.check_unchanged, lambda: list(inputs.entries())):
        with pytest.raises(InputError, match="has changed since it was begun"):
            read_it()
    path.unlink()
    with pytest.raises(InputError, match="has changed since it was begun"):
        inputs.check_unchanged()


@pytest.fixture
def parquet() -> Any:
    return pytest.importorskip("pyarrow.parquet")


def test_parquet(tmp_path: Path, parquet: Any) -> None:
    import pyarrow as pa

    path = tmp_path / "in.parquet"
    bad = pa.array([b"\xff"], pa.binary()).view(pa.string())
    texts = pa.chunked_array([pa.array(["one", None, "größer\0", "x" * (MAX_LINE_BYTES + 1), *["y"] * 200]), bad])
    parquet.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=150)
    one, null, nul, long, *many, latin = read(path)
    assert (one, nul, many) == (("one", ""), ("größer\0", ""), [("y", "")] * 200)
    assert null[1] == "'text' is null"
    assert long[1] == "the text is longer than 1 MiB"
    assert "not UTF-8" in latin[1]
    for field, reason in (("n", "column 'n' of .* holds int64, not texts"), ("q", "has no columns 'q': n, text")):
        with pytest.raises(UsageError, match=reason):
            opened(path, field)


@pytest.mark.parametrize("kind", ["large_string", "dictionary"])
def test_other_texts_of_parquet(tmp_path: Path, parquet: Any, kind: str) -> None:
    import pyarrow as pa

    path = tmp_path / "in.parquet"
    texts = pa.array(["one", "two", "one"], pa.large_string())
    parquet.write_table(pa.table({"a.b": texts.dictionary_encode() if kind == "dictionary" else texts}), path)
    assert read(path, "a.b") == [("one", ""), ("two", ""), ("one", "")]


def test_a_damaged_parquet_file(tmp_path: Path, parquet: Any) -> None:
    import pyarrow as pa

    path = tmp_path / "in.parquet"
    parquet.write_table(pa.table({"text": [f"text number {n}" for n in range(1000)]}), path)
    good = path.read_bytes()
    for content in (b"", b"no such thing", good[:-10]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"it is no Parquet file|cannot be read"):
            opened(path)
    path.write_bytes(good[:4] + b"\xff" * 500 + good[504:])
    with pytest.raises(InputError, match=r"it is damaged|cannot be read"):
        read(path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "in.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match=r"needs pyarrow \(pip install 'switchrun\[parquet\]'\)"):
        opened(tmp_path / "in.parquet")


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a", "text": "b"}\n' + json.dumps({"text": "c"}))
    assert read(path) == [("b", ""), ("c", "")]
