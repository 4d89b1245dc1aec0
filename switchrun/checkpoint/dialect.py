"""Turns what lies in a folder into a Switch model: canonical names, and a configuration that is true.

Everything is decided from the tensors, never from a model's name: google/switch-c-2048 has five things wrong or
missing in its configuration, and its copies elsewhere have other names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from switchrun.checkpoint import names
from switchrun.checkpoint.experts import Experts, check_int8, check_rows, check_tensor
from switchrun.checkpoint.files import MOST_CONFIG_BYTES, open_weights, read_json_object
from switchrun.checkpoint.index import CONFIG
from switchrun.checkpoint.locate import Location
from switchrun.checkpoint.types import Index, Stack, SwitchCheckpoint, TensorSlice
from switchrun.dtypes import WEIGHT_DTYPES
from switchrun.errors import CorruptCheckpointError, ModelError
from switchrun.units import format_count

_MODEL_TYPE = "switch_transformers"
_GATED_EXPERT = re.compile(r"\.mlp\.experts\.expert_\d+\.wi_[01]\.weight")
_LAYERS: dict[Stack, str] = {"encoder": "num_layers", "decoder": "num_decoder_layers"}
#: transformers' own values for what a config.json leaves out (SwitchTransformersConfig, 5.23).
_DEFAULTS = {
    "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_heads": 12, "expert_capacity": 64,
    "num_experts": 8, "num_layers": 12, "num_decoder_layers": 12, "relative_attention_num_buckets": 32,
    "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3,
}  # fmt: skip
#: What may be zero: transformers takes it for "one sparse block, or none".
_MAY_BE_ZERO = frozenset({"num_sparse_encoder_layers", "num_sparse_decoder_layers"})
_TIE = "tie_word_embeddings"
_SAMPLES = 8
_SAMPLE_BYTES = 4096


def understand(location: Location, index: Index) -> SwitchCheckpoint:
    """Make a Switch checkpoint of a folder's tensors, all of which are checked, and its `config.json`.

    Raises:
        ModelError: It is no Switch model, or of a kind that is not supported.
        CorruptCheckpointError: A tensor is missing or wrong, or config.json is damaged.
    """
    config_path = location.path / CONFIG
    config = read_json_object(config_path, MOST_CONFIG_BYTES)
    survey = _Survey(index)
    _refuse_others(config, survey, location.id)
    repairs = _Repairs(config_path, config)
    repairs.fill(
        model_type=_MODEL_TYPE, architectures=["SwitchTransformersForConditionalGeneration"], is_encoder_decoder=True,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    repairs.change("model_type", _MODEL_TYPE, "the checkpoint has a Switch Transformer's experts")
    repairs.change("is_encoder_decoder", True, "the checkpoint has both stacks")
    sparse_blocks = _repair_geometry(repairs, survey, index, location.id)
    dense = _dense(repairs, sparse_blocks, index)
    experts = Experts(index, sparse_blocks, repairs.config["num_experts"])
    forms = experts.check(repairs.config["d_model"], repairs.config["d_ff"])
    matrices = [*dense.values(), *(matrix for form, _ in forms for matrix in form)]
    int8 = any(matrix.dtype == "I8" for matrix in matrices)
    # In transformers' 8 bit models the embedding shows what the rest is computed in.
    plain = dense[names.SHARED].dtype if int8 else forms[0][0].wi.dtype
    repairs.fill(dtype=WEIGHT_DTYPES[plain])
    repairs.change("dtype", WEIGHT_DTYPES[plain], "the experts are stored so")
    return SwitchCheckpoint(
        id=location.id,
        revision=location.revision,
        path=location.path,
        config=repairs.config,
        repairs=tuple(repairs.sentences),
        dense=dense,
        experts=experts,
        sparse_blocks=sparse_blocks,
        fingerprint=index.fingerprint(location.content),
        stored_dtype="I8" if int8 else plain,
        expert_forms=forms,
    )


class _Survey:
    """What the names show: blocks, sparse blocks, experts, and marks of other formats."""

    def __init__(self, index: Index) -> None:
        self.blocks: dict[Stack, set[int]] = {"encoder": set(), "decoder": set()}
        self.sparse: dict[Stack, set[int]] = {"encoder": set(), "decoder": set()}
        self.num_experts = 0
        self.has_experts = False
        self.gated = False
        for name in index:
            if match := names.EXPERT_NAME.fullmatch(name):
                self._add_sparse(match)
                self.has_experts = True
                self.num_experts = max(self.num_experts, int(match[4]) + 1)
            elif match := names.ROUTER_NAME.fullmatch(name):
                self._add_sparse(match)
                # The router knows how many experts there should be, even if the last ones are lost.
                self.num_experts = max(self.num_experts, *index[name].shape[:1], 0)
            else:
                if match := names.BLOCK_NAME.match(name):
                    self.blocks[cast(Stack, match[1])].add(int(match[2]))
                self.gated = self.gated or _GATED_EXPERT.search(name) is not None

    def _add_sparse(self, match: re.Match[str]) -> None:
        stack, block, layer = cast(Stack, match[1]), int(match[2]), int(match[3])
        if layer == names.mlp_layer(stack):
            self.blocks[stack].add(block)
            self.sparse[stack].add(block)


def _refuse_others(config: Mapping[str, Any], survey: _Survey, model: str) -> None:
    model_type = config.get("model_type")
    if not (model_type in (None, _MODEL_TYPE) or survey.has_experts or survey.gated):
        raise ModelError(f"{model} is not a Switch Transformers model (model_type {ascii(model_type)[1:-1][:50]})")
    activation = str(config.get("dense_act_fn"))
    if survey.gated or config.get("is_gated_act") is True or activation.startswith("gated"):
        raise ModelError(
            f"{model} has gated experts (wi_0, wi_1), as switch-xxl-128 does, which is not supported",
            "no version of transformers builds such a model right, so there is nothing to compare answers with",
        )
    if not survey.has_experts:
        raise ModelError(f"{model} is not a Switch Transformers model: none of its tensors belongs to an expert")
    for stack in names.STACKS:
        if not survey.blocks[stack]:
            raise ModelError(f"{model} has no {stack} blocks; both stacks are needed")


class _Repairs:
    """A copy of `config.json`, and what was wrong with it, one sentence each."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.sentences: list[str] = []
        if "torch_dtype" in self.config:  # the key's name until transformers 4.56
            self.config.setdefault("dtype", self.config.pop("torch_dtype"))
        self._given = frozenset(self.config)
        if self.config.get("num_decoder_layers", 0) is None:  # transformers: as many as the encoder has
            self.config["num_decoder_layers"] = self.config.get("num_layers", _DEFAULTS["num_layers"])
        for key, default in _DEFAULTS.items():
            value = self.config.setdefault(key, default)
            if type(value) is not int or value < (0 if key in _MAY_BE_ZERO else 1):
                raise CorruptCheckpointError(f"{path}: {key} is {ascii(value)[:50]}, not a positive whole number")

    def fill(self, **values: Any) -> None:
        """Set what is absent or null, where that cannot change what the checkpoint means."""
        for key, value in values.items():
            if self.config.get(key) is None:
                self.config[key] = value

    def change(self, key: str, value: Any, why: str) -> None:
        """Set a value; it is a repair if plain transformers would have taken another one."""
        old = self.config.get(key)
        if old == value and type(old) is type(value):
            return
        shown = f" {json.dumps(old)}" if key in self._given else ""
        self.sentences.append(f"{key}{shown} → {json.dumps(value)}: {why}")
        self.config[key] = value


