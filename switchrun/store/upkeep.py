"""All stores of an offload folder: what is there, whether it is whole, and how to get rid of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from xxhash import xxh3_64

from switchrun.errors import CorruptCheckpointError, printable
from switchrun.machine.folders import MANIFEST, open_below, store_folders
from switchrun.store.dense_file import JOURNAL, PARTIAL_FILE, DenseFormat, remove_dense
from switchrun.store.files import DamagedFileError, ExpertFormat, temporaries
from switchrun.store.manifest import FORMAT_VERSION, Manifest, read_manifest
from switchrun.store.paths import (
    DENSE_FILE,
    DENSE_FOLDER,
    block_folders,
    expert_path,
    open_stored,
    opened,
    remove_stored,
    stored_experts,
)

_CHUNK_BYTES = 4 * 1024**2

#: Called with the bytes done and the bytes in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """One store that was found, and how many experts it has, with what its files take, headers included.

    One of dense weights has no experts, and a single file.

    Attributes:
        manifest: None if it cannot be read. One of another format version has no layout.
        problem: Why the store cannot be used, in words; empty if it can.
    """

    folder: Path
    manifest: Manifest | None
    experts: int
    nbytes: int
    problem: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How many experts `verify_store` read, their bytes with headers, and (file, what is wrong) of damaged ones."""

    experts: int
    nbytes: int
    damaged: tuple[tuple[Path, str], ...]


def list_stores(offload: str | Path) -> list[StoreInfo]:
    """Return every store in an offload folder; a folder that is not there has none."""
    return [_describe(folder) for folder in store_folders(Path(offload))]


def _describe(folder: Path) -> StoreInfo:
    sizes = [status.st_size for _, status in stored_experts(folder)]
    dense = sum(size for _, size in _dense_files(folder))
    manifest, problem = None, ""
    try:
        manifest = read_manifest(folder)
        if manifest is not None and manifest.version != FORMAT_VERSION:
            problem = f"format {manifest.version}, not {FORMAT_VERSION}"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        problem = f"its {MANIFEST} cannot be used: {printable(reason, 200)}"
    return StoreInfo(folder, manifest, len(sizes), sum(sizes) + dense, problem)


def _dense_files(folder: Path) -> list[tuple[str, int]]:
    """Return the names and sizes of what a store has of dense weights, whole or in part."""
    found = []
    with contextlib.suppress(OSError), opened(folder) as handle:
        for name in (DENSE_FILE, PARTIAL_FILE, JOURNAL):
            with contextlib.suppress(OSError):
                status = os.stat(name, dir_fd=handle, follow_symlinks=False)
                # A partial file has holes where bytes are still to come.
                found.append((name, status.st_size if name == DENSE_FILE else status.st_blocks * 512))
    return found


def verify_store(folder: Path, progress: Progress | None = None, *, delete: bool = False) -> VerifyReport:
    """Read every expert of a store and compare it with its checksum; with `delete`, delete what is damaged.

    Raises:
        CorruptCheckpointError: The store's manifest is missing, or cannot be used.
    """
    info = _describe(folder)
    if info.manifest is None or info.problem:
        problem = info.problem or f"it has no {MANIFEST}"
        raise CorruptCheckpointError(f"{folder}: nothing in it can be verified: {problem}")
    form = ExpertFormat(info.manifest.layout, info.manifest.identity)

    def report(before: int, read: int = 0) -> None:
        if progress is not None:
            # Others may have written since the bytes were counted.
            progress(before + read, max(before + read, info.nbytes))

    damaged: list[tuple[Path, str]] = []
    experts = done = 0
    for key, status in sorted(stored_experts(folder), key=lambda found: found[0]):
        path = expert_path(folder, key)
        try:
            stored = form.inspect(path, key)
            if _checksum(path, stored.offset, partial(report, done)) != stored.checksum:
                raise DamagedFileError("its bytes do not match its checksum")
        except FileNotFoundError:
            continue  # Somebody else keeps the folder small.
        except (DamagedFileError, OSError) as error:
            damaged.append((path, (error.strerror if isinstance(error, OSError) else None) or str(error)))
            if delete and isinstance(error, DamagedFileError):
                with contextlib.suppress(OSError):
                    remove_stored(path)
        experts += 1
        done += status.st_size
        report(done)
    if folder.name == DENSE_FOLDER:
        problem = _verify_dense(
            folder, DenseFormat(info.manifest.layout, info.manifest.identity), partial(report, done)
        )
        done = info.nbytes
        if problem:
            damaged.append((folder / DENSE_FILE, problem))
            if delete:
                remove_dense(folder / DENSE_FILE)
    return VerifyReport(experts, done, tuple(damaged))


def _verify_dense(folder: Path, form: DenseFormat, progress: Callable[[int], None]) -> str:
    """Return what is wrong with a file of dense weights; nothing if it is whole, or not there."""
    read = 0
    try:
        checksums = form.inspect(folder)
        with (
            opened(folder) as handle,
            open(os.open(DENSE_FILE, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=handle), "rb") as file,
        ):
            for name, checksum in checksums.items():
                if form.checksum(file.fileno(), name) != checksum:
                    return f"the bytes of {name} do not match their checksum"
                read += form.layout[name].nbytes
                progress(read)
    except FileNotFoundError:
        pass
    except (DamagedFileError, OSError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ""


def _checksum(path: Path, offset: int, progress: Callable[[int], None]) -> int:
    """Sum up a file's data, and give its pages back: a whole store would drive everything else out of the cache."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    checksum = xxh3_64()
    with open(open_stored(path), "rb", buffering=0) as file:
        file.seek(offset)
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
            progress(file.tell())
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)
    return checksum.intdigest()


def clear_store(folder: Path, progress: Progress | None = None) -> int:
    """Delete the files that switchrun writes into a store, and return the bytes that were freed.

    The manifest goes last: if OSError ends this halfway, the store is still found, and can be cleared again. A process
    that uses the store meanwhile takes its experts from the checkpoint.
    """
    found = list(stored_experts(folder))
    total, freed = sum(status.st_size for _, status in found), 0
    for key, status in found:
        with contextlib.suppress(FileNotFoundError):
            remove_stored(expert_path(folder, key))
        freed += status.st_size
        if progress is not None:
            progress(freed, total)
    with contextlib.suppress(FileNotFoundError), opened(folder) as handle:
        for _, _, name in block_folders(folder):
            _remove_if_empty(name, handle)
        dense = _dense_files(folder)
        freed += sum(size for _, size in dense)
        for name in (*(name for name, _ in dense), *temporaries(handle), MANIFEST):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=handle)
    offload, model = folder.parent.parent, folder.parent.name
    with contextlib.suppress(OSError), open_below(offload, model) as handle:
        _remove_if_empty(folder.name, handle)
    with contextlib.suppress(OSError), open_below(offload) as handle:
        _remove_if_empty(model, handle)
    return freed


def _remove_if_empty(name: str, within: int) -> None:
    """Remove an empty folder; a link to one is left."""
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=within)
