"""Which tensors a folder holds: finds the container, reads every shard's header, and remembers the result.

Reading 364 headers takes seconds, reading the cached index a fraction of one. That is a line with a checksum and one of
JSON, in columns, so that 120,000 tensors are four lists and not 120,000 small ones. It is trusted no more than a file
of the checkpoint: if anything is wrong with it, it counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from switchrun.checkpoint.files import (
    MOST_CONFIG_BYTES,
    MOST_JSON_BYTES,
    open_weights,
    parse_json,
    plausible,
    read_json_object,
    unreadable,
)
from switchrun.checkpoint.safetensors_file import read_safetensors, tensor_bytes
from switchrun.checkpoint.torch_file import ZIP_MAGIC, read_torch
from switchrun.checkpoint.types import FileStamp, Index, Kind, TensorSlice
from switchrun.errors import CorruptCheckpointError, ModelError, printable
from switchrun.machine.folders import cache_folder, read_cache_file, write_cache_file

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
#: Files that training leaves beside the weights.
_NOT_WEIGHTS = frozenset({"optimizer.pt", "scheduler.pt"})
_READERS = 8
#: switch-c-2048 has 123,000, three times as many in int8.
_MOST_TENSORS = 1_000_000
_CACHE_VERSION = 2


def load_index(folder: Path, cache_dir: Path | None = None) -> Index:
    """Index a folder's tensors, or take the index from the cache if no file has changed since.

    Raises:
        ModelError: The folder holds no configuration or no weights.
        CorruptCheckpointError: A shard is missing or damaged.
    """
    folder = folder.resolve()
    entry = _find_entry(folder)
    cache_dir = cache_dir or cache_folder() / "index"
    index = _read_cache(cache_dir, folder, entry)
    if index is None:
        index = _read_index(folder, entry)
        _write_cache(cache_dir, folder, index)
    return index


def _find_entry(folder: Path) -> Path:
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if CONFIG not in names:
        raise ModelError(f"{folder}: there is no {CONFIG}, so this is not a model's folder")
    named: Any = read_json_object(folder / CONFIG, MOST_CONFIG_BYTES).get(_NAMED_ENTRY)
    if named is not None:
        if not _is_inside(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ModelError(f"{folder / CONFIG}: {_NAMED_ENTRY} is no safetensors file of this folder")
        return folder / str(named)
    entries = [folder / name for name in _ENTRIES if name in names]
    if entries:
        # As transformers does, what is no file is passed over; if nothing else is there, reading it says what it is.
        return next(filter(_is_file, entries), entries[0])
    for suffix in (".safetensors", ".pt"):
        found = sorted(name for name in names if name.endswith(suffix) and name not in _NOT_WEIGHTS)
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise ModelError(
                f"{folder}: {len(found)} {suffix} files and no index that says which tensor is in which",
                f"add model.safetensors.index.json, or leave only one of {found[0]}, {found[1]}, …",
            )
    raise ModelError(f"{folder}: there are no weights (looked for {', '.join(_ENTRIES)}, *.pt)")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # It may not be looked at.
        return False


def _read_index(folder: Path, entry: Path) -> Index:
    weight_map = _weight_map(entry) if entry.suffix == ".json" else {}
    names = sorted(set(weight_map.values())) or [_relative(entry, folder)]
    files = [folder / name for name in names]
    if weight_map:
        _check_shards(entry, files)
    # Stamped before they are read: a file that changes meanwhile is then seen to have changed.
    try:
        stamps = tuple(FileStamp.of(folder, path) for path in dict.fromkeys((folder / CONFIG, entry, *files)))
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from error
    kinds: dict[Kind, int] = {}
    rows: dict[str, tuple[int, int, int]] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        # Reading headers from a cold disk is waiting. Parsing does not gain from threads, and may take much memory.
        for number, tensors in enumerate(pool.map(partial(_read_weights, turn=Lock()), files)):
            for name, tensor in tensors.items():
                # transformers takes the last of two tensors of one name; the index may say which is meant.
                if name in rows and weight_map.get(name) == names[rows[name][0]]:
                    continue
                kind = Kind(tensor.nbytes, tensor.dtype, tensor.shape, tensor.transposed)
                rows[name] = number, tensor.offset, kinds.setdefault(kind, len(kinds))
            if len(rows) > _MOST_TENSORS:
                raise CorruptCheckpointError(f"{entry}: it has more than {_MOST_TENSORS} tensors")
    lost = {name: file for name, file in weight_map.items() if name not in rows}
    return Index(entry=entry, files=tuple(files), kinds=tuple(kinds), rows=rows, stamps=stamps, lost=lost)


def _read_weights(path: Path, turn: Lock) -> dict[str, TensorSlice]:
    """Read a file's headers by what it is, whatever it is called."""
    with open_weights(path) as file:
        begin = file.read(0, min(file.size, 9))
    # As the length of a safetensors header, the first bytes of a zip archive would be more than is allowed.
    is_torch = begin.startswith(ZIP_MAGIC) or (path.suffix != ".safetensors" and begin[8:] != b"{")
    return read_torch(path, turn) if is_torch else read_safetensors(path, turn)


