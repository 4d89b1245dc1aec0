"""Looks at the files of a tokenizer before a library does, for nobody vouches for them.

A library that loads them would wait for a FIFO, read a device without end, import what `tokenizer_class` names, or be
killed by the system: a word of a million letters overflows the stack of the tokenizers library (0.23), and rules that
each double a text take all memory. A check reads 2 MB of T5's in 0.03 s.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from switchrun.checkpoint.dialect import is_switch_config
from switchrun.checkpoint.hub import cached_snapshot
from switchrun.checkpoint.index import CONFIG
from switchrun.checkpoint.locate import hub_id, locate_settings
from switchrun.errors import ModelError, printable
from switchrun.machine.files import open_regular, read_regular
from switchrun.units import MIB

VOCABULARIES = ("tokenizer.json", "spiece.model")
HINT = "use --tokenizer PATH|ID, for example google/switch-base-8"

#: What transformers may read besides, in whatever class of its own.
_OTHERS = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
#: A vocabulary is read in the place of spiece.model where one of these lies.
_FOREIGN = ("tekken.json", "tiktoken.model", "tokenizer.model")
#: Settings that name files or take the place of files.
_FILE_SETTINGS = ("fast_tokenizer_files", "gguf_file", "init_inputs", "merges", "vocab")
_OF_A_TOKEN = frozenset({"__type", "content", "id", "lstrip", "normalized", "rstrip", "single_word", "special"})
#: T5's tokenizer.json has 2 MB, mT5's with 250,000 pieces 16 MB; other files have a few KB.
_MOST_BYTES = 32 * MIB
_MOST_SMALL_BYTES = 4 * MIB
#: In memory a value of a JSON file takes 100 bytes. mT5's has 800,000.
_MOST_VALUES = 3_000_000
_MOST_CHARACTERS = 1_000
#: The tokenizers library takes 330 bytes of memory for each place of its tree of pieces. Those of T5 take 100,000.
_MOST_PLACES = 1_000_000
_COUNTED_FROM_BYTES = MIB
#: T5's own files come to 36: Unicode's rules make 18 characters of one.
_MOST_GROWTH = 50
_MOST_ADDED = 1_000
#: To add so many takes transformers a second; it looks for each in a list of all.
_MOST_EXTRA = 10_000
#: A repeated group, or one that calls itself: where it does not fit, all ways to repeat it are tried.
_ENDLESS = re.compile(r"(?<!\\)\)[*+{]|\\g<")


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """What decides about the class of a tokenizer: `config.json`'s model type, and what both files call the class."""

    model_type: str | None
    class_name: str | None
    has_code: bool


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The files of a tokenizer, which were checked: in which folder, and what they say; `place` is the user's name."""

    place: str
    folder: Path
    settings: TokenizerSettings


def find_tokenizer(own: Path, source: str | None, folder: Path | None = None) -> TokenizerFiles:
    """Find a tokenizer's files and check them, without a library.

    Args:
        own: The checkpoint's folder.
        source: Where the user says that the tokenizer is, a folder or a Hub id; None is the checkpoint's own.
        folder: The folder of that, if it was located before.

    Raises:
        ModelError: There is no tokenizer, or a file of it is not what it may be.
        NetworkError: It is on the Hub, which could not be reached.
    """
    place = source or str(own)
    with _hint(place):
        folder = folder or (own if source is None else locate_settings(source))
        return TokenizerFiles(place, folder, check_files(folder))


def locate_tokenizer(model: str | None, source: str | None) -> Path | None:
    """Return the folder of the tokenizer that the user names, before the model is opened; None is the model's own.

    A model that says that it is a Switch model, and has no tokenizer, is refused here: to open it may take minutes. A
    few small files are fetched, if they are on the Hub and not on this machine.

    Raises:
        ModelError: There is no tokenizer, or no such model.
        NetworkError: The Hub could not be reached.
    """
    if source is not None:
        with _hint(source):
            folder = locate_settings(source)
            _vocabularies(folder)
        return folder
    found = hub_id(model)
    kept = None if found is None else cached_snapshot(*found)
    if kept is None or not _present(kept):
        own = locate_settings(model)
        if is_switch_config(own / CONFIG):
            with _hint(str(own)):
                _vocabularies(own)
    return None


