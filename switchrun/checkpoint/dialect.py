"""Turns what lies in a folder into a Switch model: canonical names, and a configuration that is true.

Everything is decided from the tensors, never from a model's name: google/switch-c-2048 has five things wrong or
missing in its configuration, and its copies elsewhere have other names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from switchrun.checkpoint.checks import check_int8, check_rows, check_tensor, missing_tensor, with_scales
from switchrun.checkpoint.experts import Experts
from switchrun.checkpoint.files import read_json_object
from switchrun.checkpoint.head import find_head
from switchrun.checkpoint.index import CONFIG, Index
from switchrun.checkpoint.locate import Location
from switchrun.checkpoint.names import (
    BLOCK_NAME,
    EMBEDDINGS,
    EXPERT_NAME,
    HEAD,
    LINEAR_NAME,
    ROUTER_NAME,
    SHARED,
    STACKS,
    dense_tensors,
    mlp_layer,
    mlp_prefix,
)
from switchrun.checkpoint.repairs import Repairs
from switchrun.checkpoint.sparsity import configured_step, find_step
from switchrun.checkpoint.stamps import fingerprint
from switchrun.checkpoint.table import TensorTable
from switchrun.checkpoint.types import Stack, SwitchCheckpoint, TensorSlice
from switchrun.dtypes import WEIGHT_DTYPES
from switchrun.errors import ModelError

_MODEL_TYPE = "switch_transformers"
_GATED_EXPERT = re.compile(r"\.mlp\.experts\.expert_\d+\.wi_[01]\.weight")
_LAYERS: dict[Stack, str] = {"encoder": "num_layers", "decoder": "num_decoder_layers"}


def understand(location: Location, index: Index) -> SwitchCheckpoint:
    """Make a Switch checkpoint of a folder's tensors and its `config.json`.

    Args:
        location: Where the checkpoint lies.
        index: Its tensors.

    Returns:
        The checkpoint, every tensor of which is there and has the right shape.

    Raises:
        ModelError: It is no Switch model, or of a kind that is not supported.
        CorruptCheckpointError: A tensor is missing or wrong, or config.json is damaged.
    """
    tensors = index.tensors
    config_path = location.path / CONFIG
    config = read_json_object(config_path)
    survey = _Survey(tensors)
    _refuse_others(config, survey, location.id)
    repairs = Repairs(config_path, config)
    repairs.fill(
        model_type=_MODEL_TYPE, architectures=["SwitchTransformersForConditionalGeneration"], is_encoder_decoder=True,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    repairs.change("model_type", _MODEL_TYPE, "the checkpoint has a Switch Transformer's experts")
    repairs.change("is_encoder_decoder", True, "the checkpoint has both stacks")
    sparse_blocks = _repair_geometry(repairs, survey, index, location.id)
    dense = _dense(repairs, sparse_blocks, index)
    experts = Experts(tensors, sparse_blocks, repairs.config["num_experts"])
    forms = experts.check(index.entry, repairs.config["d_model"], repairs.config["d_ff"])
    matrices = [*dense.values(), *(matrix for form, _ in forms for matrix in form)]
    int8 = any(matrix.dtype == "I8" for matrix in matrices)
    # In transformers' 8 bit models the embedding tells what the rest is computed in.
    plain = dense[SHARED].dtype if int8 else forms[0][0].wi.dtype
    _repair_dtype(repairs, plain)
    return SwitchCheckpoint(
        id=location.id,
        revision=location.revision,
        path=location.path,
        config=repairs.config,
        repairs=tuple(repairs.sentences),
        dense=dense,
        experts=experts,
        sparse_blocks=sparse_blocks,
        fingerprint=fingerprint(index.stamps, location.content),
        stored_dtype="I8" if int8 else plain,
        forms=forms,
    )


class _Survey:
    """What the names tell: blocks, sparse blocks, experts, and marks of other formats."""

    def __init__(self, tensors: TensorTable) -> None:
        self.blocks: dict[Stack, set[int]] = {"encoder": set(), "decoder": set()}
        self.sparse: dict[Stack, set[int]] = {"encoder": set(), "decoder": set()}
        self.num_experts = 0
        self.has_experts = False
        self.gated = False
        for name in tensors:
            if match := EXPERT_NAME.fullmatch(name):
                self._add_sparse(match)
                self.has_experts = True
                self.num_experts = max(self.num_experts, int(match[4]) + 1)
            else:
                self._add_dense(tensors, name)

    def _add_sparse(self, match: re.Match[str]) -> None:
        for stack in STACKS:
            if match[1] == stack and int(match[3]) == mlp_layer(stack):
                self.blocks[stack].add(int(match[2]))
                self.sparse[stack].add(int(match[2]))

    def _add_dense(self, tensors: TensorTable, name: str) -> None:
        if match := ROUTER_NAME.fullmatch(name):
            self._add_sparse(match)
            # The router knows how many experts there should be, even if the last ones are lost.
            self.num_experts = max(self.num_experts, *tensors[name].shape[:1], 0)
        elif match := BLOCK_NAME.match(name):
            for stack in STACKS:
                if match[1] == stack:
                    self.blocks[stack].add(int(match[2]))
        self.gated = self.gated or _GATED_EXPERT.search(name) is not None


def _refuse_others(config: Mapping[str, Any], survey: _Survey, model: str) -> None:
    model_type = config.get("model_type")
    is_switch = model_type in (None, _MODEL_TYPE) or survey.has_experts or survey.gated
    activation = config.get("dense_act_fn")
    if not is_switch:
        raise ModelError(f"{model} is not a Switch Transformers model (model_type {ascii(model_type)[1:-1][:50]})")
    if survey.gated or config.get("is_gated_act") is True or str(activation).startswith("gated"):
        raise ModelError(
            f"{model} has gated experts (wi_0, wi_1), as switch-xxl-128 does, which is not supported",
            "no version of transformers builds such a model right, so there is nothing to compare answers with",
        )
    if not survey.has_experts:
        raise ModelError(f"{model} is not a Switch Transformers model: none of its tensors belongs to an expert")
    for stack in STACKS:
        if not survey.blocks[stack]:
            raise ModelError(f"{model} has no {stack} blocks; both stacks are needed")


def _repair_geometry(repairs: Repairs, survey: _Survey, index: Index, model: str) -> dict[Stack, tuple[int, ...]]:
    sparse_blocks: dict[Stack, tuple[int, ...]] = {}
    for stack in STACKS:
        blocks = survey.blocks[stack]
        layers = max(blocks) + 1
        if len(blocks) != layers:
            lost = min(set(range(layers)) - blocks)
            raise missing_tensor(index.entry, f"{stack}.block.{lost}.layer.0.SelfAttention.q.weight")
        repairs.change(_LAYERS[stack], layers, f"the checkpoint has {_count(layers, f'{stack} block')}")
        sparse_blocks[stack] = tuple(sorted(survey.sparse[stack]))
        own = configured_step(repairs.config, stack, layers)
        step = find_step(layers, sparse_blocks[stack], own)
        which = f"experts in {stack} blocks {_list(sparse_blocks[stack])}"
        if step is None:
            raise ModelError(
                f"{model} has {which} of {layers}, which is not supported",
                "transformers can only build experts into every n-th block",
            )
        repairs.config[f"{stack}_sparse_step"] = own
        if step != own:
            repairs.change(f"{stack}_sparse_step", step, f"the checkpoint has {which}")
            repairs.config[f"num_sparse_{stack}_layers"] = len(sparse_blocks[stack])
    experts = survey.num_experts
    repairs.change("num_experts", experts, f"the checkpoint has {_count(experts, 'expert')} in a sparse block")
    biases = any(
        f"{mlp_prefix(stack, block)}.router.classifier.bias" in index.tensors
        for stack in STACKS
        for block in sparse_blocks[stack]
    )
    repairs.fill(router_bias=False)
    if biases:
        repairs.change("router_bias", True, "the checkpoint's routers have biases")
    return sparse_blocks


def _dense(repairs: Repairs, sparse_blocks: Mapping[Stack, tuple[int, ...]], index: Index) -> dict[str, TensorSlice]:
    tensors = index.tensors
    # A save of tied weights may keep any one of their three names.
    shared = next((name for name in (SHARED, *EMBEDDINGS) if name in tensors), None)
    if shared is None:
        raise missing_tensor(index.entry, SHARED)
    if shared != SHARED:
        repairs.note(f"{shared} → {SHARED}: the embedding was saved under this name only")
    head = find_head(tensors, shared, repairs)
    stored_as = {SHARED: shared, HEAD: head}
    dense: dict[str, TensorSlice] = {}
    for name, shape in dense_tensors(repairs.config, sparse_blocks, tied=head is None):
        source = stored_as.get(name) or name
        if source not in tensors:
            raise missing_tensor(index.entry, source)
        if tensors[source].dtype == "I8" and LINEAR_NAME.fullmatch(source):
            check_int8(tensors, source, shape, index.entry)
            check_rows(tensors, source)
        else:
            check_tensor(tensors, source, shape)
        dense[name] = with_scales(tensors, source)
    if head is not None:
        # With an untied head transformers 5 lets the stacks have embeddings of their own, and saves them.
        for name in EMBEDDINGS:
            if name in tensors and tensors[name] != dense[SHARED]:
                check_tensor(tensors, name, dense[SHARED].shape)
                dense[name] = tensors[name]
    return dense


def _repair_dtype(repairs: Repairs, stored: str) -> None:
    repairs.fill(dtype=WEIGHT_DTYPES[stored])
    repairs.change("dtype", WEIGHT_DTYPES[stored], "the experts are stored so")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _list(blocks: Iterable[int]) -> str:
    return ", ".join(map(str, blocks)) or "none"
