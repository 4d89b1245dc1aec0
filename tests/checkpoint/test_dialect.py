"""From raw tensors to a Switch model: what transformers would build of it is the oracle."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.types import ExpertKey
from switchrun.errors import ModelError
from tests.support.checkpoints import oracle_state, random_model, read_tensor, save_checkpoint, tiny_config
from tests.support.edits import edit, edit_config
from tests.support.strategies import CheckpointSpec, checkpoint_specs


def check_against(spec: CheckpointSpec, folder: Path) -> None:
    model = spec.model()
    spec.save(model, folder)
    checkpoint = open_checkpoint(str(folder), cache_dir=folder / "cache")
    state = oracle_state(model)
    if spec.dialect == "copied-head":
        state["lm_head.weight"] = state["shared.weight"]
    found = {name: read_tensor(where) for name, where in checkpoint.dense.items()}
    for (stack, block, expert), slices in checkpoint.experts.items():
        prefix = f"{stack}.block.{block}.layer.{1 if stack == 'encoder' else 2}.mlp.experts.expert_{expert}"
        found |= {f"{prefix}.wi.weight": read_tensor(slices.wi), f"{prefix}.wo.weight": read_tensor(slices.wo)}
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    # Plain transformers, given the repaired configuration, builds a model with just these weights.
    config = SwitchTransformersConfig.from_dict(dict(checkpoint.config))
    with torch.device("meta"):
        built = SwitchTransformersForConditionalGeneration(config)
    if spec.dialect != "own-embeddings":
        built.encoder.embed_tokens = built.decoder.embed_tokens = built.shared
    assert {n: t.shape for n, t in oracle_state(built).items()} == {n: t.shape for n, t in oracle_state(model).items()}
    assert config.tie_word_embeddings == spec.tied
    assert checkpoint.stored_dtype == {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[spec.dtype]
    assert checkpoint.num_experts == spec.experts
    assert checkpoint.total_bytes == sum(t.nbytes for t in state.values())
    assert bool(checkpoint.repairs) == (spec.dialect in ("hub-switch-c", "alias-embedding"))


@settings(max_examples=25, deadline=None)
@given(spec=checkpoint_specs(max_experts=12))
def test_every_checkpoint_opens_as_its_model(spec: CheckpointSpec) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_against(spec, Path(folder))


def test_64_experts(tmp_path: Path) -> None:
    check_against(CheckpointSpec(container="torch", sharded=True, experts=64), tmp_path)


@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_switch_c_as_it_lies_on_the_hub(tmp_path: Path, container: str) -> None:
    config = tiny_config(
        num_layers=15, num_decoder_layers=15, num_sparse_encoder_layers=15, num_sparse_decoder_layers=15, num_experts=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = random_model(config, dtype=torch.bfloat16)
    folder = save_checkpoint(model, tmp_path / "m", container=container, sharded=True, dialect="hub-switch-c")
    edit_config(folder, num_decoder_layers=12)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.repairs == (
        "num_decoder_layers 12 → 15: the checkpoint has 15 decoder blocks",
        "decoder.lm_head.weight → lm_head.weight: transformers knows the head by this name",
        "tie_word_embeddings → false: the checkpoint has a head of its own",
    )
    assert checkpoint.sparse_blocks == {"encoder": tuple(range(15)), "decoder": tuple(range(15))}
    assert len(checkpoint.experts) == 60
    # 7 and 12 dense tensors a block; two position biases, two final norms, the embedding and the head.
    assert len(checkpoint.dense) == 15 * (7 + 12) + 6
    assert checkpoint.config["dtype"] == "bfloat16"
    expected = {"architectures": ["SwitchTransformersForConditionalGeneration"], "decoder_start_token_id": 0}
    assert expected.items() <= checkpoint.config.items()
    wi, wo = checkpoint.experts[ExpertKey("decoder", 14, 1)]
    assert wi.file != wo.file


def test_experts_are_a_mapping(folder: Path) -> None:
    experts = open_checkpoint(str(folder)).experts
    assert list(experts) == [ExpertKey(s, 1, n) for s in ("encoder", "decoder") for n in range(4)]  # type: ignore[arg-type]
    assert ExpertKey("encoder", 1, 3) in experts
    for absent in (("encoder", 1, 4), ("encoder", 0, 0), ("encoder", 1, -1), ("encoder", 1), 7):
        assert absent not in experts
    with pytest.raises(KeyError):
        experts[ExpertKey("encoder", 1, 4)]


# The head


def test_a_head_that_is_stored_counts_and_config_json_says_whether_it_is_tied(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" in checkpoint.dense
    assert checkpoint.repairs == ()
    edit_config(folder, remove=("tie_word_embeddings",))
    assert open_checkpoint(str(folder)).config["tie_word_embeddings"] is True


def test_a_copied_head_stays(tmp_path: Path) -> None:
    """To find out that it is a copy, all of both would have to be read."""
    folder = save_checkpoint(random_model(tiny_config()), tmp_path / "m", dialect="copied-head")
    for tied in (True, False):
        edit_config(folder, tie_word_embeddings=tied)
        checkpoint = open_checkpoint(str(folder))
        assert "lm_head.weight" in checkpoint.dense
        assert checkpoint.repairs == ()


def test_a_head_in_the_embedding_s_own_place_is_the_embedding(tmp_path: Path) -> None:
    """torch.save keeps all names of a tied embedding, in one storage."""
    folder = save_checkpoint(random_model(tiny_config()), tmp_path / "m", container="torch")
    assert "lm_head.weight" in torch.load(folder / "pytorch_model.bin")
    assert not {"lm_head.weight", "encoder.embed_tokens.weight"} & open_checkpoint(str(folder)).dense.keys()


def test_no_head_is_a_tied_head(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.repairs == ("tie_word_embeddings false → true: the checkpoint has no head of its own",)


# Geometry


def test_counts_are_taken_from_the_tensors(folder: Path) -> None:
    edit_config(folder, num_layers=7, num_decoder_layers=1, num_experts=9)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config["num_layers"] == checkpoint.config["num_decoder_layers"] == 2
    assert checkpoint.num_experts == 4
    assert len(checkpoint.repairs) == 3
    assert "num_experts 9 → 4: the checkpoint has 4 experts in a sparse block" in checkpoint.repairs


@pytest.mark.parametrize(("layers", "sparse"), [(1, 1), (1, 2), (2, 0), (2, 3), (3, 2), (4, 1), (5, 2), (5, 7), (6, 4)])
def test_every_pattern_that_transformers_builds(tmp_path: Path, layers: int, sparse: int) -> None:
    config = tiny_config(num_layers=layers, num_sparse_encoder_layers=sparse, num_experts=2)
    model = random_model(config)
    expected = tuple(i for i, block in enumerate(model.encoder.block) if block.is_sparse)
    folder = save_checkpoint(model, tmp_path / "m")
    right = open_checkpoint(str(folder))
    assert (right.sparse_blocks["encoder"], right.repairs) == (expected, ())
    edit_config(folder, encoder_sparse_step=0 if expected else 1, num_sparse_encoder_layers=1)
    wrong = open_checkpoint(str(folder))
    assert wrong.repairs
    rebuilt = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig.from_dict(dict(wrong.config)))
    assert tuple(i for i, block in enumerate(rebuilt.encoder.block) if block.is_sparse) == expected


def test_irregular_pattern(tmp_path: Path) -> None:
    config = tiny_config(num_layers=4, num_sparse_encoder_layers=4)
    folder = save_checkpoint(random_model(config), tmp_path / "m")
    dense = "encoder.block.2.layer.1.mlp."

    def make_dense(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(dense)]:
            del tensors[name]
        tensors |= {dense + "wi.weight": torch.zeros(32, 16), dense + "wo.weight": torch.zeros(16, 32)}

    edit(folder, make_dense)
    with pytest.raises(ModelError, match="experts in encoder blocks 0, 1, 3 of 4, which is not supported"):
        open_checkpoint(str(folder))


def test_router_bias_is_taken_from_the_tensors(tmp_path: Path) -> None:
    folder = save_checkpoint(random_model(tiny_config(router_bias=True)), tmp_path / "m")
    edit_config(folder, router_bias=False)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config["router_bias"] is True
    assert "encoder.block.1.layer.1.mlp.router.classifier.bias" in checkpoint.dense
    assert len(checkpoint.repairs) == 1


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("name", "stored"),
    [("bfloat16", "BF16"), ("float16", "F16"), ("float64", "F32"), ("float32", "F32"), (None, "F32")],
)
def test_the_dtype_is_what_config_json_says(folder: Path, key: str, name: str | None, stored: str) -> None:
    edit_config(folder, ("dtype",))
    edit_config(folder, **{key: name})
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.plain_dtype, checkpoint.stored_dtype) == (stored, "F32")
    assert "torch_dtype" not in checkpoint.config
    assert checkpoint.repairs == ()


@pytest.mark.parametrize("value", ["int8", "auto", 16, ["float32"], {}])
def test_a_dtype_that_is_none(folder: Path, value: object) -> None:
    edit_config(folder, dtype=value)
    with pytest.raises(ModelError, match=r"config\.json: dtype is "):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("experts", "rest", "plain"),
    [("BF16", "F32", "F32"), ("F32", "BF16", "F32"), ("BF16", "BF16", "BF16"), ("BF16", "F16", "F32")],
)
def test_auto_loses_no_stored_bit(folder: Path, experts: str, rest: str, plain: str) -> None:
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtypes[experts if ".experts." in name else rest])

    edit(folder, change)
    edit_config(folder, remove=("dtype",))
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.plain_dtype, checkpoint.stored_dtype) == (plain, experts)


def test_other_names_of_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    names = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
    values: dict[str, object] = {other: config[name] for other, name in names.items()}
    edit_config(folder, tuple(names.values()), **values)
    assert open_checkpoint(str(folder)).config["d_model"] == config["d_model"]


def test_a_minimal_config(folder: Path) -> None:
    needed = ("d_model", "d_kv", "d_ff", "num_heads", "vocab_size", "relative_attention_num_buckets", "num_layers")
    kept = {key: json.loads((folder / "config.json").read_text())[key] for key in needed}
    (folder / "config.json").write_text(json.dumps(kept))
    checkpoint = open_checkpoint(str(folder))
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    assert tokens.items() <= checkpoint.config.items()
    config = SwitchTransformersConfig.from_dict(dict(checkpoint.config))
    aliases = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    built = SwitchTransformersForConditionalGeneration(config).state_dict().keys() - aliases
    assert built - {"lm_head.weight"} == load_file(folder / "model.safetensors").keys() - {"lm_head.weight"}
