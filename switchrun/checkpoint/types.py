"""What a checkpoint is, as plain values: tensors as byte ranges, experts by key, and the repaired configuration."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from switchrun.errors import CorruptCheckpointError

Stack = Literal["encoder", "decoder"]

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
#: A longer local header of a zip is not read together with the tensor: `TensorSlice.header_bytes`.
MOST_HEADER_BYTES = 4096


class HubWay(StrEnum):
    """How a model of the Hub is opened.

    `AUTO` takes a complete local snapshot, else downloads what is under 1 GB in all, else reads ranges. `RANGES` never
    downloads weights whole, `DOWNLOAD` all of them first.
    """

    AUTO = "auto"
    RANGES = "ranges"
    DOWNLOAD = "download"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a model on the Hub, as it was when its repository was listed.

    Attributes:
        repo: The Hub id.
        commit: The full hash of a commit, whatever revision was asked for.
        name: The path inside the repository.
        hash: SHA-256 of the content of a large file, git's blob id of a small one.
    """

    repo: str
    commit: str
    name: str
    size: int
    hash: str

    def __str__(self) -> str:
        return f"{self.repo}/{self.name}"


@dataclass(frozen=True, slots=True)
class RemoteRepo:
    """What a repository holds at one commit."""

    id: str
    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Where one tensor lies: a dense byte range of one file.

    Attributes:
        file: An absolute path, or a file of the Hub.
        dtype: The stored dtype, as safetensors names it (`BF16`).
        shape: For a linear layer's weight `[out, in]`.
        transposed: A matrix whose bytes are in column-major order: the range holds `[in, out]`. Torch files keep
            strides, and conversions from JAX leave such matrices behind.
        parts: What else belongs to a matrix in few bits: the scales of one in int8 (`SCB`, float32 `[out]`); of one in
            `QMOE`, whose own range are its codes and whose shape is that of what they stand for, where each row's codes
            begin (`row_off`, int32 `[out + 1]`) and each row's minimum and maximum (`ter_minmax`, bfloat16 `[2 out]`).
        header_bytes: So many bytes before the range must be the local header of a zip's entry, by which `offset` is
            right; whoever reads the range looks at them. 0 where there is none to look at.
        crc: CRC-32 of the range as a zip's directory states it; None if nothing does.
        xxh3: XXH3 (64 bit) of the range as the offload folder's own file of dense weights states it; else None.
    """

    file: Path | RemoteFile
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False
    parts: tuple[TensorSlice, ...] = ()
    header_bytes: int = 0
    crc: int | None = None
    xxh3: int | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor and of its parts."""
        return self.nbytes + sum(part.nbytes for part in self.parts)


class ExpertKey(NamedTuple):
    """Names one expert: FFN number `expert` of block `block` of the encoder or the decoder."""

    stack: Stack
    block: int
    expert: int


