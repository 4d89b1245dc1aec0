"""Files of inputs, as `map` reads them: lines, JSONL, CSV and Parquet, an input at a time, whatever is in them."""

from __future__ import annotations

import codecs
import csv
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from switchrun.checkpoint.files import parse_json
from switchrun.cli.streams import MAX_LINE_BYTES, Entry, LineReader, decode
from switchrun.errors import InputError, UsageError, printable
from switchrun.machine.files import open_regular
from switchrun.output.answer_files import import_pyarrow
from switchrun.units import MIB, format_count

DEFAULT_FIELD = "text"
#: A row of a CSV file may have several long fields, but not go on for ever.
_MOST_ROW_BYTES = 16 * MIB
#: So many rows of a Parquet file are in memory at a time.
_PARQUET_ROWS = 64
_HASHED_BYTES = 4 * MIB
_LONG = f"is longer than {MAX_LINE_BYTES // MIB} MiB"


class InputFormat(StrEnum):
    """What `switchrun map --input-format` takes."""

    LINES = "lines"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of inputs whose content is known; make one with `open_inputs`.

    Attributes:
        field: The key or column that holds the text; None for lines.
        sha256: Of its content.
        count: How many inputs it has.
    """

    path: Path
    format: InputFormat
    field: str | None
    size: int
    sha256: str
    count: int
    _state: tuple[int, ...]

    def entries(self) -> Iterator[Entry]:
        """Yield the inputs in their order.

        Raises:
            InputError: The file has changed, or cannot be read.
        """
        with _opened(self.path) as file:
            if _state(os.fstat(file.fileno())) != self._state:
                raise self._changed()
            yield from _read(file, self.path, self.format, self.field)

    def check_unchanged(self) -> None:
        """Raise InputError if it is not the file any more that its inputs were counted in."""
        try:
            same = _state(self.path.stat()) == self._state
        except OSError:
            same = False
        if not same:
            raise self._changed()

    def _changed(self) -> InputError:
        return InputError(
            f"{self.path} has changed since it was begun", "put it back to go on, or begin anew with --restart"
        )


def open_inputs(
    path: Path, input_format: InputFormat | None, field: str | None, on_bytes: Callable[[int, int], None]
) -> InputFile:
    """Read a file to know its content, and how many inputs it has; without a format its ending says what it is.

    Raises:
        UsageError: It cannot be opened, there is no such field, or a field is given for lines.
        InputError: It is no CSV or Parquet file.
    """
    if str(path) == "-":
        raise UsageError("map reads IN again when it goes on, so it cannot be -", "for a pipe there is: switchrun fill")
    if input_format is None:
        endings = {f".{each}": each for each in InputFormat if each is not InputFormat.LINES}
        input_format = endings.get(path.suffix.lower(), InputFormat.LINES)
    if input_format is InputFormat.LINES:
        if field is not None:
            raise UsageError("--field: lines have no fields", "leave it out, or say what IN is with --input-format")
    elif field is None:
        field = DEFAULT_FIELD
    with _opened(path) as file:
        before = os.fstat(file.fileno())
        digest, done = hashlib.sha256(), 0
        while part := file.read(_HASHED_BYTES):
            digest.update(part)
            done += len(part)
            on_bytes(done, before.st_size)
        file.seek(0)
        if input_format is InputFormat.PARQUET:
            count = _parquet(file, path, field).metadata.num_rows
        else:
            count = sum(1 for _ in _read(file, path, input_format, field))
    return InputFile(path, input_format, field, done, digest.hexdigest(), count, _state(before))


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        descriptor = open_regular(path)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UsageError(f"'{path}' cannot be read: {reason}", "name a file with the inputs") from error
    with open(descriptor, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(file: BufferedReader, path: Path, input_format: InputFormat, field: str | None) -> Iterator[Entry]:
    if field is None:
        return LineReader(file)
    if input_format is InputFormat.JSONL:
        return (_of_json(entry, field) for entry in LineReader(file))
    if input_format is InputFormat.CSV:
        return _read_csv(file, path, field)
    return _read_parquet(file, path, field)


def _of_json(entry: Entry, field: str) -> Entry:
    """Take the text out of a line of JSON; one that has none keeps the line."""
    if entry.error is not None:
        return entry
    try:
        record = parse_json(entry.text.encode())
    except ValueError as error:
        return replace(entry, error=InputError(f"the line is no JSON: {error}", f'write {{"{field}": "…"}}'))
    if not isinstance(record, dict) or field not in record:
        kind = "has no key" if isinstance(record, dict) else "is no JSON object with the key"
        return replace(entry, error=InputError(f"the line {kind} '{field}'", "name the key with --field"))
    text = record[field]
    if not isinstance(text, str):
        return replace(entry, error=InputError(f"'{field}' is no string, but {printable(repr(text), 100)}"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return replace(entry, error=InputError(f"'{field}' has half of a character at offset {error.start}"))
    return replace(entry, text=text)


class _CsvLines:
    """The lines of a CSV file for Python's `csv`, which may ask for several to make one row of them.

    It raises for what is too long, and may be asked again all the same; a generator would have ended.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._begun = False
        self.row_bytes = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := self._file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            raise InputError(f"the line {_LONG}", "put one row on each line")
        self.row_bytes += len(line)
        if self.row_bytes > _MOST_ROW_BYTES:
            raise InputError(f"the row is longer than {_MOST_ROW_BYTES // MIB} MiB", "look for a quote without an end")
        if not self._begun:
            line = line.removeprefix(codecs.BOM_UTF8)
            self._begun = True
        return line.decode("utf-8", "surrogateescape")


