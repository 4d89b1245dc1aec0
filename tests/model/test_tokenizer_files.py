"""Files of a tokenizer that somebody damaged or made with ill will: what is looked at before a library gets them."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from switchrun import Session
from switchrun.errors import ModelError, SwitchrunError
from switchrun.model import tokenizer_files
from switchrun.model.session import open_session
from switchrun.planning.options import OpenOptions
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import open_with_slots, small_process
from tests.support.tokenizers import (
    SHORT,
    TEXT,
    Change,
    edit,
    edit_settings,
    edit_vocabulary,
    folder,
    load,
    normalizer,
    original,
    template,
)

__all__ = ["folder", "original", "small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "spiece.model",
    "additional_chat_templates/x.jinja",
)


# --- Before a model is opened


def missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def damaged(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize("named", [False, True], ids=["its own", "named"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(missing, "has no tokenizer (tokenizer.json or spiece.model)"), (damaged, "tokenizer.json is not valid JSON: ")],
)
def test_what_is_no_tokenizer_is_reported_before_torch_is_imported(
    damage: Callable[[Path], None], message: str, named: bool, folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    damage(other if named else folder)
    options = OpenOptions(model=folder, tokenizer=str(other) if named else None)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        open_session(options, import_libraries=lambda _plan: pytest.fail("the libraries were imported"))
    assert caught.value.hint == "use --tokenizer PATH|ID, for example google/switch-base-8"


def test_a_folder_that_is_no_model_is_not_asked_for_a_tokenizer(folder: Path) -> None:
    missing(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model.safetensors").unlink()
    with pytest.raises(SwitchrunError, match="there are no weights"):
        Session.open(folder)


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
