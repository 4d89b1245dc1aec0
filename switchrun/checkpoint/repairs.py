"""A configuration that is being repaired, with a sentence for everything that was wrong in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchrun.errors import CorruptCheckpointError

#: transformers' own values for what a config.json leaves out (SwitchTransformersConfig, 5.23).
_DEFAULTS = {
    "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_heads": 12, "expert_capacity": 64,
    "num_experts": 8, "num_layers": 12, "num_decoder_layers": 12, "relative_attention_num_buckets": 32,
    "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3,
}  # fmt: skip
#: What may be zero: transformers takes it for "one sparse block, or none".
_MAY_BE_ZERO = frozenset({"num_sparse_encoder_layers", "num_sparse_decoder_layers"})


class Repairs:
    """A copy of `config.json` and what was changed in it.

    Attributes:
        config: The configuration so far.
        sentences: What was wrong, one sentence each.
    """

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

    def note(self, sentence: str) -> None:
        """Report a repair of something other than the configuration."""
        self.sentences.append(sentence)
