"""`--synthetic`: checkpoints of real geometries without their weights, to try a machine before a download.

They are sparse files of full size. Dense weights are real random bytes. Experts are holes, which read as zeros and cost
no disk time, unless they are materialised: then they are random bytes too, and reading them is real. In QMoE's format a
hole is no matrix, so some experts are always real there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from switchrun.bench import synthetic_qmoe
from switchrun.bench.raw_disk import drop_page_cache
from switchrun.bench.records import SPARSE
from switchrun.bench.torch_zip import StoredTensor
from switchrun.checkpoint.names import DECODER_HEAD, HEAD, STACKS, dense_tensors, mlp_prefix
from switchrun.errors import BudgetError, StorageError, UsageError
from switchrun.machine.files import read_regular
from switchrun.machine.folders import open_below
from switchrun.units import format_bytes, parse_bytes

Shapes = dict[str, tuple[int, ...]]
#: Called with the bytes that are written so far, and in all.
OnBytes = Callable[[int, int], None]

#: As large as the Hub's shards of switch-c-2048.
SHARD_BYTES = 9_990_000_000

_FOLDER = "synthetic"
#: Lies beside a checkpoint that is complete.
_MARK = "synthetic.json"
_MOST_MARK_BYTES = 64 * 1024
#: Changes when what was made before would not do any more.
_VERSION = 1
_SPEC = re.compile(r"(?:switch-)?([\w-]+?)(-qmoe)?(?::experts=(\d+))?")
_HINT = "write it like switch-c-2048, base-128, switch-c-2048:experts=16 or switch-c-2048-qmoe"
#: Real experts of each layer in QMoE's format, unless --materialize says how many.
_QMOE_EXPERTS = 64


@dataclass(frozen=True, slots=True)
class Geometry:
    """The measures of a Switch checkpoint; every MLP is sparse if `sparse_step` is 1."""

    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_layers: int
    num_experts: int
    sparse_step: int = 1
    tied: bool = False
    vocab_size: int = 32128
    expert_capacity: int = 64
    #: Write the key names and the mistakes of config.json that google/switch-c-2048 has on the Hub.
    hub_faults: bool = False
    #: Experts in QMoE's format, in place of bf16.
    qmoe: bool = False

    def sparse(self, block: int) -> bool:
        """Whether a block has experts, by transformers' rule."""
        return self.sparse_step == 1 or block % self.sparse_step == 1

    @property
    def sparse_blocks(self) -> list[int]:
        """Those of a stack; both have the same."""
        return [block for block in range(self.num_layers) if self.sparse(block)]

    @property
    def sparse_layers(self) -> int:
        """Sparse layers of both stacks."""
        return 2 * len(self.sparse_blocks)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        if self.qmoe:
            return synthetic_qmoe.expert_bytes(self.d_model, self.d_ff)
        return 2 * 2 * self.d_model * self.d_ff

    def config(self) -> dict[str, Any]:
        """Return config.json; what it leaves out is as transformers has it."""
        sparse_layers = self.num_layers // self.sparse_step
        config: dict[str, Any] = {
            "d_ff": self.d_ff,
            "d_kv": self.d_kv,
            "d_model": self.d_model,
            "decoder_start_token_id": 0,
            "expert_capacity": self.expert_capacity,
            "model_type": "switch_transformers",
            "num_decoder_layers": self.num_layers,
            "num_experts": self.num_experts,
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "num_sparse_decoder_layers": sparse_layers,
            "num_sparse_encoder_layers": sparse_layers,
            "relative_attention_num_buckets": 32,
            "router_bias": False,
            "vocab_size": self.vocab_size,
        }
        if self.hub_faults:
            # https://huggingface.co/google/switch-c-2048: 12 is wrong, and tie_word_embeddings is absent.
            return config | {"num_decoder_layers": 12, "is_full_sparse": True}
        return config | {
            "tie_word_embeddings": self.tied,
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "dtype": "bfloat16",
        }