@contextmanager
def _hint(place: str) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ModelError(error.message, HINT) from error
    except OSError as error:
        raise ModelError(f"{place} cannot be read: {error.strerror}", HINT) from error


def _present(folder: Path) -> list[str]:
    return [name for name in VOCABULARIES if (folder / name).exists()]


def _vocabularies(folder: Path) -> list[str]:
    present = _present(folder)
    if not present:
        raise ModelError(f"{folder} has no tokenizer ({' or '.join(VOCABULARIES)})")
    return present


def check_files(folder: Path) -> TokenizerSettings:
    """Check the files that make a tokenizer.

    Raises:
        ModelError: There are none, or one is no file, or too large, or asks for what is not done for a file.
    """
    present = _vocabularies(folder)
    others = [folder / name for name in _OTHERS]
    others += (folder / "additional_chat_templates").glob("*.jinja")
    for path in filter(Path.exists, others):
        _check_size(path)
    if "tokenizer.json" in present:
        _check_vocabulary(folder / "tokenizer.json")
    elif foreign := next((name for name in _FOREIGN if (folder / name).exists()), None):
        raise ModelError(f"{folder} has {foreign} besides spiece.model, and nothing says which one is right")
    else:
        _check_pieces_model(folder / "spiece.model")
    settings = _read_settings(folder / "tokenizer_config.json")
    if (folder / "special_tokens_map.json").exists():
        special = _json(folder / "special_tokens_map.json", _MOST_SMALL_BYTES)
        extra = special.pop("extra_special_tokens", None)  # a list of tokens, or a table of their names
        tokens = [*special.values(), *(extra if isinstance(extra, list) else ())]
        _check_tokens(folder / "special_tokens_map.json", tokens)
    config = _json(folder / "config.json", _MOST_SMALL_BYTES) if (folder / "config.json").exists() else {}
    return TokenizerSettings(
        _text(config.get("model_type")),
        _text(settings.get("tokenizer_class")) or _text(config.get("tokenizer_class")),
        bool(code.get("AutoTokenizer") if isinstance(code := settings.get("auto_map"), dict) else code),
    )