def _repair_geometry(repairs: _Repairs, survey: _Survey, index: Index, model: str) -> dict[Stack, tuple[int, ...]]:
    """Set how many blocks and experts there are; return the blocks of each stack that have experts."""
    sparse_blocks: dict[Stack, tuple[int, ...]] = {}
    for stack in names.STACKS:
        blocks = survey.blocks[stack]
        layers = max(blocks) + 1
        if len(blocks) != layers:
            lost = min(set(range(layers)) - blocks)
            raise index.missing(f"{stack}.block.{lost}.layer.0.SelfAttention.q.weight")
        repairs.change(_LAYERS[stack], layers, f"the checkpoint has {format_count(layers, f'{stack} block')}")
        sparse_blocks[stack] = tuple(sorted(survey.sparse[stack]))
        _repair_step(repairs, stack, layers, sparse_blocks[stack], model)
    experts = survey.num_experts
    repairs.change("num_experts", experts, f"the checkpoint has {format_count(experts, 'expert')} in a sparse block")
    sparse_layers = [names.mlp_prefix(stack, block) for stack in names.STACKS for block in sparse_blocks[stack]]
    repairs.fill(router_bias=False)
    if any(f"{layer}.router.classifier.bias" in index for layer in sparse_layers):
        repairs.change("router_bias", True, "the checkpoint's routers have biases")
    return sparse_blocks


