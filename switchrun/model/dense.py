"""Dense weights: read by byte range, placed by accelerate according to the device map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from xxhash import xxh3_64_intdigest

from switchrun.checkpoint.names import scales_of
from switchrun.checkpoint.range_check import check_range
from switchrun.checkpoint.types import TensorSlice
from switchrun.dtypes import Precision
from switchrun.errors import CorruptCheckpointError
from switchrun.experts import accelerator
from switchrun.experts.buffers import Buffers
from switchrun.experts.reader import FileReader
from switchrun.experts.source import stored_view
from switchrun.kernels.int8 import quantise_int8
from switchrun.model.preload import DensePreload, Landing
from switchrun.planning.device_map import tier_of
from switchrun.planning.memory import is_int8, is_router
from switchrun.planning.plan import DISK, Tier, main_tier
from switchrun.store.dense_file import remove_dense


class DenseWeights(Mapping[str, torch.Tensor]):
    """The dense weights by name, each read from the checkpoint when it is asked for, as it is kept in memory.

    A matrix that is kept in int8 and not stored so is quantised whenever it is read, so that it has the same numbers on
    every tier; its scales have a name of their own. Knows the other names of `shared.weight` too. This is the
    `weights_map` that accelerate's hooks take: nothing is copied to an offload folder.

    `preload` has read some of them already, and is closed; `reader`, which reads the others, stays the caller's.
    """

    def __init__(
        self, slices: Mapping[str, TensorSlice], precision: Precision, reader: FileReader, preload: DensePreload
    ) -> None:
        self.slices = dict(slices)
        self._dtype: torch.dtype = getattr(torch, precision.compute.torch_name)
        self._weights = {scales_of(name): name for name, each in slices.items() if is_int8(name, each, precision)}
        #: Those of the matrix that was read last: a hook that asked for the one asks for the other next.
        self._scales: dict[str, torch.Tensor] = {}
        self._reader = reader
        self._preload = preload
        names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        self.aliases = {name: "shared.weight" for name in names if name not in slices}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._weights:
            if name not in self._scales:
                self[self._weights[name]]
            return self._scales[name]
        tensors = self.kept(name)
        result = tensors.pop(name)
        if tensors:
            self._scales = tensors
        return result

    def kept(self, name: str) -> dict[str, torch.Tensor]:
        """Read a tensor in the form in which it is kept: that by its name, or in int8 its codes, and its scales."""
        source = self.aliases.get(name, name)
        stored = self.slices[source]
        tensor = self._read(stored, self._preload.take(source))
        scales = self._read(stored.parts[0]) if stored.parts else None
        if scales_of(name) in self._weights:
            if scales is None:
                codes, scales = _own(tensor.shape, torch.int8), torch.empty(tensor.shape[:1])
                quantise_int8(tensor, codes, scales)
                tensor = codes
            elif not tensor.is_contiguous():
                tensor = _own(tensor.shape, torch.int8).copy_(tensor)
            return {name: tensor, scales_of(name): scales}
        if scales is not None:
            return {name: torch.mul(tensor, (scales / 127.0).unsqueeze(1), out=_own(tensor.shape, torch.float32))}
        if is_router(name):
            # Rounded first, as transformers does, which loads it in the model's dtype and widens it when it is used.
            return {name: _own(tensor.shape, torch.float32).copy_(tensor.to(self._dtype))}
        if tensor.dtype == self._dtype and tensor.is_contiguous():
            return {name: tensor}
        return {name: _own(tensor.shape, self._dtype).copy_(tensor)}

    def __iter__(self) -> Iterator[str]:
        return iter([*self.slices, *self._weights, *self.aliases])

    def __len__(self) -> int:
        return len(self.slices) + len(self._weights) + len(self.aliases)

    def _read(self, stored: TensorSlice, landing: Landing | None = None) -> torch.Tensor:
        """Return one tensor; up to two pages around it are kept with it."""
        landing = landing or Landing(self._reader, stored)
        landing.wait()
        check_range(stored, landing.buffer.data, landing.position)
        if stored.xxh3 is not None:
            self._check_kept(stored, landing)
        return stored_view(landing.buffer, landing.position, stored)

    def _check_kept(self, stored: TensorSlice, landing: Landing) -> None:
        """Verify a weight that was fetched from the Hub, at each read; a damaged file is deleted."""
        data = landing.buffer.data[landing.position : landing.position + stored.nbytes]
        if xxh3_64_intdigest(data) != stored.xxh3:
            assert isinstance(stored.file, Path)
            remove_dense(stored.file)
            raise CorruptCheckpointError(
                f"{stored.file}: it was damaged, and was deleted", "run it again: dense weights are then fetched again"
            )


def _own(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in memory that goes back to the system with it: what is freed to malloc may stay for ever."""
    buffer = Buffers(1, math.prod(shape) * dtype.itemsize, huge=False)[0]
    return buffer.tensor(0, dtype, tuple(shape))


