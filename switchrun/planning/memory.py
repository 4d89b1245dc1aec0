"""How much memory a model takes at work, from its configuration: the arithmetic behind the promise of a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from switchrun.checkpoint.qmoe import INDEX_BYTES_PER_EXPERT
from switchrun.checkpoint.types import ExpertSlices, SwitchCheckpoint, TensorSlice
from switchrun.dtypes import QMOE, PackedDtype, Precision
from switchrun.planning.plan import DISK, BatchSize, Plan, SparseLayer, Tier, sure_rows
from switchrun.store.layout import Layout, layout_of
from switchrun.units import MIB

#: Interpreter, torch, transformers and tokenizer, resident once a first fill has run, without oneDNN's code. Measured
#: with torch 2.13 (CPU), transformers 5.24, Python 3.11, a tokenizer as large as T5's: 399 MiB by the Python API, 325
#: by the command line. `Session.open` measures it again and takes the larger.
RUNTIME_BYTES = 440 * MIB
#: What Python with the command line or another small program takes, before torch is imported.
PYTHON_BYTES = 64 * MIB
#: The part of `RUNTIME_BYTES` that only the first fill takes: kernels and thread stacks; 16 to 29 MiB measured. The
#: trial of the model's settings comes before: with beams, sessions had up to 403 MiB once they were open.
FIRST_RUN_BYTES = 32 * MIB
#: In bfloat16 oneDNN makes code for each shape of a product, and keeps that of so many shapes, as does torch's way to
#: it. With AMX that is up to 0.75 MiB each: with their own 1,024 shapes, 300 tokens took 380 MiB that stayed.
KEPT_KERNELS = 128
KEPT_KERNELS_BYTES = 100 * MIB
#: Of what a batch frees, malloc keeps some: pieces between others, and up to 64 MiB at the end. Measured were up to
#: 19 % of what the batch takes, 130 MiB, by the Python API, where malloc keeps pieces of up to 32 MiB.
MALLOC_SHARE = 0.25
MALLOC_BYTES = 128 * MIB
#: What one tensor's row in the parsed index takes in memory.
INDEX_BYTES_PER_TENSOR = 900
#: Experts being converted to another dtype at a time; each needs a buffer of its stored size.
STAGING_BUFFERS = 2
#: What may wait to be written to `offload/`: at least two experts. The next ones are written when they are met again.
WRITER_BYTES = 8 * MIB
#: What packing an expert takes besides, for each that is being converted.
PACKING_SCRATCH_BYTES = 8 * MIB
#: What multiplying with a packed matrix takes: an unpacked block of it.
PRODUCT_SCRATCH_BYTES = 8 * MIB
#: QMoE's dictionary: 3 MiB, and while it is made 11 more.
DICTIONARY_BYTES = 16 * MIB
#: From this size on an expert is read past the page cache; below, the alignment would cost more than it saves.
DIRECT_IO_BYTES = 4 * MIB
#: Slots that are set aside before dense weights get memory: some are computed on while others are being read.
RESERVED_SLOTS = 4
#: The same on a GPU: one is computed on while the next is being copied.
GPU_RESERVED_SLOTS = 2
#: What torch's matrix libraries keep on a GPU: cuBLAS and cuBLASLt each have a workspace, for which NVIDIA's manual
#: recommends 32 MiB from Hopper on, and less before. Not measured.
GPU_LIBRARY_BYTES = 64 * MIB
#: How torch takes memory from CUDA: tensors up to a size share blocks of another; larger ones have one each, in steps.
_GPU_BLOCKS = ((MIB, 2 * MIB), (10 * MIB - 1, 20 * MIB))
_GPU_STEP = 2 * MIB
#: Matrices begin at multiples of this in a GPU's slot: kernels want it.
GPU_ALIGNMENT = 256

#: Memory is never reserved for longer inputs than this, unless for several in a batch.
MOST_RESERVED_TOKENS = 2048
#: With a batch size of `auto`, memory is reserved for at most so many rows of so many tokens in, and as many out.
MOST_ROWS = 256
ROW_TOKENS = 64
#: What a token takes in the lists that say which expert is to compute it.
_POSITION_BYTES = 400
#: The scores of so many tokens of a target are in memory at a time: a few vocabularies' worth.
HEAD_TOKENS = 64
_PAGE = 4096
#: The linear layers outside the experts: attention, and the MLPs of blocks without experts.
_LINEAR = re.compile(r"\.(?:SelfAttention|EncDecAttention)\.[qkvo]\.weight|\.mlp\.w[io]\.weight")


def is_router(name: str) -> bool:
    """Whether a dense tensor belongs to a router: routers compute in float32 whatever the dtype."""
    return ".mlp.router." in name


def is_int8(name: str, tensor: TensorSlice, precision: Precision) -> bool:
    """Whether a dense tensor is kept in int8, whichever packed dtype the experts have; see docs/offloading.md."""
    linear = tensor.dtype == "I8" or _LINEAR.search(name) is not None
    return precision.packed is not None and linear and not is_router(name)


def is_kept_as_stored(name: str, tensor: TensorSlice, precision: Precision) -> bool:
    """Whether a dense tensor is kept in the very bytes that are stored."""
    if tensor.transposed:
        return False
    if is_int8(name, tensor, precision):
        return tensor.dtype == "I8"
    return tensor.dtype == precision.compute.stored and (not is_router(name) or tensor.dtype == "F32")


def dense_bytes(name: str, tensor: TensorSlice, precision: Precision) -> int:
    """Return the bytes that a dense tensor takes in memory: in the dtype that it is computed in, or in int8."""
    count = math.prod(tensor.shape)
    if is_int8(name, tensor, precision):
        return count + 4 * tensor.shape[0]
    return count * (4 if is_router(name) else precision.compute.itemsize)


def module_of(name: str) -> str:
    """Return the module that a dense tensor is placed with: a whole block, a final norm, `shared` or `lm_head`."""
    parts = name.split(".")
    return ".".join(parts[:3] if parts[1] == "block" else parts[:-1])


def packed_layout(checkpoint: SwitchCheckpoint, packed: PackedDtype) -> Layout:
    """Return how a packed expert lies in a slot, and in `offload/`."""
    return layout_of(packed, checkpoint.config["d_model"], checkpoint.config["d_ff"])


def kept_parts(checkpoint: SwitchCheckpoint, precision: Precision) -> list[int]:
    """Return the bytes of each tensor that an expert consists of, as it is kept in memory."""
    if precision.packed is not None:
        return [part.nbytes for part in packed_layout(checkpoint, precision.packed).parts]
    if precision.qmoe:
        # Another expert may have a larger part, though it is smaller as a whole.
        return [part.nbytes + GPU_ALIGNMENT for part in checkpoint.expert_forms[0][0].ranges]
    return [math.prod(tensor.shape) * precision.compute.itemsize for tensor in checkpoint.expert_forms[0][0]]


def slot_bytes(checkpoint: SwitchCheckpoint, precision: Precision) -> int:
    """Return the size of a slot: one expert as it is kept, with room for the alignment of direct reads."""
    in_place = [buffer_for(form) for form in _forms(checkpoint, precision, staged=False)]
    packed = precision.packed
    kept = packed_layout(checkpoint, packed).nbytes if packed else sum(kept_parts(checkpoint, precision))
    # A file in `offload/` has its data at a page's start, so that whole pages hold it.
    return max([_round_up(kept, _PAGE), *in_place])


def gpu_expert_bytes(checkpoint: SwitchCheckpoint, precision: Precision) -> int:
    """Return the size of the tensor that is a slot on a GPU: an expert's tensors one after another."""
    return sum(_round_up(part, GPU_ALIGNMENT) for part in kept_parts(checkpoint, precision))


