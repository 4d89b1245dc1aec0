"""Tokenizers that are not T5's own, or that somebody damaged or made with ill will."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from switchrun.errors import InputError, ModelError, SwitchrunError
from switchrun.model import tokenizer as tokenizer_module
from switchrun.model.tokenizer import Tokenizer
from tests.support.edits import edit_config
from tests.support.sessions import open_with_slots, small_process
from tests.support.tokenizers import (
    SHORT,
    TEXT,
    both,
    edit,
    edit_settings,
    edit_vocabulary,
    folder,
    like_t5,
    load,
    normalizer,
    original,
    template,
)

__all__ = ["folder", "original", "small_process"]
pytestmark = pytest.mark.usefixtures("small_process")


def legacy(folder: Path) -> None:
    """As transformers 4 saved it: special tokens in a file of their own, and added ones in another."""
    edit_settings(additional_special_tokens=..., unk_token=..., extra_ids=20)(folder)
    tokens = [f"<extra_id_{number}>" for number in range(20)]
    edit(folder / "special_tokens_map.json", additional_special_tokens=tokens, unk_token={"content": "<unk>"})
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    edit(folder / "added_tokens.json", **{vocabulary[100][0]: 100})


def padded(tokenizer: dict[str, Any]) -> None:
    tokenizer["padding"] = {
        "strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    tokenizer["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


AS_PLAIN: dict[str, Callable[[Path], Any]] = {
    "the general class": lambda _: None,
    "T5's class": like_t5,
    "T5's class by its old name": lambda folder: like_t5(folder, "T5TokenizerFast"),
    "no class": lambda folder: like_t5(folder, None),
    "the class in config.json": both(
        lambda folder: like_t5(folder, None), lambda f: edit_config(f, tokenizer_class="PreTrainedTokenizerFast")
    ),
    "no settings": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "an unknown class": edit_settings(tokenizer_class="OurOwnTokenizerFast"),
    "the old name of slow ones": edit_settings(tokenizer_class="PreTrainedTokenizer"),
    "code of its own beside a known model type": edit_settings(auto_map={"AutoTokenizer": ["tok.T", None]}),
    "files of transformers 4": legacy,
    "padding and truncation": edit_vocabulary(padded),
    "padding and truncation, T5's class": both(like_t5, edit_vocabulary(padded)),
    "sides and lengths": edit_settings(padding_side="left", truncation_side="left", model_max_length=3, max_length=3),
    "no mask": edit_settings(model_input_names=["input_ids"]),
    "other outputs": edit_settings(model_input_names=["token_type_ids"]),
    "no padding token": edit_settings(pad_token=...),
    "no end mark": both(edit_settings(eos_token=...), edit_vocabulary(lambda t: t.update(post_processor=None))),
    "sentinels in another order": edit_vocabulary(lambda t: t["added_tokens"].sort(key=lambda token: token["content"])),
    "no model type": lambda folder: edit_config(folder, remove=("model_type",)),
}


@pytest.mark.parametrize("change", AS_PLAIN.values(), ids=AS_PLAIN)
def test_ids_are_those_of_plain_transformers(change: Callable[[Path], Any], folder: Path) -> None:
    change(folder)
    plain = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ours = load(folder)
    assert type(ours._tokenizer) is type(plain)
    for text in (TEXT, "<extra_id_0>", "  The  [new] red cat, \u4e16 &<extra_id_0>", "<extra_id_0> " + "mat " * 400):
        ids = plain(text).input_ids
        assert list(ours.encode(text, 512).ids) == ids
        assert ours.decode(ids) == plain.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, special=True) == plain.decode(ids)
    assert ours.encode(TEXT, 512).sentinels == tuple(plain.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"]))


def test_batches_need_no_padding_token(folder: Path) -> None:
    texts = [TEXT, "a <extra_id_0>", "<extra_id_0> cat sat on the red mat"]
    with open_with_slots(folder, None) as session:
        expected = [result.output_ids for result in session.fill(texts, SHORT)]
    edit_settings(pad_token=...)(folder)
    with open_with_slots(folder, None, batch_size=3) as session:
        assert [result.output_ids for result in session.fill(texts, SHORT)] == expected


def add_tokens(folder: Path) -> None:
    plain = AutoTokenizer.from_pretrained(folder)
    plain.add_tokens(["[new]", "\x1b[31m"])
    plain.save_pretrained(folder)


def test_a_token_that_the_model_has_not_is_an_errors_of_its_text(folder: Path) -> None:
    add_tokens(folder)
    ours = load(folder)
    assert ours.encode(TEXT, 512).ids[-1] == 1
    for call in (lambda text: ours.encode(text, 512), ours.plain_ids):
        with pytest.raises(InputError, match=r"has the token '\[new\]' with id 128, the model's vocabulary has 128"):
            call("a [new] <extra_id_0>")
    with pytest.raises(InputError) as caught:
        ours.encode("a \x1b[31m <extra_id_0>", 512)
    assert "\x1b" not in str(caught.value)


def test_only_high_sentinels_lie_beyond_the_vocabulary(folder: Path) -> None:
    plain = AutoTokenizer.from_pretrained(folder)
    plain.add_tokens(["<extra_id_21>", "<extra_id_20>"], special_tokens=True)
    plain.save_pretrained(folder)
    text = "".join(f"<extra_id_{number}>" for number in range(21))
    assert plain(text).input_ids[20] >= 128
    ours = load(folder)
    assert ours.sentinel_id(19) is not None
    with pytest.raises(InputError, match="has no <extra_id_20>"):
        ours.encode(text, 512)


def test_an_unknown_character_without_an_unknown_token(folder: Path) -> None:
    edit_vocabulary(lambda t: t["model"].update(unk_id=None))(folder)
    ours = load(folder)
    assert ours.encode(TEXT, 512).ids
    with pytest.raises(InputError, match=r"the tokenizer does not take the text: .*unknown"):
        ours.encode("\u4e16 <extra_id_0>", 512)


def test_a_text_of_which_no_token_is_made(folder: Path) -> None:
    edit_vocabulary(lambda t: t.update(post_processor=None, added_tokens=[]))(folder)
    edit_settings(additional_special_tokens=[], pad_token=..., eos_token=..., unk_token=...)(folder)
    everything = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    edit_vocabulary(lambda t: t.update(normalizer=everything))(folder)
    with pytest.raises(InputError, match="makes no token of the text"):
        load(folder).encode("<extra_id_0>", 512)


def test_an_id_that_only_the_model_has(folder: Path) -> None:
    ours = load(folder)
    assert ours.decode([61, 90_000, 63]) == ours.decode([61, 63])


# --- Libraries that panic or do not end


def test_a_panic_while_loading(folder: Path) -> None:
    edit_vocabulary(normalizer({"type": "Precompiled", "precompiled_charsmap": ""}))(folder)
    with pytest.raises(
        ModelError, match=r"cannot load a tokenizer from .*: the tokenizers library panicked: Precompiled"
    ):
        load(folder)


def test_a_panic_while_reading_a_text(folder: Path) -> None:
    edit_vocabulary(template(1, 1))(folder)
    edit_vocabulary(lambda t: t["post_processor"].update(special_tokens={}))(folder)
    ours = load(folder)
    with pytest.raises(ModelError, match="cannot read a text: the tokenizers library panicked"):
        ours.encode(TEXT, 512)


class _Panic(BaseException):
    """As pyo3's."""