def input_device(device_map: Mapping[str, Tier]) -> torch.device:
    """Return the device for token ids: that of `shared`, or the CPU, from which hooks move them."""
    return _device(tier_of("shared.weight", device_map))


def place_dense_weights(
    model: nn.Module, weights: DenseWeights, device_map: Mapping[str, Tier], on_placed: Callable[[str], None]
) -> None:
    """Bring dense weights to their tiers; those on disk are brought in by accelerate's hooks when they are used.

    `model` is on the meta device; `on_placed` is called with the name of each tensor.
    """
    tiers = {name: tier_of(name, device_map) for name in weights}
    resident = [name for name in weights.slices if tiers[name] != DISK]
    for name in resident:
        for part, tensor in weights.kept(name).items():
            set_module_tensor_to_device(model, part, _device(tiers[name]), value=tensor, dtype=tensor.dtype)
        on_placed(name)
    for alias, name in weights.aliases.items():
        if tiers[alias] == tiers[name] != DISK:
            model.get_submodule(alias.rpartition(".")[0]).weight = model.get_parameter(name)
        elif tiers[alias] != DISK:
            set_module_tensor_to_device(model, alias, _device(tiers[alias]), value=weights[alias])
    if len(set(tiers.values())) > 1 or DISK in tiers.values():
        _attach_hooks(model, weights, tiers)


def drop_weights(model: nn.Module) -> None:
    """Drop a model's weights now: its modules refer to one another, and may outlive their last use for long."""
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        set_module_tensor_to_device(model, name, "meta")


def _attach_hooks(model: nn.Module, weights: DenseWeights, tiers: Mapping[str, Tier]) -> None:
    """Move inputs to where each module's weights are, and bring the weights that stay on disk in and out."""
    main = _device(main_tier(tiers.values()))
    modules = dict(_whole_modules(model, "", tiers))
    devices = {name: main if tier == DISK else _device(tier) for name, tier in modules.items()}
    attach_align_device_hook_on_blocks(
        model,
        execution_device={"": main} | devices,
        offload={name: tier == DISK for name, tier in modules.items()},
        weights_map=weights,
    )


def _whole_modules(model: nn.Module, name: str, tiers: Mapping[str, Tier]) -> Iterator[tuple[str, Tier]]:
    """Yield the largest modules whose weights are all on one tier: accelerate's hooks must not lie in one another."""
    prefix = f"{name}." if name else ""
    inside = {tier for weight, tier in tiers.items() if weight.startswith(prefix)}
    if len(inside) == 1 and name:
        yield name, inside.pop()
    elif inside:
        for child, _ in model.get_submodule(name).named_children():
            yield from _whole_modules(model, prefix + child, tiers)


def _device(tier: Tier) -> torch.device:
    return torch.device("cpu") if tier.gpu is None else accelerator.device(tier.gpu)
