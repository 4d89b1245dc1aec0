"""Which tensors a checkpoint holds: finds the container, reads every shard's header, and remembers the result.

The weights are files of the folder, or stay on the Hub, while the folder has the configuration and the index JSON.

Reading 364 headers takes seconds, reading the cached index a fraction of one. That is a line with a checksum and one of
JSON, in columns, so that 120,000 tensors are four lists and not 120,000 small ones. It is trusted no more than a file
of the checkpoint: if anything is wrong with it, it counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from switchrun.checkpoint import qmoe
from switchrun.checkpoint.files import (
    MOST_CONFIG_BYTES,
    MOST_JSON_BYTES,
    Weights,
    open_weights,
    parse_json,
    plausible,
    read_json_object,
    unreadable,
)
from switchrun.checkpoint.hub import choose_files, is_offline
from switchrun.checkpoint.names import LINEAR_NAME
from switchrun.checkpoint.safetensors_file import read_safetensors, tensor_bytes
from switchrun.checkpoint.steps import NO_STEPS, Steps
from switchrun.checkpoint.torch_file import ZIP_MAGIC, read_torch
from switchrun.checkpoint.types import (
    MOST_HEADER_BYTES,
    ExpertPlaces,
    FileStamp,
    Index,
    Kind,
    RemoteFile,
    RemoteRepo,
    TensorSlice,
)
from switchrun.errors import CorruptCheckpointError, ModelError, NetworkError, printable
from switchrun.machine.folders import cache_folder, read_cache_file, write_cache_file

if TYPE_CHECKING:
    from switchrun.checkpoint.remote import HubRanges

_T = TypeVar("_T")

CONFIG = "config.json"
#: In order of preference: what transformers itself would load, safetensors first.
_ENTRIES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: A key of config.json that names another entry; transformers goes by it.
_NAMED_ENTRY = "transformers_weights"
#: What bitsandbytes notes beside a matrix, in one byte, and its number for one that lies row by row.
_LAYOUT, _ROWS = ".weight_format", 0
#: Files that training leaves beside the weights.
_NOT_WEIGHTS = frozenset({"optimizer.pt", "scheduler.pt"})
_READERS = 8
_REMOTE_READERS = 16
#: switch-c-2048 has 123,000, three times as many in int8.
_MOST_TENSORS = 1_000_000
_CACHE_VERSION = 4
_COLUMNS = ("file", "offset", "kind", "header_bytes", "crc")


class NotKeptError(NetworkError):
    """The index of a model on the Hub is not in the cache, and the Hub is not to be asked."""


def load_index(
    folder: Path,
    cache_dir: Path | None = None,
    remote: RemoteRepo | None = None,
    ranges: HubRanges | None = None,
    steps: Steps = NO_STEPS,
) -> Index:
    """Index a checkpoint's tensors, or take the index from the cache if no file has changed since.

    With `remote` its files are the weights, whose headers `ranges` reads; it is closed if that fails. Without `ranges`
    only the cache is looked into. `steps` takes how many files have been read.

    Raises:
        ModelError: There is no configuration, or there are no weights.
        CorruptCheckpointError: A shard is missing or damaged.
        NetworkError: The Hub could not be reached.
        NotKeptError: There are no `ranges`, and the index is not in the cache.
    """
    steps("index")
    source = _Source(folder.resolve(), remote, ranges)
    entry = _find_entry(source)
    cache_dir = cache_dir or cache_folder() / "index"
    index = _read_cache(cache_dir, source, entry)
    if index is None:
        index = _read_index(source, entry, steps)
        _write_cache(cache_dir, source, entry, index)
    return index


class _Source:
    """Where a checkpoint's files are, by names relative to the folder or the repository."""

    def __init__(self, folder: Path, remote: RemoteRepo | None, ranges: HubRanges | None) -> None:
        self.folder = folder
        self.ranges = ranges
        self.remote = None if remote is None else {file.name: file for file in remote.files}
        self.place = str(folder) if remote is None else remote.id

    def names(self) -> set[str]:
        """The files at the top that weights are looked for among."""
        if self.remote is not None:
            return {CONFIG, *choose_files(self.remote)}
        try:
            return {path.name for path in self.folder.iterdir()}
        except OSError as error:
            raise ModelError(f"{self.folder}: cannot be read: {error.strerror or error}") from error

    def file(self, name: str) -> Path | RemoteFile:
        return self.folder / name if self.remote is None else self.remote[name]

    def has(self, name: str) -> bool:
        return (self.folder / name).exists() if self.remote is None else name in self.remote

    def stamps(self, names: Iterable[str]) -> tuple[FileStamp, ...]:
        """Stamp the configuration, unless all others are stamped by their content, and these."""
        wanted = dict.fromkeys(names)
        if self.remote is not None:
            return tuple(FileStamp(name, self.remote[name].size, self.remote[name].hash) for name in wanted)
        stamps = tuple(FileStamp.of(self.folder, self.folder / name) for name in wanted)
        known = all(type(stamp.state) is str for stamp in stamps)
        return stamps if known else (FileStamp.of(self.folder, self.folder / CONFIG), *stamps)

    @contextmanager
    def open(self, name: str, entries: int = 0) -> Iterator[Weights]:
        """Open a weights file to read headers; `entries` is about how many tensors it has, if that is known."""
        file = self.file(name)
        if isinstance(file, Path):
            with open_weights(file) as weights:
                yield weights
            return
        if self.ranges is None or is_offline():
            raise NotKeptError(
                f"the index of {file.repo} is not on this machine, and HF_HUB_OFFLINE is set", "unset it once"
            )
        from switchrun.checkpoint.remote_weights import open_remote

        yield open_remote(file, self.ranges, entries)


