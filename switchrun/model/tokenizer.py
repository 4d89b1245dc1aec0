"""The tokenizer of a checkpoint, or another one for those that carry none; texts to ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.errors import InputError, ModelError
from switchrun.model.sentinels import check_sentinels, sentinel

_FILES = ("tokenizer.json", "spiece.model")
_HINT = "use --tokenizer PATH|ID, for example google/switch-base-8"
#: No vocabulary has longer words by far; a text that is longer than this cannot fit.
_MAX_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text that can be filled, the ids of its tokens, the end mark included, and those of its sentinels, in order."""

    text: str
    ids: tuple[int, ...]
    sentinels: tuple[int, ...]


class Tokenizer:
    """Turns texts into ids and ids into texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, checkpoint: SwitchCheckpoint, source: str | None) -> Tokenizer:
        """Load a tokenizer from a folder or a Hub id; from the checkpoint's folder if no source is given.

        Raises:
            ModelError: There is no tokenizer, it cannot be loaded, or it does not fit the model.
        """
        if source is None and not any((checkpoint.path / name).is_file() for name in _FILES):
            raise ModelError(f"{checkpoint.path} has no tokenizer ({' or '.join(_FILES)})", _HINT)
        from transformers import AutoTokenizer

        place = source or str(checkpoint.path)
        name, _, revision = place.partition("@") if not Path(place).exists() else (place, "", "")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **({"revision": revision} if revision else {}))
        except Exception as error:  # huggingface_hub, tokenizers and sentencepiece each raise their own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"cannot load a tokenizer from {place}: {reason}", _HINT) from error
        loaded = cls(tokenizer)
        first, size = loaded.sentinel_id(0), checkpoint.config["vocab_size"]
        if first is None:
            raise ModelError(f"the tokenizer from {place} has no sentinel {sentinel(0)}", _HINT)
        if first >= size:
            raise ModelError(
                f"the tokenizer from {place} gives id {first} to {sentinel(0)}, the model's vocabulary has {size}",
                _HINT,
            )
        return loaded

    @property
    def eos_id(self) -> int | None:
        """The end mark, if it has one."""
        found: int | None = self._tokenizer.eos_token_id
        return found

    @property
    def pad_id(self) -> int:
        """What rows of a batch are filled up with; nothing looks at it."""
        return int(self._tokenizer.pad_token_id or 0)

    def sentinel_id(self, number: int) -> int | None:
        """Return the id of a sentinel; None if the vocabulary has not so many."""
        found = self._tokenizer.convert_tokens_to_ids(sentinel(number))
        return None if found is None or found == self._tokenizer.unk_token_id else int(found)

    def encode(self, text: str, most_tokens: int) -> Encoded:
        """Make a text ready for the model; see `Session.encode`. There is room for so many tokens."""
        sentinels = []
        for number in range(check_sentinels(text)):
            found = self.sentinel_id(number)
            if found is None:
                raise InputError(f"the vocabulary of this model has no {sentinel(number)}", "use fewer sentinels")
            sentinels.append(found)
        # A text that cannot fit is not tokenised: that takes memory which is not reserved.
        if len(text) > most_tokens * _MAX_CHARACTERS_PER_TOKEN:
            raise _too_long(f"{len(text)} characters", most_tokens)
        ids = self._tokenizer(text).input_ids
        if len(ids) > most_tokens:
            raise _too_long(f"{len(ids)} tokens", most_tokens)
        return Encoded(text, tuple(ids), tuple(sentinels))

    def plain_ids(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def stop_criteria(self, strings: Any) -> Any:
        """Return transformers' criteria to stop at texts; ModelError if it does not accept them."""
        from transformers import StopStringCriteria

        try:
            return StopStringCriteria(self._tokenizer, strings)
        except Exception as error:  # what strings may be wrong about, it finds out in many ways
            raise ModelError(f"transformers does not accept the model's stop_strings: {error}") from error

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of ids, with or without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))


def _too_long(length: str, most_tokens: int) -> InputError:
    return InputError(
        f"the text has {length}, there is memory for {most_tokens} tokens",
        "split it, or reserve more: --batch-size 4 does for twice as many tokens",
    )