#: The checkpoints that Google published (the Hub's own config files).
GEOMETRIES: Mapping[str, Geometry] = {
    "switch-c-2048": Geometry(2080, 6144, 64, 30, 15, 2048, hub_faults=True),
    "switch-large-128": Geometry(1024, 4096, 64, 16, 24, 128, sparse_step=2, tied=True),
    **{
        f"switch-base-{count}": Geometry(768, 3072, 64, 12, 12, count, sparse_step=2, tied=True)
        for count in (8, 16, 32, 64, 128, 256)
    },
}


class Synthetic(NamedTuple):
    """A synthetic checkpoint's folder, and what stands in every record of it."""

    path: Path
    description: dict[str, Any]


class Container(NamedTuple):
    """How a checkpoint's files are called, and what writes one with holes and returns the offsets of its tensors."""

    stem: str
    suffix: str
    write: Callable[[Path, Shapes], dict[str, int]]


def make_synthetic(
    spec: str,
    materialize: str | None,
    offload_folder: Path,
    tell: Callable[[str], None],
    on_bytes: OnBytes = lambda _done, _total: None,
) -> Synthetic:
    """Make what `--synthetic` and `--materialize` ask for in the offload folder, or find what was made before.

    Key names and config.json are transformers' own, so that plain transformers can load it too. `on_bytes` is called
    with the bytes that are written so far, and in all.

    Raises:
        UsageError: There is no such geometry, less is to be real than two experts of each layer, or this installation
            cannot make QMoE's format.
        BudgetError: The disk has no room for it.
        StorageError: The offload folder cannot be written.
    """
    name, geometry = parse_geometry(spec)
    if materialize is not None:
        real = _real_experts(materialize, geometry)
    else:
        real = min(_QMOE_EXPERTS, geometry.num_experts) if geometry.qmoe else 0
    description = {
        "geometry": name,
        "num_experts": geometry.num_experts,
        "materialized_experts": real,
        "note": _note(real, geometry.num_experts),
    }
    made = f"{name}-{geometry.num_experts}-{real}"
    folder = offload_folder / _FOLDER / made
    mark = {"version": _VERSION, "geometry": asdict(geometry), "materialized_experts": real}
    with (
        contextlib.suppress(OSError, ValueError, RecursionError),
        open_below(offload_folder, _FOLDER, made) as handle,
    ):
        if json.loads(read_regular(_MARK, _MOST_MARK_BYTES, os.O_NOFOLLOW, dir_fd=handle)) == mark:
            return Synthetic(folder, description)
    needed = real_bytes(geometry, real)
    if geometry.qmoe:
        synthetic_qmoe.check_kernels()
    try:
        offload_folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(offload_folder).free
        if needed > free:
            wanted = f"the synthetic checkpoint takes {format_bytes(needed)}"
            raise BudgetError(
                f"{offload_folder} has {format_bytes(free)} free, {wanted}",
                "lower --materialize or use another --offload-folder",
            )
        tell(f"making {folder}: {format_bytes(needed)} of random weights")
        with open_below(offload_folder, _FOLDER, make=True) as handle, contextlib.suppress(FileNotFoundError):
            shutil.rmtree(made, dir_fd=handle)
        with open_below(offload_folder, _FOLDER, made, make=True) as handle:
            # By this name it is the folder that is open, whatever is put in its place.
            inside = Path(f"/proc/self/fd/{handle}")
            make_checkpoint(inside, geometry, real_experts=real, on_bytes=on_bytes)
            drop_page_cache(inside.iterdir())
            (inside / _MARK).write_text(json.dumps(mark), encoding="utf-8")
    except OSError as error:
        hint = "use another --offload-folder"
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}", hint) from error
    return Synthetic(folder, description)


