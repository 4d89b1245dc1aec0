"""The tokenizer of a checkpoint, or another one for those that carry none; texts to ids and back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.errors import InputError, ModelError, printable
from switchrun.model.sentinels import NUM_SENTINELS, Filling, check_sentinels, sentinel
from switchrun.model.tokenizer_files import HINT, TokenizerFiles, TokenizerSettings

#: No vocabulary has longer words by far; a text that is longer than this cannot fit.
_MAX_CHARACTERS_PER_TOKEN = 64
#: T5's reads a text in 0.001 s, and loads in 1; eight times as large are mT5's.
_MOST_SECONDS = 10.0
_MOST_LOADING_SECONDS = 30.0
_T5 = "T5Tokenizer"

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A text, and the ids of its tokens, the end mark included."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Encoded(EncodedText):
    """A text that can be filled, with the ids of its sentinels, in order.

    `closing` is the id of the sentinel that ends an answer, if the vocabulary has it.
    """

    sentinels: tuple[int, ...]
    closing: int | None = None


@dataclass(frozen=True, slots=True)
class EncodedFilling:
    """A filling that can be scored: its text, and the answer that it is, as ids with the end mark."""

    text: Encoded
    spans: tuple[str, ...]
    target: tuple[int, ...]


class Tokenizer:
    """Turns texts into ids that the model has, and ids into texts.

    Attributes:
        eos_id: The end mark, if there is one.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        """Take a library's tokenizer, for a model whose ids are below `vocabulary`."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        found = tokenizer.convert_tokens_to_ids([sentinel(number) for number in range(NUM_SENTINELS)])
        self._sentinels = [None if each == tokenizer.unk_token_id else each for each in found]
        eos: int | None = tokenizer.eos_token_id
        self.eos_id = eos if eos is not None and eos < vocabulary else None

    @classmethod
    def load(cls, checkpoint: SwitchCheckpoint, files: TokenizerFiles) -> Tokenizer:
        """Load a tokenizer for a checkpoint from files that `find_tokenizer` found.

        Raises:
            ModelError: It cannot be loaded, or it does not fit the model.
        """
        place, size = files.place, checkpoint.config["vocab_size"]
        load = _loader(files.folder, files.settings)
        try:
            loaded = _apart(lambda: cls(load(), size), _MOST_LOADING_SECONDS)
        except _LibraryError as error:
            raise ModelError(f"cannot load a tokenizer from {place}: {error}", HINT) from error
        first = loaded._sentinels[0]
        if first is None:
            raise ModelError(f"the tokenizer from {place} has no sentinel {sentinel(0)}", HINT)
        if first >= size:
            raise ModelError(
                f"the tokenizer from {place} gives id {first} to {sentinel(0)}, the model's vocabulary has {size}",
                HINT,
            )
        return loaded

    def sentinel_id(self, number: int) -> int | None:
        """Return the id of a sentinel; None if the vocabulary has not so many."""
        found = self._sentinels[number] if number < NUM_SENTINELS else None
        return None if found is None or found >= self._vocabulary else found

    def encode(self, text: str, most_tokens: int) -> Encoded:
        """Make a text ready for the model; see `Session.encode`. There is room for so many tokens."""
        sentinels = []
        for number in range(check_sentinels(text)):
            found = self.sentinel_id(number)
            if found is None:
                raise InputError(f"the vocabulary of this model has no {sentinel(number)}", "use fewer sentinels")
            sentinels.append(found)
        ids = self._fitting_ids(text, most_tokens)
        return Encoded(text, ids, tuple(sentinels), self.sentinel_id(len(sentinels)))

    def encode_text(self, text: str, prefix: str, most_tokens: int) -> EncodedText:
        """Make any text ready for the model, with a prefix before it; see `Session.encode_text`."""
        return EncodedText(text, self._fitting_ids(prefix + text, most_tokens))

    def _fitting_ids(self, text: str, most_tokens: int) -> tuple[int, ...]:
        # A text that cannot fit is not tokenised: that takes memory which is not reserved.
        if len(text) > most_tokens * _MAX_CHARACTERS_PER_TOKEN:
            raise _too_long(f"{len(text)} characters", most_tokens)
        ids = self._ids(text)
        if len(ids) > most_tokens:
            raise _too_long(f"{len(ids)} tokens", most_tokens)
        return tuple(ids)

    def encode_filling(self, filling: Filling, most_tokens: int) -> EncodedFilling:
        """Make a filling ready for the model; see `Session.encode_filling`. Its text may have so many tokens."""
        text = self.encode(filling.text, most_tokens)
        target = filling.target(closed=text.closing is not None)
        if len(target) > most_tokens * _MAX_CHARACTERS_PER_TOKEN:
            raise InputError(f"the spans have {len(target)} characters, too many for the memory", "score shorter ones")
        return EncodedFilling(text, tuple(filling.spans), tuple(self._ids(target)))

    def plain_ids(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens; errors are those of `encode`."""
        return self._ids(text, special=False)

    def stop_criteria(self, strings: Any) -> Any:
        """Return transformers' criteria to stop at texts; ModelError if it does not accept them."""
        from transformers import StopStringCriteria

        try:
            return _apart(lambda: StopStringCriteria(self._tokenizer, strings), _MOST_LOADING_SECONDS)
        except _LibraryError as error:
            raise ModelError(f"transformers does not accept the model's stop_strings: {error}") from error

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of ids, with or without special tokens; of an id that the tokenizer lacks, nothing.

        Raises:
            ModelError: The tokenizer fails.
        """
        try:
            return str(_apart(lambda: self._tokenizer.decode(list(ids), skip_special_tokens=not special)))
        except _LibraryError as error:
            raise ModelError(f"the tokenizer cannot write the model's answer: {error}", HINT) from error

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Return what the tokenizer calls tokens; one that it lacks has no name. Errors are those of `decode`."""
        try:
            found = _apart(lambda: self._tokenizer.convert_ids_to_tokens(list(ids)))
        except _LibraryError as error:
            raise ModelError(f"the tokenizer cannot name the model's tokens: {error}", HINT) from error
        return tuple("" if piece is None else str(piece) for piece in found)

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        """Return a text's ids: all of them, and no padding, whatever the tokenizer's own settings say."""
        settings = {"add_special_tokens": special, "padding": False, "truncation": False}

        def read() -> tuple[list[int], int | None, str]:
            ids = self._tokenizer(text, return_attention_mask=False, **settings).input_ids
            wrong = next((each for each in ids if each >= self._vocabulary), None)
            return ids, wrong, "" if wrong is None else str(self._tokenizer.convert_ids_to_tokens(wrong))

        try:
            ids, wrong, token = _apart(read)
        except _LibraryError as error:
            if error.of_file:
                raise ModelError(f"the tokenizer cannot read a text: {error}", HINT) from error
            raise InputError(f"the tokenizer does not take the text: {error}", "write it in other words") from error
        if special and not ids:
            raise InputError("the tokenizer makes no token of the text", "write it in other words")
        if wrong is not None:
            raise InputError(
                f"the text has the token '{printable(token, 100)}' with id {wrong}, "
                f"the model's vocabulary has {self._vocabulary}",
                "leave it out, or use the tokenizer that the model was trained with",
            )
        return ids


