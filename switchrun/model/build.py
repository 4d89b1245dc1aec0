"""The model itself: transformers' own, built without its experts on the meta device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.dtypes import Precision
from switchrun.errors import ModelError
from switchrun.experts.cache import ExpertCache
from switchrun.experts.formats import Format, Int8Format, PackedFormat
from switchrun.experts.module import OffloadedExperts, RoutingContext
from switchrun.experts.reader import Way
from switchrun.experts.tiers import ExpertTiers
from switchrun.kernels.int8 import use_int8
from switchrun.kernels.plain import use_fast_products
from switchrun.planning import Plan, memory
from switchrun.store import BackgroundWriter, ExpertStore

_log = logging.getLogger(__name__)


def build_cache(
    checkpoint: SwitchCheckpoint,
    plan: Plan,
    way: Way,
    store: ExpertStore | None,
    writer: BackgroundWriter | None,
) -> ExpertCache:
    """Make the expert cache that a plan asks for; the caller closes it.

    Args:
        checkpoint: Where experts lie.
        plan: How many slots, and in which dtype.
        way: How the disk is read.
        store: Where packed experts may lie; None if experts are not packed, or are so in the checkpoint.
        writer: Writes there; it stays the caller's.
    """
    use = plan.tier("cpu")
    staging = memory.staging_bytes(checkpoint, plan.precision) // memory.STAGING_BUFFERS
    direct = memory.reads_directly(checkpoint)
    return ExpertCache(
        checkpoint.experts,
        getattr(torch, plan.precision.compute.torch_name),
        num_slots=use.expert_slots,
        slot_bytes=use.slot_bytes,
        staging=(memory.STAGING_BUFFERS, staging) if staging else (0, 0),
        direct=direct,
        way=way,
        slot_format=_slot_format(checkpoint, plan, store, writer, direct),
    )


def _slot_format(
    checkpoint: SwitchCheckpoint, plan: Plan, store: ExpertStore | None, writer: BackgroundWriter | None, direct: bool
) -> Format | None:
    packed = plan.precision.packed
    if packed is not None and checkpoint.has_int8_experts:
        return Int8Format(checkpoint.experts, memory.packed_layout(checkpoint, packed), direct)
    return None if store is None else PackedFormat(checkpoint.experts, store, writer, direct)


def build_model(
    checkpoint: SwitchCheckpoint, precision: Precision, levels: ExpertTiers, context: RoutingContext
) -> Any:
    """Build the model on the meta device, its experts replaced by `OffloadedExperts`.

    transformers would make every expert a module: 61,440 of them take minutes to build for switch-c-2048. So the
    model is built with one expert a layer; then the routers get their real width and the experts are swapped out.

    Args:
        checkpoint: Gives the configuration and which blocks are sparse.
        precision: What dense weights compute in, and whether linear layers are in int8; routers stay in float32.
        levels: Where experts come from.
        context: Shared by all sparse layers.

    Raises:
        ModelError: transformers does not accept the configuration.

    Returns:
        A `SwitchTransformersForConditionalGeneration` in eval mode, its dense weights still on the meta device.
    """
    config = _config(checkpoint)
    if config.dense_act_fn not in ACT2FN:
        raise ModelError(f"transformers knows no activation function '{config.dense_act_fn}' (dense_act_fn)")
    # On the meta device there is nothing to initialise; torch would import its compiler to find that out.
    with torch.device("meta"), no_init_weights():
        model: Any = SwitchTransformersForConditionalGeneration(config)
    model.to(getattr(torch, precision.compute.torch_name))
    use_fast_products(model)
    use_int8(model, [name for name, tensor in checkpoint.dense.items() if memory.is_int8(name, tensor, precision)])
    num_experts = checkpoint.num_experts
    for part in (model, model.encoder, model.decoder):
        part.config.num_experts = num_experts
    activation: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[config.dense_act_fn]
    for stack, blocks in checkpoint.sparse_blocks.items():
        for block in blocks:
            mlp = getattr(model, stack).block[block].layer[-1].mlp
            mlp.router.num_experts = num_experts
            # transformers' own product: another order of summing might choose another expert.
            mlp.router.classifier = nn.Linear(
                config.d_model, num_experts, bias=config.router_bias, device="meta", dtype=torch.float32
            )
            mlp.experts = OffloadedExperts(levels, stack, block, activation, context)
    model.generation_config = _generation_config(checkpoint.path, config)
    model.eval()
    return model


def _config(checkpoint: SwitchCheckpoint) -> Any:
    # `num_experts` is 1 only while the model is being built.
    settings = {**checkpoint.config, "num_experts": 1}
    for key in ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "quantization_config"):
        settings.pop(key, None)
    try:
        return SwitchTransformersConfig.from_dict(settings)
    except Exception as error:  # transformers raises many kinds for a value that it does not like
        reason = " ".join(str(error).split())
        raise ModelError(f"transformers does not accept {checkpoint.path / 'config.json'}: {reason}") from error


def _generation_config(path: Path, config: Any) -> GenerationConfig:
    """Take the checkpoint's own generation settings where it has any, as plain transformers does."""
    if (path / "generation_config.json").is_file():
        try:
            own = GenerationConfig.from_pretrained(path)
            for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
                if getattr(own, name) is None:
                    setattr(own, name, getattr(config, name))
            return own
        except Exception as error:  # as above; the settings of config.json then serve as well
            _log.warning("ignoring %s: %s", path / "generation_config.json", error)
    return GenerationConfig.from_model_config(config)