def tokenizer_content(folder: Path) -> str:
    """Return one hash of all files that may make a tokenizer.

    Raises:
        OSError: One cannot be read.
    """
    digest = hashlib.sha256()
    for name in sorted({*VOCABULARIES, *_OTHERS, "special_tokens_map.json", "tokenizer_config.json"}):
        if (folder / name).exists():
            content = read_regular(folder / name, _MOST_BYTES)
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _read_settings(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    settings = _json(path, _MOST_SMALL_BYTES)
    for key in _FILE_SETTINGS:
        if settings.get(key):
            raise ModelError(f"{path} has {key}: files that it names are not read", f"take {key} out of it")
    decoder = settings.get("added_tokens_decoder")
    _check_tokens(path, decoder.values() if isinstance(decoder, dict) else ())
    _check_tokens(path, (each for each in _rules(settings) if each.get("__type") == "AddedToken"))
    for key in ("extra_ids", "extra_special_tokens", "additional_special_tokens"):
        value = settings.get(key)
        count = len(value) if isinstance(value, list | dict) else value
        if isinstance(count, int) and count > _MOST_EXTRA:
            raise ModelError(f"{path} asks for {count} {key}, {_MOST_EXTRA} are the most")
    return settings


def _check_vocabulary(path: Path) -> None:
    """Check a tokenizer.json: the length of its pieces, and by how much its rules can lengthen a text."""
    tokenizer = _json(path, _MOST_BYTES)
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    pieces = list(vocabulary) if isinstance(vocabulary, dict) else [each[0] for each in _lists(vocabulary) if each]
    pieces += [each.get("content") for each in added if isinstance(each, dict)] if isinstance(added, list) else []
    _check_pieces(path, [piece for piece in pieces if isinstance(piece, str)])
    _check_tokens(path, added if isinstance(added, list) else ())
    growth = 1.0
    for rule in _rules([tokenizer.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]):
        growth *= max(1.0, _growth(rule))
        pattern = rule.get("Regex")
        if isinstance(pattern, str) and _ENDLESS.search(pattern):
            raise ModelError(
                f"{path} has a regular expression that may take for ever: {printable(pattern, 60)}",
                "write it without a repeated group",
            )
    _check_growth(path, growth)
    for rule in _rules([tokenizer.get("post_processor")]):
        if _added(rule) > _MOST_ADDED:
            raise ModelError(f"{path} adds {_added(rule)} tokens to each text, {_MOST_ADDED} are the most")


def _check_pieces_model(path: Path) -> None:
    messages: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    model = messages.ModelProto()
    try:
        model.ParseFromString(_read(path, _MOST_BYTES))
    except ModelError:
        raise
    except Exception as error:  # protobuf's own kinds
        raise ModelError(f"{path} is not a SentencePiece model: {error}") from error
    _check_pieces(path, [each.piece for each in model.pieces])
    _check_growth(path, _charsmap_growth(model.normalizer_spec.precompiled_charsmap))


def _check_pieces(path: Path, pieces: list[str]) -> None:
    longest = max(pieces, key=len, default="")
    if len(longest) > _MOST_CHARACTERS:
        raise ModelError(f"{path} has a piece of {len(longest)} characters, {_MOST_CHARACTERS} are the most")
    words = [piece.encode("utf-8", "surrogatepass") for piece in pieces]
    if sum(map(len, words)) < _COUNTED_FROM_BYTES:
        return
    words.sort()
    places, before = 0, b""
    for word in words:
        places += len(word) - len(os.path.commonprefix([before, word]))  # noqa: RUF071 - these are no paths
        before = word
    if places > _MOST_PLACES:
        raise ModelError(f"{path} has pieces that take {places} places in memory, {_MOST_PLACES} are the most")


def _check_tokens(path: Path, tokens: Iterable[Any]) -> None:
    """Refuse what an added token has not: the tokenizers library would print its name, on stdout."""
    for token in tokens:
        unknown = next((key for key in token if key not in _OF_A_TOKEN), None) if isinstance(token, dict) else None
        if unknown is not None:
            raise ModelError(f"{path} has '{printable(unknown, 60)}' in an added token, which none has", "take it out")


def _check_growth(path: Path, growth: float) -> None:
    if growth > _MOST_GROWTH:
        raise ModelError(f"{path} can make a text {growth:.3g} times longer, {_MOST_GROWTH} times is the most")


def _rules(steps: Any) -> Iterator[dict[str, Any]]:
    waiting = [steps]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            yield step
        waiting += step.values() if isinstance(step, dict) else step if isinstance(step, list) else ()


def _growth(rule: Mapping[str, Any]) -> float:
    """Return how many times longer a rule can make a text; the library knows rules by their keys, too."""
    match rule:
        case {"pattern": {"String": str(pattern)}, "content": str(content)} if pattern:
            return len(content) / len(pattern)
        case {"pattern": _, "content": str(content)}:  # a regular expression may match the empty text
            return len(content) + 1
        case {"prepend": str(start)}:
            return len(start) + 1
        case {"precompiled_charsmap": str(charsmap)}:
            try:
                return _charsmap_growth(base64.b64decode(charsmap))
            except ValueError:
                return 1  # the library will say so
    return 1


def _charsmap_growth(charsmap: bytes) -> float:
    """Return the length of the longest text that stands for one character: texts lie behind a tree, with its size."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max((len(text.decode("utf-8", "ignore")) for text in texts.split(b"\0")), default=0)


def _added(rule: Mapping[str, Any]) -> int:
    match rule:
        case {"single": list(parts), "special_tokens": dict(tokens)}:
            ids = (token.get("ids") for token in tokens.values() if isinstance(token, dict))
            return len(parts) * max((len(each) for each in ids if isinstance(each, list)), default=1)
    return 0


def _json(path: Path, most_bytes: int) -> dict[str, Any]:
    data = _read(path, most_bytes)
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > _MOST_VALUES:
        raise ModelError(f"{path} has {values} values, {_MOST_VALUES} are the most")
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not a JSON object")
    return found


def _read(path: Path, most_bytes: int) -> bytes:
    try:
        return read_regular(path, most_bytes)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _check_size(path: Path) -> None:
    try:
        file = open_regular(path)
        try:
            size = os.fstat(file).st_size
        finally:
            os.close(file)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if size > _MOST_BYTES:
        raise ModelError(f"{path} has {size} bytes, {_MOST_BYTES} are the most")


def _lists(values: Any) -> Iterable[list[Any]]:
    return (each for each in values if isinstance(each, list)) if isinstance(values, list) else ()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
