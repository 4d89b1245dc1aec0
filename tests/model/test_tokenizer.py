"""Tokenizers that are not T5's own, or that somebody damaged or made with ill will."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from switchrun.checkpoint import open_checkpoint
from switchrun.errors import InputError, ModelError, SwitchrunError
from switchrun.model import tokenizer as tokenizer_module
from switchrun.model import tokenizer_files
from switchrun.model.records import GenerationOptions
from switchrun.model.tokenizer import Tokenizer
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.edits import edit_config
from tests.support.sessions import open_with_slots, small_process

__all__ = ["small_process"]

pytestmark = pytest.mark.usefixtures("small_process")

TEXT = "the man <extra_id_0> walks into a bar with <extra_id_1>."
SHORT = GenerationOptions(max_new_tokens=6)
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "spiece.model",
    "additional_chat_templates/x.jinja",
)

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(random_model(tiny_config()), tmp_path_factory.mktemp("original") / "m")
    return save_tiny_tokenizer(folder)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "m"))


def load(folder: Path, source: str | None = None) -> Tokenizer:
    return Tokenizer.load(open_checkpoint(str(folder)), source)


def edit(path: Path, change: Change | None = None, **values: Any) -> None:
    """Change a JSON file; a value of ... removes its key."""
    record = json.loads(path.read_text()) if path.exists() else {}
    if change is not None:
        change(record)
    record = {key: value for key, value in (record | values).items() if value is not ...}
    path.write_text(json.dumps(record))


def edit_vocabulary(change: Change) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer.json", change)


def edit_settings(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer_config.json", **values)


def like_t5(folder: Path, name: str | None = "T5Tokenizer") -> None:
    settings = {} if name is None else {"tokenizer_class": name}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_ids": 20}))


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


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change_all(folder: Path) -> None:
        for change in changes:
            change(folder)

    return change_all


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


# --- Code, classes and other files


@pytest.mark.parametrize("model_type", ["switch_transformers", "other", "gpt2", None])
def test_code_of_a_checkpoint_never_runs(
    model_type: str | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by every settings file, also where transformers knows no class of its own; nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with open_with_slots(folder, None) as session:
        expected = session.fill([TEXT], SHORT)[0].output_ids
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import *\nclass T(PreTrainedTokenizerFast): pass\n"
    for name in ("tok.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM"), "tok.T")
    edit(folder / "config.json", model_type=model_type or ..., auto_map=auto_map, custom_generate="custom_generate")
    edit(folder / "generation_config.json", auto_map=auto_map, custom_generate=str(folder / "custom_generate"))
    edit_settings(auto_map={"AutoTokenizer": ["tok.T", "tok.T"]}, tokenizer_class="T")(folder)
    if model_type != "switch_transformers":
        with pytest.raises(ModelError, match=r"code of its own \(auto_map\), which switchrun never runs"):
            open_with_slots(folder, None)
        edit_settings(auto_map=...)(folder)
    with open_with_slots(folder, None) as session:
        assert session.fill([TEXT], SHORT)[0].output_ids == expected
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["AutoTokenizer", "AutoModel", "AutoProcessor", "RagTokenizer", "pipeline", "ByT5Tokenizer", "Trainer"]
)
def test_a_class_that_is_no_tokenizer_of_a_file(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers loads by any name: `AutoTokenizer` would then ask whether code may run, whatever was said before."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    (folder / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(folder / "config.json", model_type="other", auto_map={"AutoConfig": "tok.C", "AutoModel": "tok.M"})
    edit_settings(tokenizer_class=name)(folder)
    with pytest.raises(ModelError, match=f"asks for the tokenizer class {name}, which is not supported"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_value_of_config_json_is_not_the_tokenizers_fault(folder: Path) -> None:
    edit(folder / "config.json", layer_norm_epsilon=[], dropout_rate="x", id2label=3)
    assert load(folder).encode(TEXT, 512).ids


@pytest.mark.parametrize("key", ["gguf_file", "vocab", "merges", "fast_tokenizer_files", "init_inputs"])
def test_settings_name_no_files(key: str, folder: Path) -> None:
    edit_settings(**{key: ["/dev/zero"]})(folder)
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json has {key}"):
        load(folder)
    edit_settings(**{key: []})(folder)
    assert load(folder).encode(TEXT, 512).ids


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)


@pytest.mark.parametrize("make", [fifo, device, endless, Path.mkdir])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_or_has_no_end(name: str, make: Callable[[Path], None], folder: Path) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make(path)
    with pytest.raises(
        ModelError, match=r"(cannot be read: it (is a FIFO|is a device|is a folder|has \d+ bytes))|has \d"
    ):
        load(folder)
    if name == "tokenizer.json":
        return
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert load(folder).encode(TEXT, 512).ids


def test_a_fifo_in_a_folder_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    elsewhere = save_tiny_tokenizer(tmp_path / "elsewhere")
    os.mkfifo(elsewhere / "config.json")
    with pytest.raises(ModelError, match=r"config\.json cannot be read: it is a FIFO"):
        load(folder, str(elsewhere))


# --- What a file can do to memory and time


def charsmap(*texts: bytes) -> str:
    return base64.b64encode(b"\4\0\0\0\0\0\0\0" + b"\0".join(texts)).decode()


def normalizer(*rules: dict[str, Any]) -> Change:
    return lambda t: t.update(normalizer={"type": "Sequence", "normalizers": list(rules)})


def template(parts: int, ids: int) -> Change:
    token = {"id": "</s>", "ids": [1] * ids, "tokens": ["</s>"] * ids}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, *[{"SpecialToken": {"id": "</s>", "type_id": 0}}] * parts]
    post = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"</s>": token}}
    return lambda t: t.update(post_processor=post)


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BOMBS: dict[str, tuple[Change, str]] = {
    "a long piece": (lambda t: t["model"]["vocab"].append(["b" * 1_000_000, -3.0]), "a piece of 1000000 characters"),
    "a long added token": (lambda t: t["added_tokens"][3].update(content="b" * 2000), "a piece of 2000 characters"),
    "doubling": (normalizer(*[DOUBLE] * 40), r"can make a text 1\.1e\+12 times longer"),
    "without a name": (normalizer({"pattern": {"String": "a"}, "content": "a" * 99}), "a text 99 times longer"),
    "by a pattern": (normalizer({**DOUBLE, "pattern": {"Regex": "a?"}, "content": "b" * 99}), "100 times longer"),
    "at the start": (normalizer({"type": "Prepend", "prepend": "b" * 99}), "100 times longer"),
    "by a table": (
        normalizer({"type": "Precompiled", "precompiled_charsmap": charsmap(b"x", b"y" * 70)}),
        "70 times longer",
    ),
    "answers": (lambda t: t.update(decoder={"type": "Sequence", "decoders": [DOUBLE] * 9}), "512 times longer"),
    "a repeated group": (
        lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}),
        r"a regular expression that may take for ever: \(a\+\)\+\$",
    ),
    "many parts": (template(2000, 1), "adds 2001 tokens to each text"),
    "long parts": (template(50, 50), "adds 2550 tokens to each text"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BOMBS.values(), ids=BOMBS)
def test_what_takes_all_memory_or_for_ever(change: Change, message: str, folder: Path) -> None:
    edit_vocabulary(change)(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "tokenizer.json" in caught.value.message


def test_what_ordinary_files_have_is_taken(folder: Path) -> None:
    """T5's, XLM-R's and GPT-2's own rules."""
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    edit_vocabulary(normalizer({"type": "NFKD"}, spaces, {"type": "Prepend", "prepend": " "}))(folder)
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    edit_vocabulary(lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split]}))(folder)
    edit_vocabulary(lambda t: t["model"]["vocab"].append(["b" * 1000, -3.0]))(folder)
    assert load(folder).encode(TEXT, 512).ids


