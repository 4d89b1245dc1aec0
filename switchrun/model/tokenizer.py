"""The tokenizer of a checkpoint, or another one for those that carry none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.errors import ModelError
from switchrun.model.sentinels import sentinel

_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
_HINT = "use --tokenizer PATH|ID, for example google/switch-base-8"


def load_tokenizer(checkpoint: SwitchCheckpoint, source: str | None) -> Any:
    """Load a tokenizer.

    Args:
        checkpoint: Its folder is looked in if no source is given.
        source: A folder or a Hub id.

    Returns:
        A transformers tokenizer, with `<extra_id_0>` among its tokens.

    Raises:
        ModelError: There is no tokenizer, it cannot be loaded, or it does not fit the model.
    """
    if source is None and not any((checkpoint.path / name).is_file() for name in _FILES[:2]):
        raise ModelError(f"{checkpoint.path} has no tokenizer ({' or '.join(_FILES[:2])})", _HINT)
    place = source or str(checkpoint.path)
    name, _, revision = place.partition("@") if not Path(place).exists() else (place, "", "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **({"revision": revision} if revision else {}))
    except Exception as error:  # huggingface_hub, tokenizers and sentencepiece each raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot load a tokenizer from {place}: {reason}", _HINT) from error
    first = tokenizer.convert_tokens_to_ids(sentinel(0))
    if first is None or first == tokenizer.unk_token_id:
        raise ModelError(f"the tokenizer from {place} has no sentinel {sentinel(0)}", _HINT)
    if first >= checkpoint.config["vocab_size"]:
        raise ModelError(
            f"the tokenizer from {place} gives id {first} to {sentinel(0)}, "
            f"the model's vocabulary has {checkpoint.config['vocab_size']}",
            _HINT,
        )
    return tokenizer
