"""Turns what lies in a folder into a Switch model: canonical names, and a configuration that is true.

Everything is decided from the tensors, never from a model's name: google/switch-c-2048 has five things wrong or
missing in its configuration, and its copies elsewhere have other names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from switchrun.checkpoint import names
from switchrun.checkpoint.experts import Experts, check_int8, check_tensor, gated
from switchrun.checkpoint.files import MOST_CONFIG_BYTES, read_json_object
from switchrun.checkpoint.generation import generation_settings
from switchrun.checkpoint.index import CONFIG
from switchrun.checkpoint.locate import Location
from switchrun.checkpoint.qmoe import QmoeExperts
from switchrun.checkpoint.types import Index, Stack, SwitchCheckpoint, TensorSlice
from switchrun.dtypes import WEIGHT_DTYPES
from switchrun.errors import CorruptCheckpointError, ModelError, printable
from switchrun.units import format_count

_MODEL_TYPE = "switch_transformers"
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
#: What transformers calls the same settings too (SwitchTransformersConfig.attribute_map); it prefers these names.
_ALIASES = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
#: What a config.json may say that weights are to be computed in. There is no 64 bit here: 32 are nearest to it.
_CONFIG_DTYPES = {"float64": "F32"} | {torch_name: stored for stored, torch_name in WEIGHT_DTYPES.items()}


def understand(location: Location, index: Index) -> SwitchCheckpoint:
    """Make a Switch checkpoint of a folder's tensors, all of which are checked, and its `config.json`.

    Raises:
        ModelError: It is no Switch model, or of a kind that is not supported.
        CorruptCheckpointError: A tensor is missing or wrong, or config.json is damaged.
    """
    config_path = location.path / CONFIG
    own = read_json_object(config_path, MOST_CONFIG_BYTES)
    config = own | {_ALIASES[name]: value for name, value in own.items() if name in _ALIASES}
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
    packed = index.places is not None
    experts = (QmoeExperts if packed else Experts)(index, sparse_blocks, repairs.config)
    forms = experts.check()
    stored = _widest(matrix.dtype for form, _ in forms for matrix in form)
    if any(tensor.dtype == "I8" for tensor in dense.values()):
        stored = "I8"
    if packed:
        plain = "BF16"  # as its codes' values
    elif stored == "I8":
        plain = dense[names.SHARED].dtype  # In transformers' 8 bit models it shows what the rest is computed in.
    else:
        plain = _widest((stored, *(each.dtype for each in dense.values())))
    plain = _configured_dtype(config_path, repairs.config) or plain
    repairs.config["dtype"] = WEIGHT_DTYPES[plain]
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
        stored_dtype=stored,
        plain_dtype=plain,
        expert_forms=forms,
        generation=generation_settings(location.path, own, repairs.config),
        experts_total_bytes=experts.total_bytes,
        hub=location.remote,
    )


def is_switch_config(path: Path) -> bool:
    """Whether a `config.json` says that it is a Switch model's; its tensors may say otherwise."""
    try:
        config = read_json_object(path, MOST_CONFIG_BYTES)
    except CorruptCheckpointError:
        return False
    model_type = config.get("model_type")
    return model_type == _MODEL_TYPE or (model_type is None and "num_experts" in config)


def _widest(dtypes: Iterable[str]) -> str:
    """Return the dtype that loses no bit of any of them; int8 is no matter of bits, and counts before all others."""
    found = set(dtypes)
    return "I8" if "I8" in found else found.pop() if len(found) == 1 else "F32"


def _configured_dtype(path: Path, config: Mapping[str, Any]) -> str | None:
    """Return in what config.json has weights computed; None if it does not say."""
    name = config.get("dtype")
    if name is None:
        return None
    if not isinstance(name, str) or name not in _CONFIG_DTYPES:
        raise ModelError(
            f"{path}: dtype is {printable(name, 50)}, which no model can be computed in",
            f"remove it there, or make it one of {', '.join(WEIGHT_DTYPES.values())}",
        )
    return _CONFIG_DTYPES[name]


