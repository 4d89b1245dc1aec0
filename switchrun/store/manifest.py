"""What a store's folder belongs to: `manifest.json`, and the refusal of a folder that belongs to something else."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from switchrun.errors import CorruptCheckpointError, printable
from switchrun.machine.files import read_regular
from switchrun.machine.folders import MANIFEST
from switchrun.store.files import write_atomically
from switchrun.store.layout import Layout
from switchrun.store.paths import opened

#: Counts up whenever files written before can no longer be used.
FORMAT_VERSION = 3
_MOST_VERSIONS = 1_000_000
_TEXTS = ("model", "fingerprint", "dtype")
#: A model's name may be the longest path there is; the layout of its dense weights takes about 100 bytes for each.
_MOST_BYTES = 4 * 1024**2


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that must agree before a stored expert may be used.

    Attributes:
        model: What names the model: its Hub id and commit, its folder (absolute, since any other means another model
            elsewhere), or `demo`.
        fingerprint: Changes when the checkpoint does.
        dtype: The packed dtype that the experts are stored in, such as `int8`.
    """

    model: str
    fingerprint: str
    dtype: str
    layout: Layout
    version: int = FORMAT_VERSION

    @property
    def identity(self) -> str:
        """One hash of everything; each expert's file carries it."""
        return hashlib.sha256(self._text()).hexdigest()[:32]

    def _text(self) -> bytes:
        record = {
            "version": self.version,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "layout": self.layout.to_json(),
        }
        return json.dumps(record, indent=1).encode() + b"\n"

    def write(self, folder: Path) -> None:
        """Write it into a store's folder, which is made if it is not there; OSError if that is not possible."""
        with opened(folder, make=True):
            pass
        write_atomically(folder, folder / MANIFEST, [self._text()])


def has_manifest(folder: Path) -> bool:
    """Whether a store's folder has a manifest, good or bad."""
    try:
        with opened(folder) as handle:
            os.stat(MANIFEST, dir_fd=handle, follow_symlinks=False)
    except OSError:
        return False
    return True


def read_manifest(folder: Path) -> Manifest | None:
    """Read a store's manifest; None if there is none.

    Raises:
        ValueError: It is damaged; the text says how. One of another format version has its version and nothing else.
        OSError: It cannot be read.
    """
    try:
        with opened(folder) as handle:
            text = read_regular(MANIFEST, _MOST_BYTES, os.O_NOFOLLOW, dir_fd=handle)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        record = json.loads(text)
        version = record["version"]
        if type(version) is not int or not 0 <= version < _MOST_VERSIONS:
            raise ValueError("its version is none")
        if version != FORMAT_VERSION:
            # What the other fields mean is known to that version only.
            model, fingerprint, dtype = (str(record.get(name, "")) for name in _TEXTS)
            return Manifest(model, fingerprint, dtype, Layout(()), version)
        model, fingerprint, dtype = (record[name] for name in _TEXTS)
        if any(type(text) is not str for text in (model, fingerprint, dtype)):
            raise ValueError("a field has the wrong type")
        return Manifest(model, fingerprint, dtype, Layout.from_json(record["layout"]))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def check_manifest(folder: Path, wanted: Manifest, hint: str) -> Manifest | None:
    """Return a store's manifest, None without one; CorruptCheckpointError if it is damaged, or something else's."""
    try:
        found = read_manifest(folder)
    except (ValueError, OSError) as error:
        # A folder that may not be looked into is as good as none; one that may, could be somebody else's.
        if isinstance(error, PermissionError) and not os.access(folder, os.X_OK):
            return None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CorruptCheckpointError(f"{folder}: its {MANIFEST} cannot be used: {reason}", hint) from error
    if found is None:
        return None
    if found.version != wanted.version:
        raise CorruptCheckpointError(
            f"{folder}: it was written in format {found.version}, this switchrun has format {wanted.version}", hint
        )
    if found.model != wanted.model:
        raise CorruptCheckpointError(f"{folder}: it belongs to another model, {printable(found.model, 200)}", hint)
    if found.fingerprint != wanted.fingerprint:
        raise CorruptCheckpointError(f"{folder}: the checkpoint has changed since these experts were made of it", hint)
    if found.dtype != wanted.dtype or found.layout != wanted.layout:
        raise CorruptCheckpointError(f"{folder}: its experts have another dtype or another layout", hint)
    return found
