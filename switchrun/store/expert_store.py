"""`ExpertStore`: one model's experts in one dtype, a file each, shared by any number of processes."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from xxhash import xxh3_64, xxh3_64_intdigest

from switchrun.checkpoint.types import ExpertKey, ExpertSlices, SwitchCheckpoint
from switchrun.dtypes import QMOE, STORED_NAMES
from switchrun.errors import StorageError
from switchrun.store.files import DamagedFileError, ExpertFormat, StoredExpert, remove_leftovers, write_atomically
from switchrun.store.layout import ALIGNMENT, Layout, layout_of
from switchrun.store.limit import SizeLimit
from switchrun.store.manifest import Manifest, check_manifest, has_manifest
from switchrun.store.paths import (
    clear_hint,
    expert_path,
    model_name,
    opened,
    remove_stored,
    store_folder,
    stored_exists,
    stored_status,
)
from switchrun.units import format_bytes

_log = logging.getLogger(__name__)

#: How an expert is stored; see `form_of`.
ExpertForm = tuple[tuple[str, tuple[int, ...], bool], ...]

#: Called with what the user should know, a sentence each; from any thread.
Warn = Callable[[str], None]


class ExpertStore:
    """Finds, writes and checks stored experts. What is in it can be made, or fetched from the Hub, again.

    So whatever goes wrong with the disk costs time and no more: `find` then returns None and `write` False. Only a
    folder that belongs to something else is refused.

    Processes share a folder without locks: a file appears whole, by a rename, and a second writer of the same expert
    replaces it by its like. A path that `find` returned may vanish before it is opened (another process keeps its size
    limit, or the user clears the folder); whoever cannot open it calls `discard` and takes the checkpoint.

    All methods may be called from any thread.

    Args:
        offload: The offload folder; the store is a folder in it, begun here if it is not there.
        manifest: What the store is of, with the layout of one that is begun now.
        limit_bytes: What the experts may take on disk.
        read_only: Write, delete and touch nothing.
        must_write: Raise where writing would otherwise be given up with a warning, here and in `write`.
        from_hub: What is not here comes from the Hub, and warnings say so.
        warn: Gets warnings; they are logged without it.

    Raises:
        CorruptCheckpointError: The folder belongs to another state of the model, another format, or something else;
            its hint is the command that empties it.
        StorageError: With `must_write`: nothing can be written there.
    """

    def __init__(
        self,
        offload: str | Path,
        manifest: Manifest,
        *,
        limit_bytes: int | None = None,
        read_only: bool = False,
        must_write: bool = False,
        from_hub: bool = False,
        warn: Warn | None = None,
    ) -> None:
        self.folder = store_folder(offload, manifest.model, manifest.dtype)
        hint = clear_hint(offload, manifest.model, manifest.dtype)
        found = check_manifest(self.folder, manifest, hint)
        self.manifest = found or manifest
        self.layout = self.manifest.layout
        self._format = ExpertFormat(self.layout, self.manifest.identity)
        self._read_only = read_only
        self._must_write = must_write
        self._writable = not read_only
        self._from_hub = from_hub
        self._warn = warn or _log.warning
        self._lock = threading.Lock()
        self._known: dict[ExpertKey, StoredExpert] = {}
        #: Damaged files that could not be deleted.
        self._unusable: set[ExpertKey] = set()
        self._warned_unreadable = False
        self._limit: SizeLimit | None = None
        if read_only:
            return
        if limit_bytes is not None:
            self._limit = SizeLimit(self.folder, limit_bytes, self._forget)
        remove_leftovers(self.folder)
        if found is None:
            try:
                manifest.write(self.folder)
            except OSError as error:
                self.stop_writing(error.strerror or str(error))
        if self._limit is not None:
            self._limit.trim()

    @property
    def writable(self) -> bool:
        """Whether writing is asked for, and has not been given up."""
        return self._writable

    @property
    def file_bytes(self) -> int:
        """What each expert takes on disk."""
        return self._format.file_bytes

    def expect(self, key: ExpertKey) -> StoredExpert | None:
        """Return the place of an expert, if a file of its name and size is there; nothing is read.

        A header takes as long as the disk is busy; `verify` reads it later, on the thread that has read the data.
        """
        path = expert_path(self.folder, key)
        with self._lock:
            unknown = key not in self._known and key not in self._unusable
        if unknown and (status := stored_status(path)) is not None and status.st_size == self._format.file_bytes:
            return StoredExpert(path, self._format.header_bytes, self.layout.nbytes, None)
        return self.find(key)

    def has_file(self, key: ExpertKey) -> bool:
        """Whether anything has the name of an expert's file, sound or damaged."""
        return stored_exists(expert_path(self.folder, key))

    def find(self, key: ExpertKey) -> StoredExpert | None:
        """Return the place of an expert, if it is stored.

        The first time, its header is read and checked, and a damaged file is discarded. From then on it is remembered,
        so it may be gone; see the class. An expert that is not there costs one failing system call each time, so what
        other processes write is found.
        """
        with self._lock:
            known = self._known.get(key)
            if known is None and key in self._unusable:
                return None
        known = known or self._look(key)
        if known is not None and self._limit is not None:
            self._limit.use(key)
        return known

    def _look(self, key: ExpertKey) -> StoredExpert | None:
        path = expert_path(self.folder, key)
        try:
            # Touched for the size limit: it was used now.
            found = self._format.inspect(path, key, touch=not self._read_only)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DamagedFileError as error:
            self.discard(key, str(error))
            return None
        except OSError as error:
            if not self._warned_unreadable:
                self._warned_unreadable = True
                source = "fetched from the Hub" if self._from_hub else "taken from the checkpoint"
                self._warn(f"cannot read {path}: {error.strerror}; such experts are {source}")
            return None
        with self._lock:
            return self._known.setdefault(key, found)

    def write(self, key: ExpertKey, *data: memoryview | bytes | bytearray) -> bool:
        """Store an expert, or replace it, and return whether that worked; blocks until it is safely on disk.

        Its data may be given in pieces. Trouble with the disk ends all further writing, with one warning.

        Raises:
            ValueError: The data has another length than the store's layout.
            StorageError: There is trouble with the disk, and the store was opened with `must_write`.
        """
        views = [memoryview(piece).cast("B") for piece in data]
        length = sum(map(len, views))
        if length != self.layout.nbytes:
            raise ValueError(f"an expert has {self.layout.nbytes} bytes here, not {length}")
        if not self._writable:
            return False
        checksum = _checksum(views)
        header = self._format.header(key, checksum)
        path = expert_path(self.folder, key)
        if self._limit is not None and not self._limit.reserve(key, self.file_bytes):
            self.stop_writing(f"an expert takes {format_bytes(self.file_bytes)}, and the limit leaves no room")
            return False
        written = False
        try:
            self._make_folder(path.parent.name)
            write_atomically(self.folder, path, [header, *views])
            written = True
        except FileNotFoundError:
            return False  # The folder was cleared meanwhile. It is made again for the next expert.
        except OSError as error:
            self.stop_writing(error.strerror or str(error))
            return False
        finally:
            if self._limit is not None:
                self._limit.settle(key, self.file_bytes, written)
        with self._lock:
            self._known[key] = StoredExpert(path, len(header), length, checksum)
            self._unusable.discard(key)
        return True

    def _make_folder(self, block: str) -> None:
        with contextlib.suppress(FileNotFoundError), opened(self.folder, block):
            return
        with opened(self.folder, block, make=True):
            pass
        # The first expert of a layer is rare enough to look whether the user has cleared the folder meanwhile.
        if not has_manifest(self.folder):
            self.manifest.write(self.folder)

    def verify(self, key: ExpertKey, buffer: memoryview | bytes | bytearray) -> bool:
        """Whether an expert's data has the checksum that its file states; if not, the caller discards the expert."""
        checksum = xxh3_64_intdigest(memoryview(buffer).cast("B"))
        known = self.find(key)
        if known is not None and known.checksum != checksum:
            # Another process may have replaced the file after its header was read here.
            self._forget(key)
            known = self.find(key)
        return known is not None and known.checksum == checksum

    def discard(self, key: ExpertKey, reason: str = "its bytes do not match its checksum") -> None:
        """Delete an expert's file that is damaged, and warn; one that is gone is forgotten without a word.

        Whoever has the file open closes it: a new file of that name will be another one.
        """
        path = expert_path(self.folder, key)
        self._forget(key)
        with self._lock:
            if key in self._unusable:
                return  # The warning was given then.
        try:
            if not self._read_only:
                remove_stored(path)
            elif self.has_file(key):
                raise PermissionError
            else:
                return
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError:
            with self._lock:
                self._unusable.add(key)
        again = "fetched from the Hub again" if self._from_hub else "taken from the checkpoint again"
        self._warn(f"{path} is damaged: {reason}; the expert is {again}")

    def stop_writing(self, reason: str) -> None:
        """Write no more from now on, and warn unless that was so already."""
        with self._lock:
            was, self._writable = self._writable, False
        if self._must_write:
            hint = "make room, or name another folder with --offload-folder"
            raise StorageError(f"{self.folder} cannot be written: {reason}", hint)
        if was:
            again = ", so they will be fetched from the Hub again" if self._from_hub else ""
            self._warn(f"{self.folder} cannot be written: {reason}; no more experts are stored there{again}")

    def _forget(self, key: ExpertKey) -> None:
        with self._lock:
            self._known.pop(key, None)