def _read_csv(file: BinaryIO, path: Path, field: str) -> Iterator[Entry]:
    """Yield an entry for each row below the header; empty lines are none, as for `csv.DictReader`."""
    csv.field_size_limit(MAX_LINE_BYTES)  # else it is 128 KiB
    lines = _CsvLines(file)
    rows = csv.reader(lines)
    try:
        header = next((row for row in rows if row), None)
    except (csv.Error, InputError) as error:
        raise InputError(f"{path}: its first row cannot be read: {error}") from error
    if header is None:
        raise InputError(f"{path}: it has no header row")
    if header.count(field) != 1:
        raise UsageError(
            f"--field: {path} has {header.count(field) or 'no'} columns '{field}' in its first row: "
            f"{printable(', '.join(header), 200)}",
            "name one of them",
        )
    column, position = header.index(field), 0
    while True:
        lines.row_bytes = 0
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            long = "field larger" in str(error)
            reason = f"a field {_LONG}" if long else f"the row cannot be read: {error}"
            yield Entry(position, "", InputError(reason, "look for a quote without an end" if long else ""))
        except InputError as error:
            yield Entry(position, "", error)
        else:
            if not row:
                continue
            if len(row) <= column:
                reason = f"the row has {format_count(len(row), 'field')}, and '{field}' is number {column + 1}"
                yield Entry(position, "", InputError(reason))
            else:
                yield _bounded(decode(position, row[column].encode("utf-8", "surrogateescape")))
        position += 1


def _bounded(entry: Entry) -> Entry:
    if len(entry.text.encode()) > MAX_LINE_BYTES:
        return Entry(entry.id, "", InputError(f"the text {_LONG}"))
    return entry


def _parquet(file: BinaryIO, path: Path, field: str | None) -> Any:
    """Open a Parquet file whose column `field` holds texts."""
    pyarrow, parquet = import_pyarrow(str(path))
    try:
        # Without a buffer it would read a column of a whole row group at once.
        opened = parquet.ParquetFile(file, buffer_size=MIB, pre_buffer=False)
        schema = opened.schema_arrow
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path}: it is no Parquet file: {printable(error, 300)}") from error
    names = schema.names
    if names.count(field) != 1:
        raise UsageError(
            f"--field: {path} has {names.count(field) or 'no'} columns '{field}': {printable(', '.join(names), 200)}",
            "name one of them",
        )
    kind = schema.field(field).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(value) or pyarrow.types.is_large_string(value)):
        raise UsageError(f"--field: column '{field}' of {path} holds {kind}, not texts", "name another one")
    return opened


def _read_parquet(file: BinaryIO, path: Path, field: str) -> Iterator[Entry]:
    pyarrow, _ = import_pyarrow(str(path))
    opened = _parquet(file, path, field)
    position = 0
    try:
        for batch in opened.iter_batches(batch_size=_PARQUET_ROWS, columns=[field], use_threads=False):
            # As bytes: nobody has checked that they are UTF-8.
            for value in batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary()):
                raw = value.as_py()
                if raw is None:
                    yield Entry(position, "", InputError(f"'{field}' is null"))
                elif len(raw) > MAX_LINE_BYTES:
                    yield Entry(position, "", InputError(f"the text {_LONG}"))
                else:
                    yield decode(position, raw)
                position += 1
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path}: it is damaged: {printable(error, 300)}") from error