class _Survey:
    """What the names show: blocks, sparse blocks, experts, and marks of other formats."""

    def __init__(self, index: Index) -> None:
        self.blocks: dict[Stack, set[int]] = {"encoder": set(), "decoder": set()}
        self.sparse: dict[Stack, set[int]] = {"encoder": set(), "decoder": set()}
        self.num_experts = 0
        self.has_experts = index.places is not None and len(index.places.nbytes) > 0
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
                self.gated = self.gated or names.GATED_NAME.search(name) is not None

    def _add_sparse(self, match: re.Match[str]) -> None:
        stack, block, layer = cast(Stack, match[1]), int(match[2]), int(match[3])
        if layer == names.mlp_layer(stack):
            self.blocks[stack].add(block)
            self.sparse[stack].add(block)


def _refuse_others(config: Mapping[str, Any], survey: _Survey, model: str) -> None:
    model_type = config.get("model_type")
    if not (model_type in (None, _MODEL_TYPE) or survey.has_experts or survey.gated):
        raise ModelError(f"{model} is not a Switch Transformers model (model_type {printable(model_type, 50)})")
    activation = str(config.get("dense_act_fn"))
    if survey.gated or config.get("is_gated_act") is True or activation.startswith("gated"):
        raise gated(model)
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
            old = self.config.pop("torch_dtype")
            self.config["dtype"] = old if self.config.get("dtype") is None else self.config["dtype"]
        self._given = frozenset(self.config)
        if self.config.get("num_decoder_layers", 0) is None:  # transformers: as many as the encoder has
            self.config["num_decoder_layers"] = self.config.get("num_layers", _DEFAULTS["num_layers"])
        for key, default in _DEFAULTS.items():
            value = self.config.setdefault(key, default)
            # Beyond 64 bits even to print a product of two can fail.
            if type(value) is not int or not (0 if key in _MAY_BE_ZERO else 1) <= value < 1 << 64:
                wanted = "a positive whole number of up to 64 bits"
                raise CorruptCheckpointError(f"{path}: {key} is {printable(value, 50)}, not {wanted}")

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
        shown = f" {printable(json.dumps(old), 100)}" if key in self._given else ""
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
    stored_as = _embeddings(index, repairs)
    dense: dict[str, TensorSlice] = {}
    for name, shape in names.dense_tensors(repairs.config, sparse_blocks, tied=names.HEAD not in stored_as):
        source = stored_as.get(name, name)
        if names.LINEAR_NAME.fullmatch(name) and index.require(source).dtype == "I8" and index.places is None:
            dense[name] = check_int8(index, source, shape)
        else:
            dense[name] = check_tensor(index, source, shape)
    for name in stored_as.keys() & set(names.EMBEDDINGS):
        dense[name] = check_tensor(index, name, dense[names.SHARED].shape)
    return dense


def _embeddings(index: Index, repairs: _Repairs) -> dict[str, str]:
    """Return by what names the embedding is stored, and the embeddings of one stack and the head if they are others.

    As transformers loads them: whatever is stored counts, and what is not is the first of those that are. Only what
    lies at the very same place is the same: to compare 270 MB of switch-c at each start would take longer than to keep
    both. That the head is tied, as config.json has it, is about more than the matrix: the decoder's output is scaled by
    d_model^-0.5 then.
    """
    says_tied = repairs.config.get(_TIE) is not False
    head = next((name for name in (names.HEAD, names.DECODER_HEAD) if name in index), None)
    embeddings = [name for name in (names.SHARED, *names.EMBEDDINGS) if name in index]
    if names.HEAD in index and says_tied:
        embeddings.append(names.HEAD)
    if not embeddings:
        raise index.missing(names.SHARED)
    first = embeddings[0]
    if first != names.SHARED:
        repairs.sentences.append(f"{first} → {names.SHARED}: the embedding was saved under this name only")
    if head is None and not says_tied:
        repairs.change(_TIE, True, "the checkpoint has no head of its own")
    elif head == names.DECODER_HEAD and index[head] != index[first]:
        repairs.sentences.append(f"{head} → {names.HEAD}: transformers knows the head by this name")
        repairs.change(_TIE, False, "the checkpoint has a head of its own")
    repairs.fill(**{_TIE: True})
    others = {name: name for name in names.EMBEDDINGS if name in index} | ({names.HEAD: head} if head else {})
    return {names.SHARED: first} | {name: source for name, source in others.items() if index[source] != index[first]}