def parse_geometry(spec: str) -> tuple[str, Geometry]:
    """Return the full name, and the geometry, that `--synthetic` asks for; a `UsageError` if there is none."""
    match = _SPEC.fullmatch(spec.strip())
    name = f"switch-{match[1]}" if match else ""
    if match is None or name not in GEOMETRIES:
        raise UsageError(f"--synthetic: '{spec}' is not a geometry", f"{_HINT}; there are: {', '.join(GEOMETRIES)}")
    geometry = replace(GEOMETRIES[name], hub_faults=False)
    if match[2]:
        name += match[2]
        geometry = replace(geometry, qmoe=True, expert_capacity=1024)  # as published
    count = int(match[3] or geometry.num_experts)
    if not 2 <= count <= geometry.num_experts:
        raise UsageError(f"--synthetic: {name} has 2 to {geometry.num_experts} experts a layer, not {count}", _HINT)
    return name, replace(geometry, num_experts=count)


def real_bytes(geometry: Geometry, real_experts: int) -> int:
    """Return the bytes on disk of a checkpoint with so many real experts in each layer."""
    dense = sum(2 * math.prod(shape) for shape in _dense_shapes(geometry).values())
    holes = (geometry.num_experts - real_experts) * synthetic_qmoe.HOLE_BYTES if geometry.qmoe else 0
    return dense + geometry.sparse_layers * (real_experts * geometry.expert_bytes + holes)