def _weight_map(entry: Path) -> dict[str, str]:
    """Return which file each tensor should be in. transformers only finds the files by it, and so do we."""
    weight_map: Any = read_json_object(entry, MOST_JSON_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{entry}: there is no weight_map in it")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptCheckpointError(f"{entry}: its weight_map is malformed")
    for file in set(weight_map.values()):
        if not _is_inside(file):
            raise CorruptCheckpointError(
                f"{entry}: it names a file outside the checkpoint's folder: {printable(repr(file), 200)}"
            )
    return weight_map


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


def _check_shards(entry: Path, files: list[Path]) -> None:
    try:
        missing = [path for path in files if not path.exists()]
    except OSError as error:  # A name that is longer than the system allows, or a folder that must not be entered.
        raise unreadable(Path(error.filename or entry), error) from error
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CorruptCheckpointError(
            f"{missing[0]}: the file is missing{others}; {entry.name} names {len(files)} files",
            "finish the download",
        )


def _read_cache(cache_dir: Path, folder: Path, entry: Path) -> Index | None:
    """Return the index that was kept; None if there is none, a file has changed since, or anything in it is wrong."""
    try:
        checksum, text = read_cache_file(_cache_file(cache_dir, folder), MOST_JSON_BYTES).split(b"\n", 1)
        if checksum != _checksum(text):
            return None
        record = parse_json(text)
        if (record["version"], record["folder"], record["entry"]) != (
            _CACHE_VERSION,
            str(folder),
            _relative(entry, folder),
        ):
            return None
        names, lost = record["files"], record["lost"]
        if not all(map(_is_inside, names)) or len(set(names)) < len(names):
            return None
        files = tuple(folder / name for name in names)
        stamps = tuple(FileStamp.of(folder, path) for path in dict.fromkeys((folder / CONFIG, entry, *files)))
        if [list(stamp) for stamp in stamps] != record["stamps"]:
            return None
        sizes = {stamp.name: stamp.size for stamp in stamps}
        kinds = tuple(Kind(nbytes, dtype, tuple(shape), flag) for nbytes, dtype, shape, flag in record["kinds"])
        places = zip(record["file"], record["offset"], record["kind"], strict=True)
        rows = dict(zip(record["name"], places, strict=True))
        if not (all(map(_is_true, kinds)) and _are_inside(rows, [sizes[name] for name in names], kinds)):
            return None
        if not all(type(text) is str for item in lost.items() for text in item):
            return None
        return Index(entry=entry, files=files, kinds=kinds, rows=rows, stamps=stamps, lost=lost)
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


def _are_inside(rows: dict[Any, tuple[Any, Any, Any]], sizes: list[int], kinds: tuple[Kind, ...]) -> bool:
    """Whether rows from the cache are names, and places within the files; none at all are no index."""
    for name, (file, offset, kind) in rows.items():
        if type(name) is not str or not type(file) is type(offset) is type(kind) is int:
            return False
        if not (0 <= file < len(sizes) and 0 <= kind < len(kinds) and 0 <= offset <= sizes[file] - kinds[kind].nbytes):
            return False
    return bool(rows)


def _write_cache(cache_dir: Path, folder: Path, index: Index) -> None:
    file, offset, kind = zip(*index.rows.values(), strict=True) if index.rows else ((), (), ())
    record = {
        "version": _CACHE_VERSION,
        "folder": str(folder),
        "entry": _relative(index.entry, folder),
        "stamps": index.stamps,
        "files": [_relative(path, folder) for path in index.files],
        "lost": index.lost,
        "kinds": index.kinds,
        "name": list(index.rows),
        "file": file,
        "offset": offset,
        "kind": kind,
    }
    text = json.dumps(record, separators=(",", ":")).encode()
    write_cache_file(_cache_file(cache_dir, folder), _checksum(text) + b"\n" + text)


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _cache_file(cache_dir: Path, folder: Path) -> Path:
    name = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_dir / f"{name}.json"


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
