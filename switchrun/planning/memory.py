"""How much memory a model takes at work, from its configuration: the arithmetic behind the promise of a budget."""

from __future__ import annotations

from dataclasses import dataclass

from switchrun.checkpoint.types import SwitchCheckpoint, TensorSlice
from switchrun.dtypes import Dtype
from switchrun.units import MIB

#: Interpreter, torch, transformers and tokenizer, resident once a first fill has run. Measured with torch 2.13
#: (CPU), transformers 5.23, Python 3.11: see docs/offloading.md. `Session.open` measures it anew and takes the larger.
RUNTIME_BYTES = 560 * MIB
#: The part of it that only the first fill takes: kernels, thread stacks, allocator arenas.
FIRST_RUN_BYTES = 160 * MIB
#: What one tensor's row in the parsed index takes in memory.
INDEX_BYTES_PER_TENSOR = 900
#: Experts being converted to another dtype at a time; each needs a buffer of its stored size.
STAGING_BUFFERS = 2
#: From this size on an expert is read past the page cache; below, the alignment would cost more than it saves.
DIRECT_IO_BYTES = 4 * MIB
#: Slots that are set aside before dense weights get memory: some are computed on while others are being read.
RESERVED_SLOTS = 4

_PAGE = 4096


def reads_directly(checkpoint: SwitchCheckpoint) -> bool:
    """Tell whether experts are read past the page cache."""
    return checkpoint.expert_bytes >= DIRECT_IO_BYTES


def is_router(name: str) -> bool:
    """Tell whether a dense tensor belongs to a router: routers compute in float32 whatever the dtype."""
    return ".mlp.router." in name


def dense_bytes(name: str, tensor: TensorSlice, dtype: Dtype) -> int:
    """Give the bytes that a dense tensor takes in memory, in the dtype that it is computed in."""
    count = 1
    for size in tensor.shape:
        count *= size
    return count * (4 if is_router(name) else dtype.itemsize)


def needs_conversion(stored: str, dtype: Dtype) -> bool:
    """Tell whether an expert's bytes must be converted on their way into a slot."""
    return stored != dtype.stored


def slot_bytes(checkpoint: SwitchCheckpoint, dtype: Dtype) -> int:
    """Give the size of a slot: one expert in the compute dtype, with room for the alignment of direct reads."""
    slices = next(iter(checkpoint.experts.values()))
    if needs_conversion(slices.wi.dtype, dtype):
        elements = sum(t.shape[0] * t.shape[1] for t in slices)
        return _round_up(elements * dtype.itemsize, _PAGE)
    return read_buffer_bytes(slices.wi.nbytes, slices.wo.nbytes)


def read_buffer_bytes(wi_bytes: int, wo_bytes: int) -> int:
    """Give the bytes of a buffer that an expert can be read into, whatever its matrices' alignment in their files."""
    return _round_up(wi_bytes + wo_bytes + 4 * _PAGE, _PAGE)


def staging_bytes(checkpoint: SwitchCheckpoint, dtype: Dtype) -> int:
    """Give the bytes of all buffers for conversion; 0 if experts are stored in the compute dtype."""
    slices = next(iter(checkpoint.experts.values()))
    if not needs_conversion(slices.wi.dtype, dtype):
        return 0
    return STAGING_BUFFERS * read_buffer_bytes(slices.wi.nbytes, slices.wo.nbytes)


def overhead_bytes(checkpoint: SwitchCheckpoint, dtype: Dtype) -> int:
    """Give what a process needs besides weights and activations: libraries, the index, buffers for reading."""
    tensors = 2 * len(checkpoint.experts) + len(checkpoint.dense)
    largest = max(tensor.nbytes for tensor in checkpoint.dense.values())
    return RUNTIME_BYTES + tensors * INDEX_BYTES_PER_TENSOR + largest + staging_bytes(checkpoint, dtype)


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The largest batch that memory is reserved for: `rows` sequences of `tokens` tokens in and `new_tokens` out."""

    rows: int
    tokens: int
    new_tokens: int


def max_input_tokens(checkpoint: SwitchCheckpoint) -> int:
    """Give the longest input that the model takes: the length that it was trained with, 512 for T5's family."""
    return int(checkpoint.config.get("n_positions") or 512)


def max_output_tokens(checkpoint: SwitchCheckpoint, wanted: int) -> int:
    """Give how many new tokens memory is reserved for: as many as the longest input has, or more if they are wanted."""
    return max(max_input_tokens(checkpoint), wanted)


def activation_bytes(checkpoint: SwitchCheckpoint, dtype: Dtype, shape: BatchShape, num_beams: int = 1) -> int:
    """Give the memory for hidden states, attention, caches and scratch of one batch, at most.

    The largest of the encoder's and the decoder's moment: nothing of a layer but its output and the position bias
    outlives it, except the decoder's key-value caches.
    """
    c = checkpoint.config
    d_model, d_ff, heads, inner = c["d_model"], c["d_ff"], c["num_heads"], c["num_heads"] * c["d_kv"]
    item, rows, tokens = dtype.itemsize, shape.rows, shape.tokens
    positions = rows * tokens
    hidden = positions * d_model
    attention = heads * tokens * tokens
    # Scores, scores with bias and mask, and their softmax are alive together; the bias is kept by all layers.
    attend = 4 * positions * inner * item + 3 * rows * attention * item + 4 * tokens * tokens * 8
    # One-hot expert choices are int64 in transformers: chosen, cumulative, product, mask; and float32 logits twice.
    route = hidden * 4 + positions * c["num_experts"] * (8 + 8 + 8 + 1 + 4 + 4)
    expert = positions * (2 * d_ff + 2 * d_model) * max(item, 2)
    encoder = 4 * hidden * item + 2 * hidden * 4 + attention * item + max(attend, route + expert)

    sequences = max(rows, num_beams)
    layers = c["num_decoder_layers"]
    caches = 2 * sequences * (tokens + shape.new_tokens) * inner * item * layers + positions * d_model * item * 2
    logits = 8 * sequences * c["vocab_size"] * 4
    decoder = caches + logits + 4 * sequences * heads * (tokens + shape.new_tokens) * item
    # Matrix kernels may repack a whole weight.
    largest = max(dense_bytes(name, tensor, dtype) for name, tensor in checkpoint.dense.items())
    scratch = max(largest, d_model * d_ff * item)
    return int(max(encoder, decoder) + scratch)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