def open_checkpoint_store(
    offload: str | Path,
    checkpoint: SwitchCheckpoint,
    dtype: str,
    *,
    limit_bytes: int | None = None,
    read_only: bool = False,
    must_write: bool = False,
    warn: Warn | None = None,
) -> ExpertStore:
    """Open the store of a checkpoint's experts in a packed dtype; arguments and errors are those of `ExpertStore`.

    Everybody who reads or writes stored experts opens them here, so that they find one another's.
    """
    layout = layout_of(dtype, checkpoint.config["d_model"], checkpoint.config["d_ff"])
    return ExpertStore(
        offload,
        Manifest(model_name(checkpoint), checkpoint.fingerprint, dtype, layout),
        limit_bytes=limit_bytes,
        read_only=read_only,
        must_write=must_write,
        from_hub=checkpoint.hub is not None,
        warn=warn,
    )


def form_of(slices: ExpertSlices) -> ExpertForm:
    """Return in what form an expert is stored: dtype, shape and order of each of its tensors."""
    return tuple((tensor.dtype, tensor.shape, tensor.transposed) for tensor in slices.ranges)


def open_kept_stores(
    offload: str | Path,
    checkpoint: SwitchCheckpoint,
    *,
    limit_bytes: int | None = None,
    read_only: bool = False,
    warn: Warn | None = None,
) -> dict[ExpertForm, ExpertStore]:
    """Open the stores of experts kept as they are stored, one for each form; errors are those of `ExpertStore`.

    They are called `bf16` and so on by their dtype; where several forms have one, `bf16n2`.
    """
    stores: dict[ExpertForm, ExpertStore] = {}
    names: Counter[str] = Counter()
    for expert, _ in checkpoint.expert_forms:
        name = STORED_NAMES[expert.wi.dtype]
        names[name] += 1
        stores[form_of(expert)] = ExpertStore(
            offload,
            Manifest(
                model_name(checkpoint),
                checkpoint.fingerprint,
                name if names[name] == 1 else f"{name}n{names[name]}",
                _kept_layout(expert),
            ),
            limit_bytes=limit_bytes,
            read_only=read_only,
            from_hub=True,
            warn=warn,
        )
    return stores


def _kept_layout(expert: ExpertSlices) -> Layout:
    if expert.wi.dtype == QMOE:
        # Experts differ in size: all have room for the largest, with each part where a multiple of ALIGNMENT is.
        return Layout.of([("expert", "U8", (sum(part.nbytes + ALIGNMENT for part in expert.ranges),))])
    return Layout.of(
        (f"{name}.weight", tensor.dtype, tensor.shape[::-1] if tensor.transposed else tensor.shape)
        for name, tensor in zip(expert._fields, expert, strict=True)
    )


def _checksum(views: Sequence[memoryview]) -> int:
    checksum = xxh3_64()
    for view in views:
        checksum.update(view)
    return checksum.intdigest()