def _find_entry(source: _Source) -> str:
    folder, names = source.folder, source.names()
    if CONFIG not in names:
        raise ModelError(f"{folder}: there is no {CONFIG}, so this is not a model's folder")
    named: Any = read_json_object(folder / CONFIG, MOST_CONFIG_BYTES).get(_NAMED_ENTRY)
    if named is not None:
        if not _is_inside(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ModelError(f"{folder / CONFIG}: {_NAMED_ENTRY} is no safetensors file of this folder")
        return str(PurePosixPath(named))
    entries = [name for name in _ENTRIES if name in names]
    if entries:
        # As transformers does, what is no file is passed over; if nothing else is there, reading it says what it is.
        return next((name for name in entries if source.remote or _is_file(folder / name)), entries[0])
    if qmoe.is_qmoe(names):
        return qmoe.DENSE
    for suffix in (".safetensors", ".pt"):
        found = sorted(name for name in names if name.endswith(suffix) and name not in _NOT_WEIGHTS)
        if len(found) == 1:
            return found[0]
        if found:
            raise ModelError(
                f"{source.place}: {len(found)} {suffix} files and no index that says which tensor is in which",
                f"add model.safetensors.index.json, or leave only one of {found[0]}, {found[1]}, …",
            )
    raise no_weights(source.place)


def no_weights(place: str) -> ModelError:
    """The error to raise for a folder or repository without weights."""
    return ModelError(f"{place}: there are no weights (looked for {', '.join(_ENTRIES)}, *.pt)")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # It may not be looked at.
        return False


def _read_index(source: _Source, entry: str, steps: Steps) -> Index:
    weight_map = _weight_map(source.folder / entry) if entry.endswith(".json") else {}
    packed = entry == qmoe.DENSE
    names = qmoe.weights_files(source.names()) if packed else sorted(set(weight_map.values())) or [entry]
    if packed:
        _require_files(source, names, "a QMoE checkpoint has it")
    elif weight_map or source.remote is not None:  # Else reading the only file says what is wrong.
        _require_files(source, names, f"{PurePosixPath(entry).name} names {len(names)} files")
    # Stamped before they are read: a file that changes meanwhile is then seen to have changed.
    try:
        stamps = source.stamps((entry, *names))
    except OSError as error:
        raise unreadable(Path(error.filename or source.folder), error) from error
    # Reading headers is waiting. Parsing does not gain from threads, and may take much memory.
    pool = ThreadPoolExecutor(_READERS if source.remote is None else _REMOTE_READERS)
    try:
        kinds, rows = _read_rows(source, entry, names[:1] if packed else names, weight_map, pool, steps)
        lost = {name: file for name, file in weight_map.items() if name not in rows}
        files = tuple(map(source.file, names))
        index = Index(source.file(entry), files, kinds=kinds, rows=rows, stamps=stamps, lost=lost)
        return replace(index, places=_read_places(source, index, pool, steps)) if packed else index
    except BaseException:
        # Nobody waits for what is still under way, be it on a network that stalls.
        if source.ranges is not None:
            source.ranges.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _read_rows(
    source: _Source, entry: str, names: Sequence[str], weight_map: Mapping[str, str], pool: Executor, steps: Steps
) -> tuple[tuple[Kind, ...], dict[str, tuple[int, int, int, int, int]]]:
    kinds: dict[Kind, int] = {}
    rows: dict[str, tuple[int, int, int, int, int]] = {}
    turn = Lock()

    def read(name: str) -> dict[str, TensorSlice]:
        with source.open(name) as file:
            return _read_weights(file, name, turn)

    for number, tensors in enumerate(_counted(pool.map(read, names), len(names), steps)):
        for name, tensor in tensors.items():
            # transformers takes the last of two tensors of one name; the index may say which is meant.
            if name in rows and weight_map.get(name) == names[rows[name][0]]:
                continue
            kind = kinds.setdefault(Kind(tensor.nbytes, tensor.dtype, tensor.shape, tensor.transposed), len(kinds))
            rows[name] = number, tensor.offset, kind, tensor.header_bytes, tensor.crc or 0
        if len(rows) > _MOST_TENSORS:
            raise CorruptCheckpointError(f"{source.file(entry)}: it has more than {_MOST_TENSORS} tensors")
    return tuple(kinds), rows


def _read_places(source: _Source, dense: Index, pool: Executor, steps: Steps) -> ExpertPlaces:
    """Read where a QMoE checkpoint's experts lie."""
    layers, experts = qmoe.sparse_layers(dense)
    wanted = [qmoe.part_file(layer) for layer in range(len(layers))]
    _require_files(source, wanted, f"the model has {len(wanted)} layers with experts, and a file for each")
    with source.open(qmoe.SIZES) as file:
        sizes = qmoe.read_sizes(file, layers, experts)
    turn = Lock()

    def read(number: int) -> ExpertPlaces:
        with source.open(wanted[number], experts * qmoe.ENTRIES_PER_EXPERT) as file:
            for place in (0, file.size - 1):
                file.read(place, 1)  # What is on the Hub is fetched now, as much as parsing needs.
            with turn:  # which takes 40 MB
                return qmoe.read_part(file, layers[number], sizes[number])

    run = map if source.remote is None else pool.map  # Threads have memory of their own, and a disk keeps none waiting.
    return qmoe.joined(_counted(run(read, range(len(layers))), len(layers), steps))


def _counted(read: Iterable[_T], total: int, steps: Steps) -> Iterator[_T]:
    for done, each in enumerate(read, 1):
        steps("index", done, total)
        yield each


def _read_weights(file: Weights, name: str, turn: Lock) -> dict[str, TensorSlice]:
    """Read a file's headers by what it is, whatever it is called."""
    begin = file.read(0, min(file.size, 9))
    # As the length of a safetensors header, the first bytes of a zip archive would be more than is allowed.
    is_torch = begin.startswith(ZIP_MAGIC) or (not name.endswith(".safetensors") and begin[8:] != b"{")
    tensors = read_torch(file, turn) if is_torch else read_safetensors(file, turn)
    for each, tensor in tensors.items():
        if each.endswith(_LAYOUT) and tensor.nbytes == 1 and LINEAR_NAME.fullmatch(each.removesuffix("_format")):
            _check_rows(file, each, tensor)
    return tensors


def _check_rows(file: Weights, name: str, tensor: TensorSlice) -> None:
    """Raise ModelError for a matrix in int8 that lies in a GPU's tiles, as bitsandbytes before 0.45 might save it."""
    number = file.read(tensor.offset, 1)[0]
    if number != _ROWS:
        raise ModelError(
            f"{file.place}: tensor {name.removesuffix('_format')} is not stored row by row "
            f"(its weight_format is {number})",
            "save it again with bitsandbytes 0.45 or later, or give the original checkpoint",
        )


def _weight_map(entry: Path) -> dict[str, str]:
    """Return which file each tensor should be in. transformers only finds the files by it, and so do we."""
    weight_map: Any = read_json_object(entry, MOST_JSON_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{entry}: there is no weight_map in it")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptCheckpointError(f"{entry}: its weight_map is malformed")
    names: dict[str, str] = {}
    for file in set(weight_map.values()):
        if not _is_inside(file):
            raise CorruptCheckpointError(
                f"{entry}: it names a file outside the checkpoint's folder: {printable(repr(file), 200)}"
            )
        names[file] = str(PurePosixPath(file))
    return {name: names[file] for name, file in weight_map.items()}


def _is_inside(name: object) -> bool:
    """Whether it is the name of a file in the checkpoint's folder or below."""
    if type(name) is not str or "\\" in name or "\0" in name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # No file is called so.
        return False
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _require_files(source: _Source, names: Sequence[str], why: str) -> None:
    try:
        missing = [name for name in names if not source.has(name)]
    except OSError as error:  # A name that is longer than the system allows, or a folder that must not be entered.
        raise unreadable(Path(error.filename or source.folder), error) from error
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CorruptCheckpointError(
            f"{source.place}/{missing[0]}: the file is missing{others}; {why}",
            "finish the download" if source.remote is None else "it is incomplete on the Hub; take another revision",
        )


def _read_cache(cache_dir: Path, source: _Source, entry: str) -> Index | None:
    """Return the index that was kept; None if there is none, a file has changed since, or anything in it is wrong."""
    try:
        place = _cache_place(source, entry, source.stamps([entry]))
        checksum, text = read_cache_file(_cache_file(cache_dir, place), MOST_JSON_BYTES).split(b"\n", 1)
        if checksum != _checksum(text):
            return None
        record = parse_json(text)
        if (record["version"], record["place"], record["entry"]) != (_CACHE_VERSION, place, entry):
            return None
        names, lost = record["files"], record["lost"]
        if not all(map(_is_inside, names)) or len(set(names)) < len(names):
            return None
        stamps = source.stamps((entry, *names))
        if [list(stamp) for stamp in stamps] != record["stamps"]:
            return None
        sizes = {stamp.name: stamp.size for stamp in stamps}
        kinds = tuple(Kind(nbytes, dtype, tuple(shape), flag) for nbytes, dtype, shape, flag in record["kinds"])
        none = [0] * len(record["name"])
        columns = [record[column] or none for column in _COLUMNS]
        if not (all(map(_is_true, kinds)) and _are_inside(record["name"], columns, [sizes[n] for n in names], kinds)):
            return None
        rows = dict(zip(record["name"], zip(*columns, strict=True), strict=True))
        if not all(type(text) is str for item in lost.items() for text in item):
            return None
        files = tuple(map(source.file, names))
        index = Index(source.file(entry), files, kinds=kinds, rows=rows, stamps=stamps, lost=lost)
        if entry != qmoe.DENSE:
            return index
        places = qmoe.from_record(record["places"], index, [sizes[name] for name in names[2:]])
        return replace(index, places=places)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _is_true(kind: Kind) -> bool:
    """Whether a kind from the cache is one that a header could have given."""
    return (
        type(kind.dtype) is str
        and plausible(kind.shape)
        and type(kind.nbytes) is int
        and kind.nbytes == tensor_bytes(kind.dtype, kind.shape)
        and type(kind.transposed) is bool
        and (len(kind.shape) == 2 or not kind.transposed)
    )


def _are_inside(names: Any, columns: list[Any], sizes: list[int], kinds: tuple[Kind, ...]) -> bool:
    """Whether columns from the cache are names, and places within the files; none at all are no index."""
    if set(map(type, names)) != {str} or any(set(map(type, column)) != {int} for column in columns):
        return False
    limits = (len(sizes), 1 << 63, len(kinds), MOST_HEADER_BYTES + 1, 1 << 32)
    if any(min(column) < 0 or max(column) >= limit for column, limit in zip(columns, limits, strict=True)):
        return False
    nbytes = [kind.nbytes for kind in kinds]
    return all(
        header_bytes <= offset <= sizes[file] - nbytes[kind]
        for file, offset, kind, header_bytes, _ in zip(*columns, strict=True)
    )


def _write_cache(cache_dir: Path, source: _Source, entry: str, index: Index) -> None:
    place = _cache_place(source, entry, index.stamps)
    columns = zip(*index.rows.values(), strict=True) if index.rows else [()] * len(_COLUMNS)
    record = {
        "version": _CACHE_VERSION,
        "place": place,
        "entry": entry,
        "stamps": index.stamps,
        "files": [
            file.relative_to(source.folder).as_posix() if isinstance(file, Path) else file.name for file in index.files
        ],
        "lost": index.lost,
        "kinds": index.kinds,
        "name": list(index.rows),
        # Of safetensors some are nothing but zeros.
        **{name: column if any(column) else () for name, column in zip(_COLUMNS, columns, strict=True)},
    }
    if index.places is not None:
        record["places"] = qmoe.to_record(index.places)
    text = json.dumps(record, separators=(",", ":")).encode()
    write_cache_file(_cache_file(cache_dir, place), _checksum(text) + b"\n" + text)


def _cache_place(source: _Source, entry: str, stamps: tuple[FileStamp, ...]) -> str:
    """What an index is kept by: the hash of a file of the Hub, which finds it at each commit; else the folder."""
    state = next(stamp.state for stamp in stamps if stamp.name == entry)
    return f"hub:{entry}:{state}" if type(state) is str else str(source.folder)


def _cache_file(cache_dir: Path, place: str) -> Path:
    name = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_dir / f"{name}.json"


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