def _repair_step(repairs: _Repairs, stack: Stack, layers: int, sparse: tuple[int, ...], model: str) -> None:
    own = _configured_step(repairs.config, stack, layers)
    candidates = (own, *range(layers, -1, -1))  # as it is, else the largest
    step = next((step for step in candidates if _built_sparse(layers, step) == sparse), None)
    which = f"experts in {stack} blocks {', '.join(map(str, sparse)) or 'none'}"
    if step is None:
        raise ModelError(
            f"{model} has {which} of {layers}, which is not supported",
            "transformers can only build experts into every n-th block",
        )
    repairs.config[f"{stack}_sparse_step"] = own
    if step != own:
        repairs.change(f"{stack}_sparse_step", step, f"the checkpoint has {which}")
        repairs.config[f"num_sparse_{stack}_layers"] = len(sparse)


def _configured_step(config: Mapping[str, Any], stack: Stack, layers: int) -> int:
    """Return the step that transformers would take: the configuration's own key, or else what it computes.

    Source: SwitchTransformersConfig.__post_init__, where unknown keys override what has been computed. Its edges are
    kept: no sparse layers gives a step of `num_layers`, more sparse layers than layers gives 0.
    """
    own = config.get(f"{stack}_sparse_step")
    if type(own) is int and own >= 0:
        return own
    num_sparse: int = config[f"num_sparse_{stack}_layers"]
    return layers // num_sparse if num_sparse > 0 else layers


def _built_sparse(layers: int, step: int) -> tuple[int, ...]:
    """Return the blocks that transformers builds with experts (SwitchTransformersStack.__init__)."""
    if step == 0:
        return ()
    return tuple(i for i in range(layers) if step == 1 or i % step == 1)


def _dense(repairs: _Repairs, sparse_blocks: Mapping[Stack, tuple[int, ...]], index: Index) -> dict[str, TensorSlice]:
    """Return the tensors that are no expert's, by their canonical names, each of them checked."""
    # A save of tied weights may keep any one of their three names.
    shared = next((name for name in (names.SHARED, *names.EMBEDDINGS) if name in index), None)
    if shared is None:
        raise index.missing(names.SHARED)
    if shared != names.SHARED:
        repairs.sentences.append(f"{shared} → {names.SHARED}: the embedding was saved under this name only")
    head = find_head(index, shared, repairs)
    stored_as = {names.SHARED: shared, names.HEAD: head}
    dense: dict[str, TensorSlice] = {}
    for name, shape in names.dense_tensors(repairs.config, sparse_blocks, tied=head is None):
        source = stored_as.get(name) or name
        if names.LINEAR_NAME.fullmatch(source) and index.require(source).dtype == "I8":
            dense[name] = check_int8(index, source, shape)
            check_rows(index, source)
        else:
            dense[name] = check_tensor(index, source, shape)
    if head is not None:
        # With an untied head transformers 5 lets the stacks have embeddings of their own, and saves them.
        for name in names.EMBEDDINGS:
            if name in index and index[name] != dense[names.SHARED]:
                dense[name] = check_tensor(index, name, dense[names.SHARED].shape)
    return dense


def find_head(index: Index, shared: str, repairs: _Repairs) -> str | None:
    """Return the name of the head's tensor, or None if the head is tied to the embedding, which is called `shared`.

    The configuration is repaired to say so. It matters beyond the matrix itself: with a tied head the decoder's output
    is scaled by d_model^-0.5.
    """
    says_tied = repairs.config.get(_TIE) is not False
    if names.HEAD not in index and names.DECODER_HEAD in index:
        repairs.sentences.append(f"{names.DECODER_HEAD} → {names.HEAD}: transformers knows the head by this name")
        repairs.change(_TIE, False, "the checkpoint has a head of its own")
        return names.DECODER_HEAD
    if names.HEAD not in index:
        if not says_tied:
            repairs.change(_TIE, True, "the checkpoint has no head of its own")
        repairs.config[_TIE] = True
        return None
    if says_tied and _same(index[names.HEAD], index[shared]):
        repairs.config[_TIE] = True
        return None
    repairs.change(_TIE, False, f"{names.HEAD} differs from {shared}")
    return names.HEAD


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
    places = [tensor.offset + last * number // (_SAMPLES - 1) for number in range(_SAMPLES)]
    with open_weights(tensor.file) as file:
        return [file.read(place, length) for place in places]
