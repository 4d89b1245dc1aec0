"""Dense weights: read by byte range, placed by accelerate according to the device map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from typing import NamedTuple

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from switchrun.checkpoint.names import scales_of
from switchrun.checkpoint.types import TensorSlice
from switchrun.dtypes import Precision
from switchrun.errors import UsageError
from switchrun.experts import accelerator
from switchrun.experts.buffers import Buffers
from switchrun.experts.reader import FileReader
from switchrun.kernels.int8 import quantise_int8
from switchrun.kernels.matrices import TORCH_DTYPES
from switchrun.model.preload import DensePreload
from switchrun.planning.device_map import tier_of
from switchrun.planning.memory import is_int8, is_router
from switchrun.planning.plan import DISK, Tier, main_tier
from switchrun.units import format_count

#: Tensors on their way at a time: enough to keep a disk busy, few enough to stay within what the plan reserves.
_READERS = 2


def read_tensor(stored: TensorSlice, reader: FileReader) -> torch.Tensor:
    """Read one tensor from its file; blocks until it is there.

    Returns:
        A new tensor in the stored dtype, owned by the caller; up to two pages around it are kept with it.

    Raises:
        CorruptCheckpointError: The file cannot be read, or ends too early.
    """
    read = reader.segment(stored.file, stored.offset, stored.nbytes)
    buffer = Buffers(1, read.length, huge=False)
    reader.read([read], buffer.view(0))
    return view_tensor(buffer.memory, stored.offset - read.offset, stored)


def view_tensor(memory: mmap, position: int, stored: TensorSlice) -> torch.Tensor:
    """Give the tensor whose bytes were read to a place in memory: a view, unless it is stored transposed."""
    shape = stored.shape[::-1] if stored.transposed else stored.shape
    flat = torch.frombuffer(memory, dtype=TORCH_DTYPES[stored.dtype], count=math.prod(shape), offset=position)
    tensor = flat.view(shape)
    return tensor.T.contiguous() if stored.transposed else tensor


class Stored(NamedTuple):
    """A tensor as a checkpoint has it, with the scales of its rows if it is in int8."""

    tensor: torch.Tensor
    scales: torch.Tensor | None


class DenseWeights(Mapping[str, torch.Tensor]):
    """The dense weights by name, each read from the checkpoint when it is asked for, as it is kept in memory.

    A matrix that is kept in int8 and not stored so is quantised whenever it is read, so that it has the same numbers on
    every tier; its scales have a name of their own. Knows the other names of `shared.weight` too. This is the
    `weights_map` that accelerate's hooks take: nothing is copied to an offload folder.

    Args:
        slices: Where the tensors lie, by canonical name.
        precision: The compute dtype, and whether linear layers are kept in int8; routers are given in float32.
        reader: Reads them; it stays the caller's.
        preload: Has read some of them already, and is closed.
    """

    def __init__(
        self, slices: Mapping[str, TensorSlice], precision: Precision, reader: FileReader, preload: DensePreload
    ) -> None:
        self._slices = dict(slices)
        self._dtype: torch.dtype = getattr(torch, precision.compute.torch_name)
        self._weights = {scales_of(name): name for name, each in slices.items() if is_int8(name, each, precision)}
        #: Those of the matrix that was read last: a hook that asked for the one asks for the other next.
        self._scales: dict[str, torch.Tensor] = {}
        self._reader = reader
        self._preload = preload
        self._converted: dict[str, dict[str, torch.Tensor]] = {}
        names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        self.aliases = {name: "shared.weight" for name in names if name not in slices}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._weights:
            if name not in self._scales:
                self[self._weights[name]]
            return self._scales[name]
        tensors = self.keep(name, self.read(name))
        result = tensors.pop(name)
        if tensors:
            self._scales = tensors
        return result

    def convert_staged(self) -> None:
        """Bring what was read ahead, but not to stay, to the form in which it is kept."""
        for name in self._preload.staged:
            self._converted[name] = self.keep(name, self.read(name))
        self._preload.drop_staged()

    def read(self, name: str) -> Stored:
        """Read a tensor as it is stored; any thread may.

        Raises:
            CorruptCheckpointError: It cannot be read.
        """
        name = self.aliases.get(name, name)
        stored, place = self._slices[name], self._preload.find(name)
        tensor = view_tensor(*place, stored) if place else read_tensor(stored, self._reader)
        return Stored(tensor, None if stored.scales is None else read_tensor(stored.scales, self._reader))

    def keep(self, name: str, stored: Stored) -> dict[str, torch.Tensor]:
        """Bring a tensor to the form in which it is kept: that by its name, or in int8 its codes, and its scales.

        torch has threads for this; called from several threads at once, they get in each other's way.
        """
        tensor, scales = stored
        if scales_of(name) in self._weights:
            if scales is None:
                codes, scales = torch.empty(tensor.shape, dtype=torch.int8), torch.empty(tensor.shape[:1])
                quantise_int8(tensor, codes, scales)
                tensor = codes
            return {name: tensor, scales_of(name): scales}
        if scales is not None:
            return {name: tensor * (scales / 127.0).unsqueeze(1)}
        tensor = tensor.to(self._dtype)
        # Rounded first, as transformers does, which loads a router in the model's dtype and widens it when it is used.
        return {name: tensor.float() if is_router(name) else tensor}

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield each tensor's name, and what is kept for it by its names; in any order.

        Raises:
            CorruptCheckpointError: One cannot be read.
        """
        left = []
        for name in names:
            if name in self._converted:
                yield name, self._converted.pop(name)
            else:
                left.append(name)
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(left), _READERS):
                some = left[start : start + _READERS]
                for name, stored in zip(some, pool.map(self.read, some), strict=True):
                    yield name, self.keep(name, stored)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._slices, *self._weights, *self.aliases])

    def __len__(self) -> int:
        return len(self._slices) + len(self._weights) + len(self.aliases)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors as they are stored, without aliases."""
        return tuple(self._slices)


def check_gpus(numbers: Sequence[int]) -> None:
    """Refuse a plan with GPUs that this machine does not have, and wake those that it has.

    Raises:
        UsageError: A GPU is not there, or the driver does not suit torch.
    """
    if not numbers:
        return
    accelerator.check_driver()
    there = accelerator.device_count()
    for number in numbers:
        if number >= there:
            raise UsageError(
                f"gpu:{number} is asked for, and torch finds {format_count(there, 'GPU')} here",
                "give --gpu-memory 0, or change the map",
            )
        accelerator.wake(number)


def input_device(device_map: Mapping[str, Tier]) -> torch.device:
    """Give the device for token ids: that of `shared`, or the CPU, from which hooks move them where they are wanted."""
    return _device(tier_of("shared.weight", device_map))


def place_dense_weights(
    model: nn.Module,
    weights: DenseWeights,
    device_map: Mapping[str, Tier],
    on_placed: Callable[[str], None],
) -> None:
    """Bring dense weights to their tiers; those on disk are brought in by accelerate's hooks when they are used.

    Args:
        model: The model, on the meta device.
        weights: The weights; only those that do not stay on disk are read.
        device_map: Module → tier.
        on_placed: Called with the name of each tensor.

    Raises:
        CorruptCheckpointError: A tensor cannot be read.
    """
    tiers = {name: tier_of(name, device_map) for name in weights}
    resident = [name for name in weights.names if tiers[name] != DISK]
    for name, tensors in weights.tensors(resident):
        for part, tensor in tensors.items():
            set_module_tensor_to_device(model, part, _device(tiers[name]), value=tensor, dtype=tensor.dtype)
        on_placed(name)
    for alias, name in weights.aliases.items():
        _share(model, alias, name, weights, tiers)
    if len(set(tiers.values())) > 1 or DISK in tiers.values():
        _attach_hooks(model, weights, tiers)


def drop_weights(model: nn.Module) -> None:
    """Let go of a model's weights now: its modules refer to one another, and may outlive their last use for long."""
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        set_module_tensor_to_device(model, name, "meta")


def _share(model: nn.Module, alias: str, name: str, weights: DenseWeights, tiers: Mapping[str, Tier]) -> None:
    """Let an alias be the same parameter, or a copy of it if the map puts it on another device."""
    if tiers[alias] == DISK:
        return
    owner = model.get_submodule(alias.rpartition(".")[0])
    if tiers[alias] == tiers[name]:
        owner.weight = model.get_parameter(name)
    else:
        set_module_tensor_to_device(model, alias, _device(tiers[alias]), value=weights[alias])


def _attach_hooks(model: nn.Module, weights: DenseWeights, tiers: Mapping[str, Tier]) -> None:
    """Move inputs to where each module's weights are, and bring the weights that stay on disk in and out."""
    main = _device(main_tier(tiers.values()))
    modules = dict(_whole_modules(model, "", tiers))
    devices = {name: main if tier == DISK else _device(tier) for name, tier in modules.items()}
    offload = {name: tier == DISK for name, tier in modules.items()}
    attach_align_device_hook_on_blocks(
        model,
        execution_device={"": main} | devices,
        offload=offload,
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
