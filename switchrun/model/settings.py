"""A checkpoint's settings as transformers takes them, tried on a model of a few numbers before a weight is read.

What transformers does not accept, it often refuses only at work. So the trial generates some tokens, with the same code
and the same settings; it takes some hundredths of a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from switchrun.checkpoint.generation import KEPT, generation_file
from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.errors import ModelError, printable

#: All of `SwitchTransformersConfig` that the model computes with, or that transformers cannot do without. The rest of a
#: config.json chooses implementations, caches or the form of outputs, is about training, or is somebody else's.
CONFIG_KEYS = frozenset({
    "bos_token_id", "d_ff", "d_kv", "d_model", "decoder_sparse_step", "decoder_start_token_id", "dense_act_fn",
    "dropout_rate", "encoder_sparse_step", "eos_token_id", "expert_capacity", "is_encoder_decoder",
    "layer_norm_epsilon", "num_decoder_layers", "num_experts", "num_heads", "num_layers",
    "num_sparse_decoder_layers", "num_sparse_encoder_layers", "pad_token_id", "relative_attention_max_distance",
    "relative_attention_num_buckets", "router_bias", "router_dtype", "router_ignore_padding_tokens",
    "router_jitter_noise", "tie_word_embeddings", "vocab_size",
})  # fmt: skip
_SMALLEST = {
    "d_ff": 1, "d_kv": 1, "d_model": 1, "decoder_sparse_step": 1, "encoder_sparse_step": 1, "num_decoder_layers": 1,
    "num_experts": 1, "num_heads": 1, "num_layers": 1, "num_sparse_decoder_layers": 1, "num_sparse_encoder_layers": 1,
}  # fmt: skip
_TRIAL_TOKENS = 4
#: What nobody objects to.
_PLAIN = {"decoder_start_token_id": 0, "eos_token_id": 1}


def model_config(checkpoint: SwitchCheckpoint, **changes: int) -> Any:
    """Return a `SwitchTransformersConfig`, changed; ModelError if transformers does not accept config.json."""
    settings = {key: value for key, value in checkpoint.config.items() if key in CONFIG_KEYS}
    try:
        config = SwitchTransformersConfig.from_dict(settings | changes)
        if config.dense_act_fn not in ACT2FN or any(True for _ in ACT2FN[config.dense_act_fn].parameters()):
            raise ValueError(f"there is no activation function '{config.dense_act_fn}' (dense_act_fn)")
        if config.relative_attention_max_distance <= config.relative_attention_num_buckets // 2:
            # Of the decoder's buckets half are for a distance each. transformers fails once a text is longer than that.
            raise ValueError("relative_attention_max_distance must be more than half of relative_attention_num_buckets")
    except Exception as error:  # transformers raises many kinds for a value that it does not like
        raise _refusal(checkpoint.path / "config.json", error) from error
    return config


def generation_config(checkpoint: SwitchCheckpoint) -> GenerationConfig:
    """Return a checkpoint's own generation settings as far as no options of ours decide.

    The strings to stop at are left out: they want a tokenizer.

    Raises:
        ModelError: transformers does not accept them.
    """
    try:
        return _generation({name: value for name, value in checkpoint.generation.items() if name in KEPT})
    except Exception as error:  # as above
        raise _refusal(generation_file(checkpoint.path), error) from error


def check_settings(checkpoint: SwitchCheckpoint, *, beams: bool = False, sample: bool = False) -> None:
    """Let transformers generate with a checkpoint's settings, in the way that is wanted.

    Raises:
        ModelError: It cannot, or does not accept them in the first place.
    """
    model_config(checkpoint)
    generation = generation_config(checkpoint)
    config = model_config(checkpoint, **_SMALLEST)
    reason = _trial(config, generation, beams, sample)
    if reason is not None:
        at_work = _trial(config, _generation(_PLAIN), beams, sample)
        file = generation_file(checkpoint.path) if at_work is None else checkpoint.path / "config.json"
        raise _refusal(file, reason)


def _generation(settings: Mapping[str, Any]) -> GenerationConfig:
    make: Any = GenerationConfig
    # Rows are cut where they end, so any token may fill them up, if only there is an embedding for it.
    made: GenerationConfig = make(**{**settings, "stop_strings": None, "pad_token_id": 0})
    return made


def _trial(config: Any, generation: GenerationConfig, beams: bool, sample: bool) -> Exception | None:
    """Return what is wrong with settings; None if nothing is."""
    try:
        with no_init_weights():
            model: Any = SwitchTransformersForConditionalGeneration(config)
        model.eval().generation_config = generation
        with torch.no_grad(), torch.random.fork_rng(()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trial is shorter than some settings want
            for weight in model.parameters():
                weight.fill_(1)
            ids = torch.zeros(1, 2, dtype=torch.long)
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_TRIAL_TOKENS,
                num_beams=2 if beams else 1,
                do_sample=sample,
            )
    except MemoryError:
        raise
    except Exception as error:  # as above, and what torch makes of it
        return error
    return None


def _refusal(file: Path, error: Exception) -> ModelError:
    reason = printable(" ".join(str(error).split()), 300) or type(error).__name__
    return ModelError(f"transformers does not accept {file}: {reason}")
