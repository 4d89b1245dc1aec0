"""Which tensors a folder holds: finds the container, reads every shard's header, and remembers the result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from switchrun.checkpoint.files import read_json_object, unreadable
from switchrun.checkpoint.index_cache import FileStamp, default_cache_dir, read_cache, stamp, write_cache
from switchrun.checkpoint.safetensors_file import read_safetensors
from switchrun.checkpoint.torch_file import read_torch
from switchrun.checkpoint.types import Entry, Kind, Row, TensorTable
from switchrun.errors import CorruptCheckpointError, ModelError

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


@dataclass(frozen=True, slots=True)
class Index:
    """The raw tensors of a folder.

    Attributes:
        entry: The file from which the others are found: an index JSON, or the only weights file.
        tensors: All tensors, by the names they have in the files.
        stamps: Names, sizes and modification times of all files that were read, the configuration's too.
    """

    entry: Path
    tensors: TensorTable
    stamps: tuple[FileStamp, ...]


def load_index(folder: Path, cache_dir: Path | None = None) -> Index:
    """Index a folder's tensors, or take the index from the cache if no file has changed since.

    Args:
        folder: The checkpoint.
        cache_dir: Where indexes are kept; by default the user's cache folder.

    Raises:
        ModelError: The folder holds no configuration or no weights.
        CorruptCheckpointError: A shard is missing or damaged, or does not hold what the index JSON says.
    """
    folder = folder.resolve()
    entry = _find_entry(folder)
    cache_dir = cache_dir or default_cache_dir()
    cached = read_cache(cache_dir, folder, entry.name)
    if cached is not None:
        return Index(entry, *cached)
    weight_map = _weight_map(entry) if entry.suffix == ".json" else None
    files = _shards(entry, weight_map)
    # Stamped before they are read: a file that changes meanwhile is then seen to have changed.
    try:
        stamps = tuple(stamp(folder, path) for path in dict.fromkeys((folder / CONFIG, entry, *files)))
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from error
    read = read_torch if entry.name.endswith((".bin", ".bin.index.json", ".pt")) else read_safetensors
    with ThreadPoolExecutor(_READERS) as pool:
        # Reading headers from a cold disk is waiting; the parsing itself does not gain from threads.
        headers = list(pool.map(read, files))
    tensors = _table(folder, files, headers, weight_map)
    write_cache(cache_dir, folder, entry.name, tensors, stamps)
    return Index(entry, tensors, stamps)


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
                f"{folder}: {len(found)} {suffix} files and no index that tells which tensor is in which",
                f"add model.safetensors.index.json, or leave only one of {found[0]}, {found[1]}, …",
            )
    raise ModelError(f"{folder}: there are no weights (looked for {', '.join(_ENTRIES)}, *.pt)")


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


def _shards(entry: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is None:
        return [entry]
    files = [entry.parent / name for name in sorted(set(weight_map.values()))]
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
    return files


def _table(
    folder: Path, files: list[Path], headers: list[dict[str, Entry]], weight_map: dict[str, str] | None
) -> TensorTable:
    numbers = {path: number for number, path in enumerate(files)}
    kinds: dict[Kind, int] = {}
    rows: dict[str, tuple[int, int, int]] = {}
    if weight_map is None:
        weight_map = dict.fromkeys(headers[0], files[0].name)
    by_name = {name: numbers[folder / name] for name in set(weight_map.values())}
    for name, file in weight_map.items():
        number = by_name[file]
        entry = headers[number].get(name)
        if entry is None:
            raise CorruptCheckpointError(f"{files[number]}: tensor {name} is not in this file, but the index says so")
        kind = Kind(entry.nbytes, entry.dtype, entry.shape, entry.transposed)
        rows[name] = Row(number, entry.offset, kinds.setdefault(kind, len(kinds)))
    return TensorTable(tuple(files), tuple(kinds), rows)