def gpu_slot_bytes(checkpoint: SwitchCheckpoint, precision: Precision) -> int:
    """Return what a slot takes of a GPU's memory: its tensor, and what torch leaves unused in the block around it."""
    size = gpu_expert_bytes(checkpoint, precision)
    for largest, block in _GPU_BLOCKS:
        if size <= largest:
            return _round_up(-(-block // (block // _round_up(size, 2 * GPU_ALIGNMENT))), 2 * GPU_ALIGNMENT)
    return _round_up(size, _GPU_STEP)


def mean_load_bytes(checkpoint: SwitchCheckpoint, precision: Precision, stored_share: float) -> float:
    """Return what is read for an expert if a share of them lies packed in the offload folder."""
    if precision.packed is None or checkpoint.reads_int8_in_place:
        return checkpoint.mean_expert_bytes
    packed = packed_layout(checkpoint, precision.packed).nbytes
    return stored_share * packed + (1 - stored_share) * checkpoint.mean_expert_bytes


def reads_directly(checkpoint: SwitchCheckpoint) -> bool:
    """Whether experts are read past the page cache."""
    return checkpoint.expert_bytes >= DIRECT_IO_BYTES


def reads_dense_directly(checkpoint: SwitchCheckpoint, device_map: Mapping[str, Tier]) -> bool:
    """Whether dense weights are: not if some stay on disk, where the page cache may help to read them again."""
    return reads_directly(checkpoint) and DISK not in device_map.values()


def buffer_for(stored: ExpertSlices) -> int:
    """Return the size of a buffer that an expert can be read into, whatever its tensors' alignment in their files."""
    return read_buffer_bytes(*(each.nbytes for each in stored.ranges))


def read_buffer_bytes(*sizes: int) -> int:
    """Return the size of a buffer that tensors of some sizes can be read into together."""
    # A page at both ends, and one before: a tensor of a torch file is read with the header of its entry.
    return _round_up(sum(sizes) + 3 * len(sizes) * _PAGE, _PAGE)


def staging_bytes(checkpoint: SwitchCheckpoint, precision: Precision) -> int:
    """Return the bytes of all buffers for conversion; 0 if experts are kept as they are stored."""
    staged = [buffer_for(form) for form in _forms(checkpoint, precision, staged=True)]
    return STAGING_BUFFERS * max(staged, default=0)


def writer_buffers(checkpoint: SwitchCheckpoint, precision: Precision) -> int:
    """Return how many packed experts may wait to be written to `offload/`."""
    return max(2, min(WRITER_BYTES // slot_bytes(checkpoint, precision), 64))


def packing_bytes(checkpoint: SwitchCheckpoint, precision: Precision) -> int:
    """Return what packing experts takes, and multiplying with them.

    That is scratch, and the buffers of those that wait to be written to `offload/`.
    """
    if precision.qmoe:
        return PRODUCT_SCRATCH_BYTES + DICTIONARY_BYTES
    if precision.packed is None:
        return 0
    scratch = STAGING_BUFFERS * PACKING_SCRATCH_BYTES + PRODUCT_SCRATCH_BYTES
    if checkpoint.reads_int8_in_place or checkpoint.hub is not None:
        return scratch
    return writer_buffers(checkpoint, precision) * slot_bytes(checkpoint, precision) + scratch


def _forms(checkpoint: SwitchCheckpoint, precision: Precision, staged: bool) -> list[ExpertSlices]:
    """Return the forms of experts that are converted or packed on their way into a slot, or those that are not."""

    def is_staged(stored: ExpertSlices) -> bool:
        if precision.packed is None:
            return any(matrix.dtype not in (precision.compute.stored, QMOE) for matrix in stored)
        in_place = checkpoint.reads_int8_in_place
        return not in_place or any(matrix.dtype != "I8" or matrix.transposed for matrix in stored)

    return [form for form, _ in checkpoint.expert_forms if is_staged(form) == staged]


def runtime_bytes(precision: Precision) -> int:
    """Return what Python and the libraries take, the first fill included."""
    return RUNTIME_BYTES + _kernel_bytes(precision)


def opened_bytes(checkpoint: SwitchCheckpoint, precision: Precision) -> int:
    """Return the part of that, and of the index, that is there before any weight is."""
    return runtime_bytes(precision) - FIRST_RUN_BYTES - _kernel_bytes(precision) + index_bytes(checkpoint)


def _kernel_bytes(precision: Precision) -> int:
    return KEPT_KERNELS_BYTES if precision.compute.itemsize < 4 else 0


def index_bytes(checkpoint: SwitchCheckpoint) -> int:
    """Return what the parsed index takes. In 8 bit, transformers saves three tensors instead of one."""
    if checkpoint.stored_dtype == QMOE:
        return INDEX_BYTES_PER_TENSOR * len(checkpoint.dense) + INDEX_BYTES_PER_EXPERT * len(checkpoint.experts)
    each = 3 if checkpoint.stored_dtype == "I8" else 1
    return INDEX_BYTES_PER_TENSOR * each * (2 * len(checkpoint.experts) + len(checkpoint.dense))


def overhead_bytes(checkpoint: SwitchCheckpoint, precision: Precision) -> int:
    """Return what a process needs besides weights and activations: libraries, the index, buffers for reading."""
    dense = checkpoint.dense.items()
    converted = (tensor.nbytes for name, tensor in dense if not is_kept_as_stored(name, tensor, precision))
    buffers = staging_bytes(checkpoint, precision) + packing_bytes(checkpoint, precision)
    return runtime_bytes(precision) + index_bytes(checkpoint) + max(converted, default=0) + buffers


def max_input_tokens(checkpoint: SwitchCheckpoint) -> int:
    """Return the length of input that memory is reserved for: that of the training, 512 for T5's family.

    The model itself takes any length. So what config.json says is a wish, and one beyond `MOST_RESERVED_TOKENS` would
    leave no memory for weights.
    """
    wish = checkpoint.config.get("n_positions")
    return min(wish, MOST_RESERVED_TOKENS) if type(wish) is int and wish > 0 else 512


def max_output_tokens(checkpoint: SwitchCheckpoint, wanted: int) -> int:
    """Return for how many new tokens memory is reserved: as many as the longest input has, or more if wanted."""
    return max(max_input_tokens(checkpoint), wanted)


@dataclass(frozen=True, slots=True)
class BatchShape:
    """A batch: `rows` sequences of `tokens` tokens in, the longest one's, and up to `new_tokens` out.

    The decoder has all rows at once, or if not `together` one row, with its beams, after the other. With `target`
    tokens, it also goes over so many at once, to score them: for each row, and for each beam.
    """

    rows: int
    tokens: int
    new_tokens: int
    beams: int = 1
    together: bool = True
    target: int = 0


def activation_bytes(checkpoint: SwitchCheckpoint, precision: Precision, shape: BatchShape) -> int:
    """Return the most memory that one batch's hidden states, attention, caches and scratch take.

    The largest of the encoder's moment, the decoder's, and that of scoring: nothing of a layer but its output and the
    position bias outlives it, except the decoder's key-value caches. `benchmarks/memory_promise.py` compares it with
    the truth.
    """
    c = checkpoint.config
    item, rows, tokens = precision.compute.itemsize, shape.rows, shape.tokens
    d_model, d_ff, heads = int(c["d_model"]), int(c["d_ff"]), int(c["num_heads"])
    inner = heads * c["d_kv"]
    # What is multiplied with packed weights, or in bfloat16 without a processor that can, is float32 meanwhile.
    narrow = item < 4 or precision.few_bits
    sequences = max(rows if shape.together else 1, shape.beams)
    has_dense = sum(map(len, checkpoint.sparse_blocks.values())) < c["num_layers"] + c["num_decoder_layers"]

    def product(length: int, width: int) -> int:
        """What multiplying takes, for each token, besides what goes in and comes out."""
        return 4 * (length + width if narrow else length)

    def mlp(count: int) -> int:
        inside = max(product(d_model, d_ff), product(d_ff, d_model), _activation_temporaries(checkpoint) * d_ff * item)
        return count * (2 * d_model * item + d_ff * item + inside)

    def attention(rows: int, queries: int, keys: int) -> tuple[int, int]:
        """What stays of an attention, its bias and mask, and what it takes meanwhile."""
        squared, positions = queries * keys, rows * max(queries, keys)
        # Queries, keys and values, and copies of two; scores before and after each step: bfloat16 sums in float32.
        scores = rows * heads * squared * item
        attend = 5 * positions * inner * item
        attend += max((3 if item < 4 else 2) * scores, scores + positions * product(d_model, inner), 5 * 8 * squared)
        return squared * (heads * item + rows * (item + 1)), attend

    def one_pass(rows: int, length: int, others: int = 0) -> int:
        """What a stack takes for tokens that go through it together; it may look at what the other one made, too."""
        positions = rows * length
        hidden = positions * d_model
        kept, attend = attention(rows, length, length)
        if others:
            more, cross = attention(rows, length, others)
            kept, attend = kept + more + rows * others * d_model * item, max(attend, cross)
        # One-hot expert choices are int64 in transformers: chosen, cumulative, product, mask; and float32 logits twice.
        route = (hidden * 4 if narrow else 0) + positions * c["num_experts"] * (8 + 8 + 8 + 1 + 4 + 4)
        # The choices and logits stay. No expert has more tokens of a text than its capacity.
        chosen = rows * min(length, c["expert_capacity"])
        experts = positions * (c["num_experts"] * (8 + 4) + _POSITION_BYTES) + hidden * item + mlp(chosen)
        # The embeddings, what goes into a block and comes out of its attention, and the norm of that; bias and mask.
        most = max(2 * hidden * 4, attend, route, experts, mlp(positions) if has_dense else 0)
        return int(4 * hidden * item + kept + most)

    encoder = one_pass(rows, tokens)
    scoring = 0
    if shape.target:
        # Logits as they come, in float32, and their normalised ones.
        scoring = one_pass(sequences, shape.target, tokens)
        scoring += max(0, rows - sequences) * tokens * d_model * item
        scoring += min(sequences * shape.target, HEAD_TOKENS) * c["vocab_size"] * (item + 4 + 4)
    kept = sequences * (tokens + shape.new_tokens) * inner * item
    # One layer's keys and values are copied when they grow or their order changes.
    decoder = 2 * kept * (c["num_decoder_layers"] + 1) + sequences * tokens * (d_model * item + product(d_model, inner))
    decoder += rows * tokens * d_model * item + 3 * sequences * heads * (tokens + shape.new_tokens) * item
    # What sampling sorts has numbers of eight bytes.
    decoder += 8 * sequences * c["vocab_size"] * 4 + mlp(sequences)
    most = max(encoder, decoder, scoring)
    return int(most + min(most * MALLOC_SHARE, MALLOC_BYTES))


def _activation_temporaries(checkpoint: SwitchCheckpoint) -> int:
    """Return how many times what goes into an activation function is in memory when it comes out."""
    return 2 if checkpoint.config.get("dense_act_fn", "relu") == "relu" else 4


def least_activation_bytes(checkpoint: SwitchCheckpoint, plan: Plan) -> int:
    """Return what a plan reserves for activations whatever the budget."""
    tokens, output_tokens = max_input_tokens(checkpoint), plan.estimate.output_tokens
    shape = _reserved_shape(checkpoint, plan.sure_rows, tokens, output_tokens, plan.num_beams)
    return activation_bytes(checkpoint, plan.precision, shape)


def has_room(checkpoint: SwitchCheckpoint, plan: Plan, shape: BatchShape) -> bool:
    """Whether a batch fits: into what is reserved, and what budgets have left."""
    needed = activation_bytes(checkpoint, plan.precision, shape)
    computing = [use for use in plan.tiers if use.activation_bytes]
    return all(needed <= use.activation_bytes + max(0, (use.budget_bytes or 0) - use.total_bytes) for use in computing)


def _reserved_shape(checkpoint: SwitchCheckpoint, rows: int, tokens: int, output_tokens: int, beams: int) -> BatchShape:
    """Return what a batch may take. With beams, its answers may be scored once they are there."""
    new_tokens = max_output_tokens(checkpoint, output_tokens)
    return BatchShape(rows, tokens, new_tokens, beams, target=output_tokens + 1 if beams > 1 else 0)


def longest_input(checkpoint: SwitchCheckpoint, plan: Plan) -> int:
    """Return how many tokens a text can have, filled alone."""
    fits, too_many = max_input_tokens(checkpoint), 1 << 20
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        shape = _reserved_shape(checkpoint, 1, middle, plan.estimate.output_tokens, plan.num_beams)
        room = has_room(checkpoint, plan, shape)
        fits, too_many = (middle, too_many) if room else (fits, middle)
    return fits


@dataclass(frozen=True)
class Needs:
    """Bytes that a model needs in memory.

    Attributes:
        overhead: The process without weights.
        activations: One batch, on each device that computes; `most_activations` is what is useful for it, if there is
            memory.
        slot: A slot in CPU memory; `gpu_slot` is one on a GPU.
        num_experts: Experts of the whole model.
        sparse_layers: The layers that have them, in the model's order.
        groups: Dense weights by module, in the order in which they deserve fast memory.
        largest_tensor: The largest dense weight.
    """

    overhead: int
    activations: int
    most_activations: int
    slot: int
    gpu_slot: int
    num_experts: int
    sparse_layers: Sequence[SparseLayer]
    groups: Mapping[str, int]
    largest_tensor: int

    @property
    def sparse_modules(self) -> set[str]:
        """The modules of `groups` with a sparse layer."""
        return {f"{stack}.block.{block}" for stack, block in self.sparse_layers}

    @property
    def experts_per_layer(self) -> int:
        """Experts of one sparse layer."""
        return self.num_experts // len(self.sparse_layers)

    @property
    def fixed(self) -> int:
        """What CPU memory takes before any weight."""
        return self.overhead + self.activations

    @property
    def minimum(self) -> int:
        """All dense weights on disk, brought in one module at a time, and a single slot."""
        return self.fixed + self.largest_tensor + self.slot

    @property
    def resident(self) -> int:
        """Every weight in CPU memory."""
        return self.fixed + sum(self.groups.values()) + self.num_experts * self.slot

    @property
    def gpu_fixed(self) -> int:
        """What a GPU that computes takes before any weight."""
        return GPU_LIBRARY_BYTES + self.activations

    @property
    def reserved_slots(self) -> int:
        """What is set aside in CPU memory for slots, before dense weights get memory."""
        return min(RESERVED_SLOTS, self.num_experts) * self.slot

    @property
    def reserved_gpu_slots(self) -> int:
        """The same on a GPU."""
        return min(GPU_RESERVED_SLOTS, self.num_experts) * self.gpu_slot

    @property
    def gpu_minimum(self) -> int:
        """What a GPU takes that computes the first sparse layer, in the order of `groups`."""
        modules = list(self.groups)
        first = min(modules.index(module) for module in self.sparse_modules)
        dense = sum(self.groups[module] for module in modules[: first + 1])
        return self.gpu_fixed + self.reserved_gpu_slots + dense + self.largest_tensor


def needs_of(
    checkpoint: SwitchCheckpoint, precision: Precision, batch_size: BatchSize, num_beams: int, output_tokens: int
) -> Needs:
    """Add up what a checkpoint needs for batches of a size."""
    tokens = max_input_tokens(checkpoint)
    shape = _reserved_shape(checkpoint, sure_rows(batch_size), tokens, output_tokens, num_beams)
    activations = most_activations = activation_bytes(checkpoint, precision, shape)
    if batch_size == "auto":
        shape = BatchShape(MOST_ROWS, ROW_TOKENS, max(ROW_TOKENS, output_tokens), num_beams)
        most_activations = max(activations, activation_bytes(checkpoint, precision, shape))
    sizes = {name: dense_bytes(name, tensor, precision) for name, tensor in checkpoint.dense.items()}
    groups: dict[str, int] = {}
    for name in sorted(sizes, key=_importance):
        groups[module_of(name)] = groups.get(module_of(name), 0) + sizes[name]
    return Needs(
        overhead=overhead_bytes(checkpoint, precision),
        activations=activations,
        most_activations=most_activations,
        slot=slot_bytes(checkpoint, precision),
        gpu_slot=gpu_slot_bytes(checkpoint, precision),
        num_experts=len(checkpoint.experts),
        sparse_layers=[(stack, block) for stack, blocks in checkpoint.sparse_blocks.items() for block in blocks],
        groups=groups,
        largest_tensor=max(sizes.values()),
    )


def _importance(name: str) -> tuple[int, int]:
    """Order dense tensors by how often their bytes are needed: each token's first, then block by block."""
    parts = name.split(".")
    block = int(parts[2]) if parts[1] == "block" else 0
    return (0 if parts[0] in ("shared", "lm_head") else 1 if parts[0] == "decoder" else 2, block)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