def _real_experts(size: str, geometry: Geometry) -> int:
    """Return how many experts of each layer a size has room for."""
    try:
        wanted = parse_bytes(size)
    except UsageError as error:
        raise UsageError(f"--materialize: {error.message}", error.hint) from None
    layers = geometry.sparse_layers
    count = min(wanted // (layers * geometry.expert_bytes), geometry.num_experts)
    if count < 2:
        least = 2 * layers * geometry.expert_bytes
        raise UsageError(
            f"--materialize: {format_bytes(wanted)} is less than two experts in each of {layers} layers",
            f"give at least {-(-least // 2**20)}MiB",
        )
    return count


def _note(real: int, count: int) -> str:
    if not real:
        what = f"the weights are synthetic, and the experts lie in {SPARSE}, whose holes take no time to read"
        return f"{what}: add --materialize SIZE to measure reading"
    part = "all experts" if real == count else f"{real} of {count} experts"
    return f"the weights are synthetic: random numbers in {part} of each layer, and what comes out means nothing"


def make_checkpoint(
    folder: Path,
    geometry: Geometry,
    real_experts: int = 0,
    container: Container | None = None,
    on_bytes: OnBytes = lambda _done, _total: None,
) -> int:
    """Write a synthetic checkpoint, safetensors without a container, and return the number of its tensors.

    So many first experts of every layer get real bytes, and routers choose among those alone; with 0, among all. QMoE's
    format knows its own container.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(geometry.config(), indent=2))
    filler = _Filler(geometry, real_experts)
    if geometry.qmoe:
        dense = {name: filler.stored(name, shape) for name, shape in _dense_shapes(geometry).items()}
        g = geometry
        measures = synthetic_qmoe.Measures(g.d_model, g.d_ff, g.sparse_blocks, g.num_experts, real_experts)
        total = real_bytes(geometry, real_experts)
        return synthetic_qmoe.write_qmoe(
            folder, measures, dense, lambda layer, layers: on_bytes(total * layer // layers, total)
        )
    stem, suffix, write = container or Container("model", ".safetensors", _write_safetensors)
    shards = list(_split(geometry))
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        path = folder / f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}"
        offsets = write(path, shapes)
        weight_map |= dict.fromkeys(shapes, path.name)
        filler.fill(path, shapes, offsets, on_bytes)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return len(weight_map)


def _dense_shapes(geometry: Geometry) -> Shapes:
    config = replace(geometry, hub_faults=False).config()
    shapes = dict(dense_tensors(config, dict.fromkeys(STACKS, geometry.sparse_blocks), geometry.tied))
    if geometry.hub_faults and not geometry.tied:
        shapes[DECODER_HEAD] = shapes.pop(HEAD)
    return shapes


def _split(g: Geometry) -> Iterator[Shapes]:
    """Divide tensors into shards as the Hub does: dense weights, then all `wi` of a layer, then its `wo`."""
    yield _dense_shapes(g)
    each = max(1, SHARD_BYTES // (g.expert_bytes // 2))
    for stack, block in itertools.product(STACKS, g.sparse_blocks):
        prefix = f"{mlp_prefix(stack, block)}.experts"
        for matrix, shape in (("wi", (g.d_ff, g.d_model)), ("wo", (g.d_model, g.d_ff))):
            for start in range(0, g.num_experts, each):
                experts = range(start, min(start + each, g.num_experts))
                yield {f"{prefix}.expert_{expert}.{matrix}.weight": shape for expert in experts}


def _write_safetensors(path: Path, shapes: Shapes) -> dict[str, int]:
    header: dict[str, dict[str, Any]] = {}
    cursor = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [cursor, cursor + nbytes]}
        cursor += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + cursor)
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}


class _Filler:
    """Writes random numbers of a size that keeps the forward pass finite.

    One block of random numbers serves all tensors, from a different place for each: drawing billions of them would
    take longer than writing.
    """

    _POOL = 1 << 24

    def __init__(self, geometry: Geometry, real_experts: int) -> None:
        # Torch takes seconds to import: not where a checkpoint that was made before is found.
        import torch

        self._torch = torch
        self._normal = torch.randn(self._POOL, generator=torch.Generator().manual_seed(0))
        self._pools: dict[float, bytes] = {}
        self._geometry = geometry
        self._real = real_experts
        self._turn = self._written = 0

    def fill(self, path: Path, shapes: Shapes, offsets: Mapping[str, int], on_bytes: OnBytes) -> None:
        total = real_bytes(self._geometry, self._real)
        with open(path, "r+b") as file:
            for name, shape in shapes.items():
                if ".experts." in name and int(name.split(".")[-3].removeprefix("expert_")) >= self._real:
                    continue
                file.seek(offsets[name])
                file.writelines(self._pieces(name, shape))
                self._written += 2 * math.prod(shape)
                on_bytes(self._written, total)

    def stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor("BF16", shape, lambda: self._pieces(name, shape))

    def _pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[bytes | memoryview]:
        """Yield a tensor's bytes."""
        nbytes = 2 * math.prod(shape)
        if "layer_norm" in name:
            yield self._bytes(self._torch.ones(nbytes // 2))
        elif ".router." in name and self._real:
            yield self._restricted(b"".join(self._random(name, nbytes)), nbytes // shape[0])
        else:
            yield from self._random(name, nbytes)

    def _restricted(self, router: bytes, row_bytes: int) -> bytes:
        """Keep a router from ever choosing an expert that is a hole.

        Their rows are 0, and the last row before them is the first one's negative: one of the two gives a logit
        above 0, whatever comes in.
        """
        torch = self._torch
        first = torch.frombuffer(bytearray(router[:row_bytes]), dtype=torch.bfloat16)
        kept = router[: (self._real - 1) * row_bytes] + self._bytes(-first)
        return kept + bytes(len(router) - len(kept))

    def _random(self, name: str, nbytes: int) -> Iterator[memoryview]:
        scale = 1.0 if "shared" in name else self._geometry.d_model**-0.5
        if scale not in self._pools:
            self._pools[scale] = self._bytes(self._normal * scale)
        pool = memoryview(self._pools[scale])
        self._turn = (self._turn + 7_919) % (self._POOL // 2)
        start = 2 * self._turn
        while nbytes:
            piece = pool[start : start + min(nbytes, len(pool) - start)]
            yield piece
            nbytes -= len(piece)
            start = 0

    def _bytes(self, values: Any) -> bytes:
        """Return a tensor's values in bf16."""
        raw: bytes = values.to(self._torch.bfloat16).view(self._torch.uint8).numpy().tobytes()
        return raw
