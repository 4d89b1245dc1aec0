"""A checkpoint's own generation settings: every field of transformers' `GenerationConfig`, sorted by what it does here.

transformers takes them from `generation_config.json` alone, or from `config.json` if there is no such file. What old
ones of the latter have under `task_specific_params` only its pipelines look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchrun.checkpoint.files import MOST_CONFIG_BYTES, read_json_object
from switchrun.errors import ModelError, UsageError, check_count, printable

if TYPE_CHECKING:
    from switchrun.checkpoint.types import SwitchCheckpoint

FILE = "generation_config.json"

#: They change logits, or when to stop: transformers' `generate` gets them as they are.
KEPT = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "eos_token_id", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_time",
    "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "remove_invalid_values", "renormalize_logits",
    "repetition_penalty", "sequence_bias", "stop_strings", "suppress_tokens", "top_h", "typical_p",
    "watermarking_config",
})  # fmt: skip

#: `GenerationOptions` decide. `own_options` takes from here what is not given, for `generate`; `fill` does not look.
OPTIONAL = frozenset({"do_sample", "max_length", "max_new_tokens", "num_beams", "temperature", "top_k", "top_p"})

#: They have no say here.
DROPPED = frozenset({
    # Caches and speed, which change no token.
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "cache_config", "cache_implementation", "compile_config", "continuous_batching_config", "disable_compile",
    "low_memory", "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "prefill_chunk_size", "prompt_lookup_num_tokens", "speculation_type", "target_lookbehind", "use_cache", "use_mtp",
    # The form of the output. Rows are cut where they end, whatever fills them up.
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "pad_token_id", "return_dict_in_generate",
    # Nothing without beam groups, and what transformers notes for itself.
    "diversity_penalty", "_from_model_config", "transformers_version",
})  # fmt: skip

#: Nobody here can do as they say, unless they are absent, null or one of these values.
REFUSED: Mapping[str, tuple[object, ...]] = {
    "constraints": (),
    "dola_layers": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "is_assistant": (False,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
}


#: Whole numbers beyond these have transformers 5.24 take all memory that there is: for so many lists, and for a power.
_LARGEST = {"encoder_no_repeat_ngram_size": 10_000, "length_penalty": 10_000}


def generation_settings(folder: Path, own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint sets of `KEPT` and of `OPTIONAL`; the latter's values are not looked at yet.

    `own` is `config.json` as it is, `config` the repaired one. If no token to start with is set, transformers could not
    generate at all; then the repaired one has the special tokens that are missing.

    Raises:
        ModelError: Something of `REFUSED` would have an effect, or a number is absurd.
        CorruptCheckpointError: `generation_config.json` is damaged.
    """
    path = generation_file(folder)
    found = read_json_object(path, MOST_CONFIG_BYTES) if path.name == FILE else own
    for name, harmless in REFUSED.items():
        value = found.get(name)
        if value is not None and value not in harmless:
            raise ModelError(
                f"{path}: {name} is {printable(value, 100)}, which is not supported",
                "remove it there to generate without it",
            )
    for name, largest in _LARGEST.items():
        value = found.get(name)
        if isinstance(value, int) and value > largest:
            raise ModelError(f"{path}: {name} is {printable(value, 100)}, more than {largest}, the most that works")
    settings = {name: found[name] for name in sorted(KEPT | OPTIONAL) if found.get(name) is not None}
    if not {"decoder_start_token_id", "bos_token_id"} & settings.keys():
        settings = {name: config[name] for name in ("decoder_start_token_id", "eos_token_id")} | settings
    return settings


def own_options(checkpoint: SwitchCheckpoint, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `GenerationOptions`: as given, where that is not None, else as the checkpoint says.

    Where that says nothing either, they are transformers' defaults, except for 64 new tokens: its 20 cut most answers
    off. A value of the checkpoint that is not needed is not looked at.

    Raises:
        ModelError: A length, a number of beams or `do_sample` makes no sense.
    """
    own = checkpoint.generation
    found = {name: value for name, value in given.items() if value is not None}

    def count(name: str, least: int = 1) -> int:
        try:
            check_count(name, own[name], least)
        except UsageError as error:
            flag = "num-beams" if name == "num_beams" else "max-new-tokens"
            raise ModelError(f"{generation_file(checkpoint.path)}: {error.message}", f"use --{flag}") from error
        return int(own[name])

    if "num_beams" not in found:
        found["num_beams"] = count("num_beams") if "num_beams" in own else 1
    if "max_new_tokens" not in found:
        if "max_new_tokens" in own:
            found["max_new_tokens"] = count("max_new_tokens")
        else:
            # The length counts the token to start with.
            found["max_new_tokens"] = count("max_length", 2) - 1 if "max_length" in own else 64
    sample = found.setdefault("sample", own.get("do_sample", False))
    if not isinstance(sample, bool):
        raise ModelError(
            f"{generation_file(checkpoint.path)}: do_sample: {printable(repr(sample), 100)} is neither true nor false",
            "use --sample or --no-sample",
        )
    if sample:
        found = {name: own[name] for name in ("temperature", "top_p") if name in own} | found
        found.setdefault("top_k", own.get("top_k", 50))
    return found


def generation_file(folder: Path) -> Path:
    """Return the file that a checkpoint's settings are in."""
    return folder / (FILE if (folder / FILE).exists() else "config.json")


def end_token(config: Mapping[str, Any]) -> int:
    """Return the token that ends a sequence, the first if there are several; T5's own if config.json names none."""
    eos, size = config.get("eos_token_id"), config["vocab_size"]
    ids = eos if isinstance(eos, list) else [eos]
    return next((each for each in ids if type(each) is int and each in range(size)), 1)
