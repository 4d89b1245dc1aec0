"""What a checkpoint's tensors must be, and its experts: all there, all alike, each made when it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from switchrun.checkpoint.names import STACKS, mlp_prefix, scales_of
from switchrun.checkpoint.types import ExpertKey, ExpertSlices, Index, Stack, TensorSlice
from switchrun.dtypes import WEIGHT_DTYPES
from switchrun.errors import CorruptCheckpointError, ModelError


def check_tensor(index: Index, name: str, shape: tuple[int, ...]) -> TensorSlice:
    """Return a tensor; CorruptCheckpointError if it is missing, or its shape or dtype is not that of the weights."""
    tensor = _check_shape(index, name, shape)
    if tensor.dtype not in WEIGHT_DTYPES:
        allowed = ", ".join(sorted(WEIGHT_DTYPES))
        raise CorruptCheckpointError(
            f"{tensor.file}: tensor {name} is stored as {tensor.dtype}, not as one of {allowed}"
        )
    return tensor


def check_int8(index: Index, name: str, shape: tuple[int, ...]) -> TensorSlice:
    """Return a matrix in int8 with its scales; CorruptCheckpointError if they are not as bitsandbytes saves them."""
    tensor = _check_shape(index, name, shape)
    scales = _check_shape(index, scales_of(name), shape[:1])
    if scales.dtype != "F32":
        raise CorruptCheckpointError(f"{scales.file}: tensor {scales_of(name)} is stored as {scales.dtype}, not as F32")
    return replace(tensor, parts=(scales,))


def gated(model: str) -> ModelError:
    """The error to raise for a model whose experts have `wi_0` and `wi_1`."""
    return ModelError(
        f"{model} has gated experts (wi_0, wi_1), as switch-xxl-128 does, which is not supported",
        "no version of transformers builds such a model right, so there is nothing to compare answers with",
    )


def _check_shape(index: Index, name: str, shape: tuple[int, ...]) -> TensorSlice:
    tensor = index.require(name)
    if tensor.shape != shape:
        raise CorruptCheckpointError(
            f"{tensor.file}: tensor {name} has the shape {list(tensor.shape)}; by config.json it must be {list(shape)}"
        )
    return tensor


class Experts(Mapping[ExpertKey, ExpertSlices]):
    """Every expert's slices by key, in the model's order."""

    def __init__(self, index: Index, sparse_blocks: Mapping[Stack, Sequence[int]], config: Mapping[str, Any]) -> None:
        self._index = index
        self._num_experts: int = config["num_experts"]
        d_model, d_ff = config["d_model"], config["d_ff"]
        self._shapes = {"wi": (d_ff, d_model), "wo": (d_model, d_ff)}
        self._prefixes = {
            (stack, block): mlp_prefix(stack, block) + ".experts.expert_"
            for stack in STACKS
            for block in sparse_blocks[stack]
        }

    def __getitem__(self, key: ExpertKey) -> ExpertSlices:
        if key not in self:
            raise KeyError(key)
        return ExpertSlices(self._slice(key, "wi"), self._slice(key, "wo"))

    def _slice(self, key: ExpertKey, matrix: str) -> TensorSlice:
        name = self._name(key, matrix)
        tensor = self._index[name]
        return replace(tensor, parts=(self._index[scales_of(name)],)) if tensor.dtype == "I8" else tensor

    def _name(self, key: ExpertKey, matrix: str) -> str:
        stack, block, expert = key
        return f"{self._prefixes[stack, block]}{expert}.{matrix}.weight"

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, tuple) or len(key) != 3:
            return False
        return key[:2] in self._prefixes and isinstance(key[2], int) and 0 <= key[2] < self._num_experts

    def __iter__(self) -> Iterator[ExpertKey]:
        for stack, block in self._prefixes:
            for expert in range(self._num_experts):
                yield ExpertKey(stack, block, expert)

    def __len__(self) -> int:
        return len(self._prefixes) * self._num_experts

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all experts; None if their forms say it."""
        return None

    def check(self) -> tuple[tuple[ExpertSlices, int], ...]:
        """Check every expert, and return one of each form in which they are stored, with how many there are of it.

        Raises:
            CorruptCheckpointError: A tensor is missing or has the wrong shape or dtype.
        """
        # By kinds: 120,000 tensors are of two of them, or a few more.
        firsts: dict[tuple[tuple[int, ...], ...], ExpertKey] = {}
        counts: Counter[tuple[tuple[int, ...], ...]] = Counter()
        for key in self:
            form = self._kinds(self._name(key, "wi")), self._kinds(self._name(key, "wo"))
            if form not in firsts:
                for matrix, shape in self._shapes.items():
                    self._check_matrix(self._name(key, matrix), shape)
                firsts[form] = key
            counts[form] += 1
        return tuple((self[key], counts[form]) for form, key in firsts.items())

    def _kinds(self, name: str) -> tuple[int, ...]:
        """Return the number of a matrix's kind, and that of its scales if it is in int8 and has some."""
        row = self._index.rows.get(name)
        if row is None:
            raise self._index.missing(name)
        if self._index.kinds[row[2]].dtype != "I8":
            return (row[2],)
        scales = self._index.rows.get(scales_of(name))
        return (row[2],) if scales is None else (row[2], scales[2])

    def _check_matrix(self, name: str, shape: tuple[int, ...]) -> None:
        check = check_int8 if self._index.require(name).dtype == "I8" else check_tensor
        check(self._index, name, shape)
