"""The experts of a checkpoint: all present, all alike, and looked up without building 61,440 objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from switchrun.checkpoint.names import STACKS, mlp_prefix
from switchrun.checkpoint.table import TensorTable
from switchrun.checkpoint.types import ExpertKey, ExpertSlices, Stack
from switchrun.dtypes import WEIGHT_DTYPES
from switchrun.errors import CorruptCheckpointError


class Experts(Mapping[ExpertKey, ExpertSlices]):
    """Every expert's slices by key, in the model's order; built when asked for."""

    def __init__(self, tensors: TensorTable, sparse_blocks: Mapping[Stack, Sequence[int]], num_experts: int) -> None:
        self._tensors = tensors
        self._num_experts = num_experts
        self._prefixes = {
            (stack, block): mlp_prefix(stack, block) + ".experts.expert_"
            for stack in STACKS
            for block in sparse_blocks[stack]
        }

    def __getitem__(self, key: ExpertKey) -> ExpertSlices:
        if key not in self:
            raise KeyError(key)
        stack, block, expert = key
        prefix = f"{self._prefixes[stack, block]}{expert}"
        return ExpertSlices(self._tensors[prefix + ".wi.weight"], self._tensors[prefix + ".wo.weight"])

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

    def check(self, entry: Path, d_model: int, d_ff: int) -> str:
        """See that every expert is there, with the right shapes and one dtype.

        Args:
            entry: The file to name when a tensor is missing.
            d_model: The width of the model.
            d_ff: The width inside an expert.

        Returns:
            The dtype that the experts are stored in.

        Raises:
            CorruptCheckpointError: The first tensor that is missing or wrong.
        """
        rows = self._tensors.rows
        dtype: str | None = None
        # By number of kind: 120,000 tensors are of two kinds or a few more.
        good: dict[str, set[int]] = {"wi": set(), "wo": set()}
        shapes = {"wi": (d_ff, d_model), "wo": (d_model, d_ff)}
        for prefix in self._prefixes.values():
            for expert in range(self._num_experts):
                for matrix in ("wi", "wo"):
                    name = f"{prefix}{expert}.{matrix}.weight"
                    row = rows.get(name)
                    if row is None:
                        raise missing_tensor(entry, name)
                    if row[2] not in good[matrix]:
                        check_tensor(self._tensors, name, shapes[matrix])
                        dtype = self._one_dtype(name, dtype)
                        good[matrix].add(row[2])
        assert dtype is not None, "a checkpoint without experts is refused before"
        return dtype

    def _one_dtype(self, name: str, dtype: str | None) -> str:
        tensor = self._tensors[name]
        if dtype is not None and tensor.dtype != dtype:
            raise CorruptCheckpointError(
                f"{tensor.file}: tensor {name} is stored as {tensor.dtype}, and other experts as {dtype}"
            )
        return tensor.dtype


def check_tensor(tensors: TensorTable, name: str, shape: tuple[int, ...]) -> None:
    """See that a tensor has the right shape and a dtype that weights may have.

    Raises:
        CorruptCheckpointError: It has not.
    """
    tensor = tensors[name]
    if tensor.shape != shape:
        raise CorruptCheckpointError(
            f"{tensor.file}: tensor {name} has the shape {list(tensor.shape)}; by config.json it must be {list(shape)}"
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        allowed = ", ".join(sorted(WEIGHT_DTYPES))
        raise CorruptCheckpointError(
            f"{tensor.file}: tensor {name} is stored as {tensor.dtype}, not as one of {allowed}"
        )


def missing_tensor(entry: Path, name: str) -> CorruptCheckpointError:
    """The error to raise for a tensor that the model needs and the checkpoint lacks."""
    return CorruptCheckpointError(
        f"{entry}: tensor {name} is missing", "the checkpoint is incomplete; download it again"
    )