class ExpertSlices(NamedTuple):
    """The two matrices of one expert: `wi` is `[d_ff, d_model]`, `wo` is `[d_model, d_ff]`."""

    wi: TensorSlice
    wo: TensorSlice

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices as stored, with their parts."""
        return self.wi.stored_bytes + self.wo.stored_bytes

    @property
    def ranges(self) -> tuple[TensorSlice, ...]:
        """All that must be read: both matrices, then the parts of each."""
        return (self.wi, self.wo, *self.wi.parts, *self.wo.parts)


@dataclass(frozen=True, slots=True)
class SwitchCheckpoint:
    """A Switch Transformers checkpoint, read from headers alone.

    Attributes:
        id: What the user called it: the Hub id, the folder, or `demo`.
        revision: The Hub's commit, if it came from there.
        path: The folder that holds it; of a model that is read from the Hub, its configuration and tokenizer.
        config: `config.json`, repaired: plain transformers builds the right model of it.
        repairs: What was wrong in the checkpoint's configuration or names, one sentence each.
        dense: Every tensor that is not an expert's, by its canonical name in transformers. `lm_head.weight` is
            there only when it is not `shared.weight` itself, and so are the two `embed_tokens`.
        sparse_blocks: For each stack, the numbers of the blocks that have experts.
        fingerprint: Changes when any file of the checkpoint does; see `Index.fingerprint`.
        stored_dtype: What the experts are stored in, `F32` if in several; `I8` if any linear layer is; `QMOE`.
        plain_dtype: What `--dtype auto` computes in: the `dtype` of config.json, else one that loses no stored bit.
        expert_forms: An expert of each form in which experts are stored (dtypes may differ), and how many have that
            form; never empty. Of experts that QMoE compressed, all are of one form, whose expert is the largest.
        experts_total_bytes: Bytes of all experts as stored, if those of one form differ; else None.
        generation: The checkpoint's own generation settings and options; see `switchrun.checkpoint.generation`.
        hub: What the repository holds, if weights are read from the Hub by byte range; None if they are in local files.
    """

    id: str
    revision: str | None
    path: Path
    config: Mapping[str, Any]
    repairs: tuple[str, ...]
    dense: Mapping[str, TensorSlice]
    experts: Mapping[ExpertKey, ExpertSlices]
    sparse_blocks: Mapping[Stack, tuple[int, ...]]
    fingerprint: str
    stored_dtype: str
    plain_dtype: str
    expert_forms: tuple[tuple[ExpertSlices, int], ...]
    experts_total_bytes: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    hub: RemoteRepo | None = None

    @property
    def num_experts(self) -> int:
        """Experts in every sparse layer."""
        return int(self.config["num_experts"])

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as stored; of the largest, if they differ."""
        return max(form.nbytes for form, _ in self.expert_forms)

    @property
    def mean_expert_bytes(self) -> float:
        """Bytes of one expert as stored, on average."""
        return self._experts_bytes / len(self.experts)

    @property
    def _experts_bytes(self) -> int:
        total = self.experts_total_bytes
        return sum(form.nbytes * count for form, count in self.expert_forms) if total is None else total

    @property
    def reads_int8_in_place(self) -> bool:
        """Whether experts are stored in int8 on this machine: those are never kept in the offload folder."""
        return self.hub is None and any(matrix.dtype == "I8" for form, _ in self.expert_forms for matrix in form)

    @property
    def experts_file(self) -> Path | None:
        """A file with experts, of whose disk something is to be known; None if they are on the Hub."""
        file = self.expert_forms[0][0].wi.file
        return file if isinstance(file, Path) else None

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights as stored."""
        return self._experts_bytes + sum(tensor.stored_bytes for tensor in self.dense.values())


class FileStamp(NamedTuple):
    """One file as it was when it was read.

    Attributes:
        name: Relative to the checkpoint's folder, or to the repository.
        state: The hash of the content of a file of the Hub; of any other file, when it last changed, in nanoseconds.
    """

    name: str
    size: int
    state: int | str

    @classmethod
    def of(cls, folder: Path, path: Path) -> FileStamp:
        """Stamp one local file, or raise OSError if it is not there any more."""
        status = path.stat()
        # The Hub's local cache names files by what they hold, and a snapshot is a folder of links to them.
        blob = path.readlink() if path.is_symlink() else Path()
        hashed = blob.parent.name == "blobs" and _HASH.fullmatch(blob.name)
        state = blob.name if hashed else status.st_mtime_ns
        return cls(path.relative_to(folder).as_posix(), status.st_size, state)


class Kind(NamedTuple):
    """What many tensors have in common; a checkpoint with 120,000 tensors has a dozen of these."""

    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlaces:
    """Where the tensors of a QMoE checkpoint's experts lie, in columns; `switchrun.checkpoint.qmoe` knows the order.

    A place in the columns is a tensor; header and checksum are those of `TensorSlice`, 0 if there is none.
    """

    offset: array[int]
    nbytes: array[int]
    header_bytes: array[int]
    crc: array[int]


@dataclass(frozen=True, slots=True, eq=False)
class Index(Mapping[str, TensorSlice]):
    """All tensors of a checkpoint by the names they have in its files; a slice is made when it is asked for.

    Attributes:
        entry: The file from which the others are found: an index JSON, or the only weights file.
        files: The weights files; paths are absolute.
        kinds: The distinct kinds.
        rows: The place of every tensor: the number of its file, its first byte there, the number of its kind, the bytes
            of its local header, and its CRC-32; the last two are 0 if there is none.
        stamps: Of all files that count: index and weights, and the configuration unless each of those has a hash.
        lost: What the index JSON names and no file holds: the tensor, and the name of the file it should be in.
        places: Of a QMoE checkpoint, whose `rows` are those tensors that are no expert's, where the experts are.
    """

    entry: Path | RemoteFile
    files: tuple[Path | RemoteFile, ...]
    kinds: tuple[Kind, ...]
    rows: Mapping[str, tuple[int, int, int, int, int]]
    stamps: tuple[FileStamp, ...]
    lost: Mapping[str, str]
    places: ExpertPlaces | None = None

    def __getitem__(self, name: str) -> TensorSlice:
        file, offset, kind, header_bytes, crc = self.rows[name]
        return TensorSlice(self.files[file], offset, *self.kinds[kind], header_bytes=header_bytes, crc=crc or None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def missing(self, name: str) -> CorruptCheckpointError:
        """The error to raise for a tensor that the model needs and the checkpoint lacks."""
        hint = "the checkpoint is incomplete; download it again"
        if name in self.lost:
            file = _beside(self.entry, self.lost[name])
            return CorruptCheckpointError(f"{file}: tensor {name} is not in this file, but the index says so", hint)
        return CorruptCheckpointError(f"{self.entry}: tensor {name} is missing", hint)

    def require(self, name: str) -> TensorSlice:
        """Return a tensor that the model needs, or raise CorruptCheckpointError if the checkpoint lacks it."""
        if name not in self.rows:
            raise self.missing(name)
        return self[name]

    def fingerprint(self, content: str) -> str:
        """Return one hash of all stamps, which changes when any file does.

        Where anything else identifies the files' content, that takes the place of their times, which another
        installation of the same files changes.
        """
        lines = "".join(
            f"{name}\0{size}\0{state if type(state) is str else content or state}\n"
            for name, size, state in sorted(self.stamps)
        )
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _beside(file: Path | RemoteFile, name: str) -> Path | RemoteFile:
    if isinstance(file, Path):
        return file.parent / name
    return replace(file, name=str(PurePosixPath(file.name).parent / name))
