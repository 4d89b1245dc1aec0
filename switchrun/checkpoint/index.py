"""Which tensors a folder holds: finds the container, reads every shard's header, and remembers the result.

Reading 364 headers takes seconds, reading the cached index a fraction of one. That is a line with a checksum and one of
JSON, in columns, so that 120,000 tensors are four lists and not 120,000 small ones. If anything is wrong with it, it
counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from switchrun.checkpoint.files import WeightsFile, open_weights, plausible, read_json_object, unreadable
from switchrun.checkpoint.torch_file import read_torch
from switchrun.checkpoint.types import FileStamp, Index, Kind, TensorSlice
from switchrun.dtypes import STORED_ITEMSIZE
from switchrun.errors import CorruptCheckpointError, ModelError
from switchrun.machine.folders import cache_folder, write_cache_file

CONFIG = "config.json"
#: In order of preference: what transformers itself would load, safetensors first.
_ENTRIES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: Files that training leaves beside the weights.
_NOT_WEIGHTS = frozenset({"optimizer.pt", "scheduler.pt"})
_READERS = 8
_CACHE_VERSION = 1


def load_index(folder: Path, cache_dir: Path | None = None) -> Index:
    """Index a folder's tensors, or take the index from the cache if no file has changed since.

    Raises:
        ModelError: The folder holds no configuration or no weights.
        CorruptCheckpointError: A shard is missing or damaged, or does not hold what the index JSON says.
    """
    folder = folder.resolve()
    entry = _find_entry(folder)
    cache_dir = cache_dir or cache_folder() / "index"
    index = _read_cache(cache_dir, entry)
    if index is None:
        index = _read_index(folder, entry)
        _write_cache(cache_dir, index)
    return index


def _find_entry(folder: Path) -> Path:
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if CONFIG not in names:
        raise ModelError(f"{folder}: there is no {CONFIG}, so this is not a model's folder")
    for name in _ENTRIES:
        if name in names:
            return folder / name
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


def _read_index(folder: Path, entry: Path) -> Index:
    weight_map = _weight_map(entry) if entry.suffix == ".json" else None
    names = [entry.name] if weight_map is None else sorted(set(weight_map.values()))
    files = [folder / name for name in names]
    if weight_map is not None:
        _check_shards(entry, files)
    # Stamped before they are read: a file that changes meanwhile is then seen to have changed.
    try:
        stamps = tuple(FileStamp.of(folder, path) for path in dict.fromkeys((folder / CONFIG, entry, *files)))
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from error
    read = read_torch if entry.name.endswith((".bin", ".bin.index.json", ".pt")) else read_safetensors
    with ThreadPoolExecutor(_READERS) as pool:
        # Reading headers from a cold disk is waiting; the parsing itself does not gain from threads.
        headers = dict(zip(names, pool.map(read, files), strict=True))
    if weight_map is None:
        weight_map = dict.fromkeys(headers[entry.name], entry.name)
    numbers = {name: number for number, name in enumerate(names)}
    kinds: dict[Kind, int] = {}
    rows: dict[str, tuple[int, int, int]] = {}
    for name, file in weight_map.items():
        found = headers[file].get(name)
        if found is None:
            raise CorruptCheckpointError(f"{folder / file}: tensor {name} is not in this file, but the index says so")
        kind = Kind(found.nbytes, found.dtype, found.shape, found.transposed)
        rows[name] = numbers[file], found.offset, kinds.setdefault(kind, len(kinds))
    return Index(entry=entry, files=tuple(files), kinds=tuple(kinds), rows=rows, stamps=stamps)


def _weight_map(entry: Path) -> dict[str, str]:
    weight_map: Any = read_json_object(entry).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{entry}: there is no weight_map in it")
    for file in set(map(str, weight_map.values())):
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file or not path.name:
            raise CorruptCheckpointError(f"{entry}: it names a file outside the checkpoint's folder: {file!a}")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptCheckpointError(f"{entry}: its weight_map is malformed")
    return weight_map


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


def _read_cache(cache_dir: Path, entry: Path) -> Index | None:
    """Return the index that was kept; None if there is none, or a file has changed since."""
    folder = entry.parent
    try:
        checksum, text = _cache_file(cache_dir, folder).read_bytes().split(b"\n", 1)
        if checksum != _checksum(text):
            return None
        record = json.loads(text)
        if (record["version"], record["folder"], record["entry"]) != (_CACHE_VERSION, str(folder), entry.name):
            return None
        stamps = tuple(FileStamp(*row) for row in record["stamps"])
        if any(FileStamp.of(folder, folder / old.name) != old for old in stamps):
            return None
        places = zip(record["file"], record["offset"], record["kind"], strict=True)
        return Index(
            entry=entry,
            files=tuple(folder / name for name in record["files"]),
            kinds=tuple(Kind(nbytes, dtype, tuple(shape), flag) for nbytes, dtype, shape, flag in record["kinds"]),
            rows=dict(zip(record["name"], places, strict=True)),
            stamps=stamps,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(cache_dir: Path, index: Index) -> None:
    folder = index.entry.parent
    file, offset, kind = zip(*index.rows.values(), strict=True) if index.rows else ((), (), ())
    record = {
        "version": _CACHE_VERSION,
        "folder": str(folder),
        "entry": index.entry.name,
        "stamps": index.stamps,
        "files": [path.relative_to(folder).as_posix() for path in index.files],
        "kinds": index.kinds,
        "name": list(index.rows),
        "file": file,
        "offset": offset,
        "kind": kind,
    }
    text = json.dumps(record, separators=(",", ":")).encode()
    write_cache_file(_cache_file(cache_dir, folder), _checksum(text) + b"\n" + text)


def _cache_file(cache_dir: Path, folder: Path) -> Path:
    name = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_dir / f"{name}.json"


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


#: The limit that the safetensors library itself sets.
_MAX_HEADER_BYTES = 100_000_000


def read_safetensors(path: Path) -> dict[str, TensorSlice]:
    """Read which tensors a safetensors file holds, and where; CorruptCheckpointError if its header makes no sense."""
    with open_weights(path) as file:
        header_bytes = int.from_bytes(file.read(0, 8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise CorruptCheckpointError(f"{path}: not a safetensors file (its header would be {header_bytes} bytes)")
        text = file.read(8, header_bytes)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorruptCheckpointError(f"{path}: its header is not valid JSON: {error}") from error
        if not isinstance(header, dict):
            raise CorruptCheckpointError(f"{path}: its header is not a JSON object")
        header.pop("__metadata__", None)
        return {name: _slice(file, name, value, 8 + header_bytes) for name, value in header.items()}


def _slice(file: WeightsFile, name: str, value: Any, start: int) -> TensorSlice:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if type(dtype) is not str or not plausible((*shape, begin, end)) or begin > end:
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptCheckpointError(f"{file.path}: the header's entry for tensor {name} is malformed") from error
    itemsize = STORED_ITEMSIZE.get(dtype)
    # A dtype unknown here is no weight's; a tensor that the model needs is refused later, by its dtype.
    if itemsize is not None and math.prod(shape) * itemsize != end - begin:
        raise CorruptCheckpointError(
            f"{file.path}: tensor {name} has {end - begin} bytes, but {dtype} {list(shape)} takes "
            f"{math.prod(shape) * itemsize}"
        )
    if start + end > file.size:
        raise file.truncated(f"tensor {name} ends at byte {start + end}, the file at {file.size}")
    return TensorSlice(file.path, offset=start + begin, nbytes=end - begin, dtype=dtype, shape=shape)
