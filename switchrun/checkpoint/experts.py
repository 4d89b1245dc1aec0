"""The experts of a checkpoint: all present, all alike, and looked up without building 61,440 objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from switchrun.checkpoint.checks import check_int8, check_tensor, missing_tensor, with_scales
from switchrun.checkpoint.names import STACKS, mlp_prefix, scales_of
from switchrun.checkpoint.types import ExpertKey, ExpertSlices, Stack, TensorTable
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
        return ExpertSlices(*(with_scales(self._tensors, f"{prefix}.{matrix}.weight") for matrix in ("wi", "wo")))

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

    def check(self, entry: Path, d_model: int, d_ff: int) -> tuple[tuple[ExpertSlices, int], ...]:
        """See that every expert is there, with the right shapes and one dtype, beside which there may be int8.

        Args:
            entry: The file to name when a tensor is missing.
            d_model: The width of the model.
            d_ff: The width inside an expert.

        Returns:
            An expert of each form, and how many have it.

        Raises:
            CorruptCheckpointError: The first tensor that is missing or wrong.
        """
        rows = self._tensors.rows
        dtype: str | None = None
        # By number of kind: 120,000 tensors are of two kinds or a few more.
        good: dict[str, set[int]] = {"wi": set(), "wo": set()}
        good_int8: dict[str, set[tuple[int, int]]] = {"wi": set(), "wo": set()}
        int8 = {number for number, kind in enumerate(self._tensors.kinds) if kind.dtype == "I8"}
        shapes = {"wi": (d_ff, d_model), "wo": (d_model, d_ff)}
        forms: dict[tuple[int, ...], tuple[ExpertKey, int]] = {}
        for (stack, block), prefix in self._prefixes.items():
            for expert in range(self._num_experts):
                form = []
                for matrix in ("wi", "wo"):
                    name = f"{prefix}{expert}.{matrix}.weight"
                    row = rows.get(name)
                    if row is None:
                        raise missing_tensor(entry, name)
                    if row[2] in int8:
                        scales = rows.get(scales_of(name))
                        if scales is None or (row[2], scales[2]) not in good_int8[matrix]:
                            check_int8(self._tensors, name, shapes[matrix], entry)
                            good_int8[matrix].add((row[2], rows[scales_of(name)][2]))
                    elif row[2] not in good[matrix]:
                        check_tensor(self._tensors, name, shapes[matrix])
                        dtype = self._one_dtype(name, dtype)
                        good[matrix].add(row[2])
                    form.append(row[2])
                first, count = forms.get(tuple(form), (ExpertKey(stack, block, expert), 0))
                forms[tuple(form)] = first, count + 1
        return tuple((self[first], count) for first, count in forms.values())

    def _one_dtype(self, name: str, dtype: str | None) -> str:
        tensor = self._tensors[name]
        if dtype is not None and tensor.dtype != dtype:
            raise CorruptCheckpointError(
                f"{tensor.file}: tensor {name} is stored as {tensor.dtype}, and other experts as {dtype}"
            )
        return tensor.dtype