def test_many_pieces_are_counted_by_the_memory_that_they_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "_COUNTED_FROM_BYTES", 100)
    edit_vocabulary(lambda t: t["model"]["vocab"].extend([["bbbb", -1.0], ["bbbbc", -1.0]]))(folder)
    places = len({word[:end] for word in _pieces(folder) for end in range(1, len(word) + 1)})
    monkeypatch.setattr(tokenizer_files, "_MOST_PLACES", places)
    load(folder)
    monkeypatch.setattr(tokenizer_files, "_MOST_PLACES", places - 1)
    with pytest.raises(ModelError, match=f"take {places} places in memory"):
        load(folder)


def _pieces(folder: Path) -> list[bytes]:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pieces = [piece for piece, _ in tokenizer["model"]["vocab"]]
    return [piece.encode() for piece in [*pieces, *(token["content"] for token in tokenizer["added_tokens"])]]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("[" * 200_000, "is not valid JSON: maximum recursion"),
        ('{"a":' * 5_000, "is not valid JSON: maximum recursion"),
        ("[" + "{}," * 3_000_000 + "{}]", r"values, 3000000 are the most|has \d+ bytes"),
        ("[]", "is not a JSON object"),
        (f'{{"a": {"9" * 5000}}}', "is not valid JSON"),
        ('"\xff', "is not valid JSON"),
    ],
)
def test_json_that_is_none(name: str, text: str, message: str, folder: Path) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert name in caught.value.message
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    ("key", "value"), [("extra_ids", 10**9), ("extra_special_tokens", ["x"] * 10**5), ("extra_ids", 10**40)]
)
def test_more_special_tokens_than_there_is_memory_or_time_for(key: str, value: Any, folder: Path) -> None:
    edit_settings(tokenizer_class="T5Tokenizer", **{key: value})(folder)
    with pytest.raises(ModelError, match=rf"asks for 1\d* {key}, 10000 are the most"):
        load(folder)


