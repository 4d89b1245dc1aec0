"""Files of answers, as `map` writes them: lines of text, JSONL, CSV and Parquet. Each is there whole or not at all."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from switchrun.errors import StorageError, UsageError
from switchrun.output.sinks import format_record, one_line
from switchrun.units import MIB

_COLUMNS = ("id", "input", "text")
#: A Parquet file is written in groups of as many rows, or of as many characters.
_GROUP_ROWS = 10_000
_GROUP_CHARACTERS = 4 * MIB

Write = Callable[[Mapping[str, Any]], None]


@contextmanager
def answer_file(path: Path) -> Iterator[Write]:
    """Yield a function that writes a record; at the end the file is there, in the form that its ending asks for.

    `.jsonl`, `.csv` and `.parquet` are those; anything else gets a line of text for each record, an empty one for an
    input that failed.

    Raises:
        StorageError: It cannot be written; then there is nothing new.
    """
    begin = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}.get(path.suffix.lower(), _text)
    with _whole_file(path) as file, begin(file) as write:
        yield write


def check_output(path: Path) -> None:
    """Raise UsageError if a file of this name needs what is not installed."""
    if path.suffix.lower() == ".parquet":
        import_pyarrow(str(path))


def import_pyarrow(file: str) -> tuple[Any, Any]:
    """Return pyarrow and its module for Parquet files such as `file`.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise UsageError(f"{file} is Parquet, which needs pyarrow", "pip install 'switchrun[parquet]'") from error


def cannot_write(path: Path, error: OSError) -> StorageError:
    """The error to raise when the system refuses to write a file."""
    return StorageError(f"{path} cannot be written: {error.strerror or error}", "make room there, or name another OUT")


def sync_folder(path: Path) -> None:
    """Have the disk keep a file's name, on filesystems that can."""
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write beside the file, under a name that only who has the journal uses, and rename at the end."""
    temporary = path.with_name(f".{path.name}.switchrun")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()  # of a run that was killed
        try:
            with open(temporary, "xb", buffering=MIB) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def _lines(file: BinaryIO) -> Iterator[TextIO]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        yield text
        text.flush()
    finally:
        with suppress(OSError):
            text.detach()  # else it would close the file


@contextmanager
def _text(file: BinaryIO) -> Iterator[Write]:
    with _lines(file) as lines:
        yield lambda record: _put(lines, "\n" if "error" in record else one_line(record["text"]))


@contextmanager
def _jsonl(file: BinaryIO) -> Iterator[Write]:
    with _lines(file) as lines:
        yield lambda record: _put(lines, format_record(dict(record), indent=False))


def _put(lines: TextIO, line: str) -> None:
    lines.write(line)


@contextmanager
def _csv(file: BinaryIO) -> Iterator[Write]:
    with _lines(file) as lines:
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(_COLUMNS)
        yield lambda record: table.writerow([record.get(name, "") for name in _COLUMNS])


@contextmanager
def _parquet(file: BinaryIO) -> Iterator[Write]:
    pyarrow, parquet = import_pyarrow(file.name)
    kinds = (pyarrow.int64(), pyarrow.string(), pyarrow.string())
    schema = pyarrow.schema(list(zip(_COLUMNS, kinds, strict=True)))
    waiting: list[dict[str, Any]] = []
    characters = 0
    with parquet.ParquetWriter(file, schema) as table:

        def flush() -> None:
            nonlocal characters
            table.write_table(pyarrow.Table.from_pylist(waiting, schema))
            waiting.clear()
            characters = 0

        def write(record: Mapping[str, Any]) -> None:
            nonlocal characters
            waiting.append({name: record.get(name) for name in _COLUMNS})
            characters += len(record["input"]) + len(record.get("text", ""))
            if len(waiting) == _GROUP_ROWS or characters > _GROUP_CHARACTERS:
                flush()

        yield write
        if waiting:
            flush()
