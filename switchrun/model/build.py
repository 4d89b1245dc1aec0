"""The model itself: transformers' own, built without its experts on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import SwitchTransformersForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.dtypes import Precision
from switchrun.experts.buffers import Buffers
from switchrun.experts.cache import ExpertCache
from switchrun.experts.formats import Format, Int8Format, PackedFormat, PlainFormat
from switchrun.experts.hub_reader import HubReader
from switchrun.experts.module import OffloadedExperts, RoutingContext
from switchrun.experts.reader import FileReader, SplitReader, Way
from switchrun.experts.source import ExpertSource
from switchrun.experts.tiers import ExpertTiers
from switchrun.kernels.int8 import use_int8
from switchrun.kernels.plain import use_fast_products
from switchrun.model.settings import generation_config, model_config
from switchrun.planning import Plan, memory
from switchrun.planning.opening import PlannedModel
from switchrun.store import BackgroundWriter, open_checkpoint_store


def open_cache(
    planned: PlannedModel, plan: Plan, way: Way | None, warn: Callable[[str], None] | None, stack: ExitStack
) -> ExpertCache:
    """Open the expert cache that the final plan asks for; the stack closes it."""
    checkpoint, options, packed = planned.checkpoint, planned.options, plan.precision.packed
    direct = memory.reads_directly(checkpoint)
    source = ExpertSource.open(
        checkpoint, options.folder, keep=packed is None, limit_bytes=options.limit_bytes, warn=warn
    )
    expert_format: Format
    if packed is None:
        expert_format = PlainFormat(source, getattr(torch, plan.precision.compute.torch_name))
    elif checkpoint.reads_int8_in_place:
        expert_format = Int8Format(source, memory.packed_layout(checkpoint, packed))
    else:
        store = open_checkpoint_store(
            options.folder, checkpoint, packed.value, limit_bytes=options.limit_bytes, warn=warn
        )
        writer = None
        if planned.hub is None:
            # Closed after the cache, whose threads offer it experts; then it writes what still waits.
            writer = stack.enter_context(BackgroundWriter(store, memory.writer_buffers(checkpoint, plan.precision)))
        expert_format = PackedFormat(source, store, writer)
    use = plan.tier("cpu")
    staging = memory.staging_bytes(checkpoint, plan.precision) // memory.STAGING_BUFFERS
    files = FileReader(direct, way)
    cache = ExpertCache(
        expert_format,
        slots=Buffers(use.expert_slots, use.slot_bytes),
        staging=Buffers(memory.STAGING_BUFFERS if staging else 0, staging),
        reader=files if planned.hub is None else SplitReader(files, HubReader(planned.hub)),
    )
    return stack.enter_context(cache)


def build_model(checkpoint: SwitchCheckpoint, precision: Precision, tiers: ExpertTiers, context: RoutingContext) -> Any:
    """Build the model on the meta device, its experts replaced by `OffloadedExperts`.

    transformers would make every expert a module: 61,440 of them take minutes to build for switch-c-2048. So the
    model is built with one expert a layer; then the routers get their real width and the experts are swapped out.

    Returns a `SwitchTransformersForConditionalGeneration` in eval mode that computes in the precision's compute dtype,
    routers in float32. Raises a `ModelError` if transformers does not accept the configuration.
    """
    config = model_config(checkpoint, num_experts=1)
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
            mlp.experts = OffloadedExperts(tiers, stack, block, activation, context)
    model.generation_config = generation_config(checkpoint)
    model.eval()
    return model