class _Library:
    """In the place of a tokenizer: does what it is told."""

    unk_token_id = eos_token_id = None

    def __init__(self, do: Callable[[], Any]) -> None:
        self._do = do

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return list(range(len(tokens)))

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self._do()

    decode = __call__


def _raise(error: BaseException) -> Callable[[], Any]:
    def do() -> Any:
        raise error

    return do


@pytest.mark.parametrize(
    ("do", "read", "written"),
    [
        (_raise(_Panic("first\nsecond")), "a text: the tokenizers library panicked: first", "panicked: first"),
        (_raise(SystemExit("bye")), "a text: the tokenizers library panicked: bye", "panicked: bye"),
        (lambda: time.sleep(5), "a text: it takes more than 0.2 s", "answer: it takes more than 0.2 s"),
        (_raise(ValueError("\x1b[31m")), r"does not take the text: \x1b[31m", r"answer: \x1b[31m"),
        (_raise(ValueError()), "does not take the text: ValueError", "answer: ValueError"),
    ],
)
def test_what_a_library_may_do(do: Callable[[], Any], read: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_MOST_SECONDS", 0.2)
    ours = Tokenizer(_Library(do), 128)
    with pytest.raises(SwitchrunError) as caught:
        ours.encode("<extra_id_0>", 512)
    assert read in caught.value.message
    assert type(caught.value) is (InputError if "does not take" in read else ModelError)
    with pytest.raises(ModelError) as caught:
        ours.decode([1])
    assert written in caught.value.message


def test_memory_that_runs_out_is_not_the_texts_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError):
        Tokenizer(_Library(_raise(MemoryError())), 128).encode("<extra_id_0>", 512)

    def no_thread(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    ours = Tokenizer(_Library(list), 128)
    monkeypatch.setattr("threading.Thread.start", no_thread)
    with pytest.raises(MemoryError, match="can't start new thread"):
        ours.encode("<extra_id_0>", 512)


# --- Tokenizers from elsewhere


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nope", "there is no folder '/nope', and it is not a Hub id"),
        ("m/tokenizer.json", "m/tokenizer.json is a file"),
        ("empty", "empty has no tokenizer (tokenizer.json or spiece.model)"),
    ],
)
def test_a_tokenizer_that_is_not_there(
    source: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty").mkdir()
    with pytest.raises(ModelError) as caught:
        load(folder, source)
    assert message in caught.value.message
    assert "--tokenizer PATH|ID" in caught.value.hint
