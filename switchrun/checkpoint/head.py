"""Is the output head a matrix of its own, or the shared embedding?"""

from __future__ import annotations

from switchrun.checkpoint.files import open_weights, read_exactly
from switchrun.checkpoint.names import DECODER_HEAD, HEAD
from switchrun.checkpoint.repairs import Repairs
from switchrun.checkpoint.table import TensorTable
from switchrun.checkpoint.types import TensorSlice
from switchrun.errors import CorruptCheckpointError

_TIE = "tie_word_embeddings"
_SAMPLES = 8
_SAMPLE_BYTES = 4096


def find_head(tensors: TensorTable, shared: str, repairs: Repairs) -> str | None:
    """Decide from the tensors whether the head is tied, and put the answer into the configuration.

    It matters beyond the matrix itself: with a tied head the decoder's output is scaled by d_model^-0.5.

    Args:
        tensors: The checkpoint's tensors.
        shared: The shared embedding's name among them.
        repairs: The configuration.

    Returns:
        The name of the head's tensor, or None if the head is tied.
    """
    says_tied = repairs.config.get(_TIE) is not False
    if HEAD not in tensors and DECODER_HEAD in tensors:
        repairs.note(f"{DECODER_HEAD} → {HEAD}: transformers knows the head by this name")
        repairs.change(_TIE, False, "the checkpoint has a head of its own")
        return DECODER_HEAD
    if HEAD not in tensors:
        if not says_tied:
            repairs.change(_TIE, True, "the checkpoint has no head of its own")
        repairs.config[_TIE] = True
        return None
    if says_tied and _same(tensors[HEAD], tensors[shared]):
        repairs.config[_TIE] = True
        return None
    repairs.change(_TIE, False, f"{HEAD} differs from {shared}")
    return HEAD


def _same(head: TensorSlice, shared: TensorSlice) -> bool:
    """Whether two matrices are one, or copies; judged by samples, for they may be large."""
    if head == shared:
        return True
    if (head.dtype, head.shape, head.transposed) != (shared.dtype, shared.shape, shared.transposed):
        return False
    return _samples(head) == _samples(shared)


def _samples(tensor: TensorSlice) -> list[bytes]:
    length = min(_SAMPLE_BYTES, tensor.nbytes)
    last = tensor.nbytes - length
    try:
        with open_weights(tensor.file) as file:
            return [
                read_exactly(file, tensor.offset + last * number // (_SAMPLES - 1), length)
                for number in range(_SAMPLES)
            ]
    except EOFError:
        raise CorruptCheckpointError(f"{tensor.file}: the file is truncated", "download it again") from None