def test_a_sentencepiece_model_that_is_none(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match=r"spiece\.model is not a SentencePiece model"):
        load(folder)
    (folder / "tekken.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has tekken\.json besides spiece\.model"):
        load(folder)


def test_a_sentencepiece_model_is_looked_through_too(folder: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    (folder / "tokenizer.json").unlink()
    for piece, table, message in (("x" * 2000, b"", "2000 characters"), ("x", b"\0" * 4 + b"y" * 70, "70 times")):
        model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        model.pieces.add(piece=piece, score=0.0)
        model.normalizer_spec.precompiled_charsmap = table
        (folder / "spiece.model").write_bytes(model.SerializeToString())
        with pytest.raises(ModelError, match=message):
            load(folder)


def in_decoder(folder: Path, **values: Any) -> None:
    edit_settings(added_tokens_decoder={"0": {"content": "<pad>", "special": True, **values}})(folder)


def in_named_token(folder: Path, **values: Any) -> None:
    edit_settings(unk_token={"__type": "AddedToken", "content": "<unk>", "special": True, **values})(folder)


def in_special_map(folder: Path, **values: Any) -> None:
    names = {"image_token": "<pad>"}
    edit(folder / "special_tokens_map.json", unk_token={"content": "<unk>", **values}, extra_special_tokens=names)


def in_special_list(folder: Path, **values: Any) -> None:
    edit(folder / "special_tokens_map.json", extra_special_tokens=[{"content": "<pad>", **values}])


def in_vocabulary(folder: Path, **values: Any) -> None:
    edit_vocabulary(lambda t: t["added_tokens"][0].update(values))(folder)


@pytest.mark.parametrize("place", [in_decoder, in_named_token, in_special_map, in_special_list, in_vocabulary])
def test_nothing_is_printed_for_a_file(
    place: Callable[..., None], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tokenizers library prints names that it does not know in an added token, from Rust and on stdout."""
    place(folder, lstrip=False)
    assert load(folder).encode(TEXT, 512).ids
    place(folder, **{"\x1b[31m": 1})
    with pytest.raises(ModelError, match=r"has '\\x1b\[31m' in an added token, which none has"):
        load(folder)
    assert capfd.readouterr().out == ""


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