def _too_long(length: str, most_tokens: int) -> InputError:
    return InputError(
        f"the text has {length}, there is memory for {most_tokens} tokens",
        "split it, or reserve more with a larger --batch-size",
    )


def _loader(folder: Path, settings: TokenizerSettings) -> Callable[[], Any]:
    """Return what loads a tokenizer of the class that plain transformers takes, if that needs no code of the folder's.

    transformers would load a class by any name that it has: `AutoModel` or `RagTokenizer`, too, which run such code.
    """
    from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast, SwitchTransformersConfig
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    like_t5 = TOKENIZER_MAPPING_NAMES.get(settings.model_type or "") == _T5
    if settings.has_code and not like_t5:
        raise ModelError(f"the tokenizer in {folder} is code of its own (auto_map), which switchrun never runs", HINT)
    name = settings.class_name or _T5
    found = tokenizer_class_from_name(name)
    known = found is None or (isinstance(found, type) and issubclass(found, PreTrainedTokenizerFast))
    if not known and name != "PreTrainedTokenizer":  # for which it takes the fast one
        raise ModelError(f"{folder} asks for the tokenizer class {name}, which is not supported", HINT)
    # No other file says what class it is, and none of its values is looked at.
    config: Any = SwitchTransformersConfig() if like_t5 else PreTrainedConfig()
    config.tokenizer_class = settings.class_name
    return lambda: AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, local_files_only=True)


class _LibraryError(Exception):
    """What a library says that failed; `of_file` if no text is to blame, for it panicked or did not end."""

    def __init__(self, reason: str, *, of_file: bool) -> None:
        super().__init__(reason)
        self.of_file = of_file


def _apart(call: Callable[[], _Result], most_seconds: float | None = None) -> _Result:
    """Call a library in a thread of its own: of files that nobody vouches for, it may panic, or not end.

    One that does not end is left alone, and ends with the process.

    Raises:
        _LibraryError: The library failed.
        MemoryError: There is too little memory.
    """
    found: list[_Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:  # a panic of Rust is none of Exception
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise MemoryError(str(error)) from error
    most_seconds = most_seconds or _MOST_SECONDS
    thread.join(most_seconds)
    if found:
        return found[0]
    if not failed:
        raise _LibraryError(f"it takes more than {most_seconds:g} s", of_file=True)
    cause = failed[0]
    if isinstance(cause, MemoryError):
        raise cause
    # tokenizers, sentencepiece and transformers each raise their own; the first line says it.
    reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
    panicked = not isinstance(cause, Exception)
    raise _LibraryError(
        f"the tokenizers library panicked: {reason}" if panicked else reason, of_file=panicked
    ) from cause
