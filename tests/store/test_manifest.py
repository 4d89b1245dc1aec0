"""A folder that belongs to something else is refused, with the command that mends it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from switchrun.errors import CorruptCheckpointError
from switchrun.store import clear_store, store_folder, verify_store
from switchrun.store.layout import int8_layout
from tests.store.conftest import MODEL, data_of, holds, key, open_store

OTHERS = {
    "fingerprint": ({"fingerprint": "f2"}, "the checkpoint has changed"),
    "layout": ({"layout": int8_layout(65, 33)}, "another layout"),
}
EDITS = {
    "version": (lambda record: record | {"version": 4}, "format 4, this switchrun has format 3"),
    "old layout": (lambda record: {"version": 0}, "format 0, this switchrun has format 3"),
    "nf4 in tiles": (lambda record: record | {"version": 2}, "format 2, this switchrun has format 3"),
    "model": (lambda record: record | {"model": "google/other"}, "another model, google/other"),
    "dtype": (lambda record: record | {"dtype": "nf4"}, "another dtype"),
    "no fingerprint": (lambda record: {k: v for k, v in record.items() if k != "fingerprint"}, "cannot be used"),
    "null fingerprint": (lambda record: record | {"fingerprint": None}, "cannot be used"),
    "version as text": (lambda record: record | {"version": "2"}, "cannot be used"),
    "version as a truth": (lambda record: record | {"version": True}, "its version is none"),
    "negative version": (lambda record: record | {"version": -1}, "its version is none"),
    "long version": (lambda record: record | {"version": 10**4000}, "its version is none"),
    "layout of text": (lambda record: record | {"layout": "wi"}, "cannot be used"),
    "a list": (lambda record: [record], "cannot be used"),
}


def refusal(offload: Path, **options: object) -> CorruptCheckpointError:
    with pytest.raises(CorruptCheckpointError) as refused:
        open_store(offload, **options)
    assert refused.value.exit_code == 7
    return refused.value


def check_refused_until_cleared(offload: Path, options: dict[str, object], words: str) -> None:
    folder = store_folder(offload, MODEL, "int8")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for read_only in (False, True):
        error = refusal(offload, read_only=read_only, **options)
        assert words in error.message
        assert str(folder) in error.message
        command = shlex.split(error.hint.split("`")[1])
        assert command[:3] == ["switchrun", "offload", "clear"]
        assert dict(zip(command[3::2], command[4::2], strict=True)) == {
            "--model": MODEL, "--dtype": "int8", "--offload-folder": str(offload),
        }  # fmt: skip
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    clear_store(folder)
    store = open_store(offload, **options)
    assert store.find(key(3)) is None
    assert store.write(key(3), data_of(3, store.layout))


@pytest.mark.parametrize("name", OTHERS)
def test_another_state_is_refused(offload, name):
    open_store(offload).write(key(3), data_of(3))
    check_refused_until_cleared(offload, *OTHERS[name])


@pytest.mark.parametrize("name", EDITS)
def test_another_manifest_is_refused(offload, name):
    open_store(offload).write(key(3), data_of(3))
    path = store_folder(offload, MODEL, "int8") / "manifest.json"
    edit, words = EDITS[name]
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    check_refused_until_cleared(offload, {}, words)


@pytest.mark.parametrize(
    "layout",
    [
        None,
        {},
        [],
        {"wi.weight": ["I8", [3]]},
        [["wi.weight", "I8"]],
        [["wi.weight", "I8", 3]],
        [["wi.weight", "I8", [-3]]],
        [["wi.weight", "I8", [True]]],
        [["wi.weight", "I8", [3.0]]],
        [["wi.weight", "I8", ["3"]]],
        [["wi.weight", "I8", [1 << 62, 1 << 62]]],
        [["wi.weight", "I8", [10**400]]],
        [["wi.weight", "I8", [1] * 200]],
        [["wi.weight", "I8", [1 << 62]], ["wo.weight", "F32", [1 << 62]]],
        [["wi.weight", "X9", [3]]],
        [["wi.weight", ["I8"], [3]]],
        [[3, "I8", [3]]],
        [["padding.1", "I8", [3]]],
        [["wi.weight", "I8", [3]]] * 2,
        [["a", "I8", [1]]] * 3_000,
    ],
    ids=lambda layout: str(layout)[:40],
)
def test_a_layout_that_cannot_be_is_refused(offload, layout):
    open_store(offload)
    path = store_folder(offload, MODEL, "int8") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": layout}))
    check_refused_until_cleared(offload, {}, "cannot be used")


def test_names_in_a_manifest_may_be_anything(offload):
    """They are shown without their control codes, and used for nothing."""
    store = open_store(offload)
    path = store.folder / "manifest.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"layout": [["\x1b[31m\ud800__metadata__", "I8", [3]]]}))
    assert "another layout" in refusal(offload).message
    assert verify_store(store.folder).experts == 0
    path.write_text(json.dumps(record | {"model": "\x1b]0;x\x07" + "m" * 5000}))
    message = refusal(offload).message
    assert "another model, \\x1b]0;x\\x07mmm" in message
    assert len(message) < 600


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[" * 60_000, b"1" * 60_000])
def test_a_damaged_manifest_is_refused(offload, damage):
    open_store(offload)
    (store_folder(offload, MODEL, "int8") / "manifest.json").write_bytes(damage)
    check_refused_until_cleared(offload, {}, "cannot be used")


def test_the_command_leaves_out_what_is_the_default(tmp_path):
    open_store(tmp_path / "offload", model="/models/it's mine")
    hint = refusal(Path("offload"), model="/models/it's mine", fingerprint="f2").hint  # the tests run in tmp_path
    assert shlex.split(hint.split("`")[1]) == (
        ["switchrun", "offload", "clear", "--model", "/models/it's mine", "--dtype", "int8"]
    )


def test_the_same_again_is_welcome(offload):
    open_store(offload).write(key(3), data_of(3))
    assert holds(open_store(offload), 3)
    assert holds(open_store(offload, read_only=True), 3)


def test_models_and_dtypes_do_not_meet(offload):
    options = [{}, {"model": "other/switch-base-8"}, {"dtype": "nf4"}]
    for number, option in enumerate(options):
        store = open_store(offload, **option)
        assert store.find(key(3)) is None
        store.write(key(3), data_of(number))
    assert [open_store(offload, **option).verify(key(3), data_of(n)) for n, option in enumerate(options)] == [True] * 3


IDS = (
    "google/switch-c-2048", "other/switch-c-2048", "google-switch-c-2048", "/srv/models/switch-c-2048",
    "/srv/models/switch-c-2048/", "..", "../..", "/", "", ".", ".hidden", "a/../../b", "a b", "a-b", "a\0b", "ä" * 300,
    "x" * 5000, "\udcff", "C:\\models", "-rf",
)  # fmt: skip


def test_folders_of_models_are_safe_and_differ(offload):
    offload.mkdir()
    folders = [store_folder(offload, model, "int8") for model in IDS]
    for folder in folders:
        assert folder.name == "int8"
        assert folder.parent.parent == offload
        assert not folder.parent.name.startswith((".", "-"))
        folder.mkdir(parents=True)  # fails if it is there already, or no filesystem takes the name
    assert len(list(offload.iterdir())) == len(IDS)
    assert folders[0].parent.name.startswith("switch-c-2048-")


@pytest.mark.parametrize("dtype", ["", "..", "int8/x", "INT8"])
def test_a_dtype_is_a_word(offload, dtype):
    with pytest.raises(ValueError, match="is not a dtype's name"):
        store_folder(offload, MODEL, dtype)


def test_strange_ids_come_back_from_the_manifest(offload):
    for model in ("\udcff/x", "ä", 'quote"'):
        open_store(offload, model=model)
        open_store(offload, model=model)


def test_no_manifest_but_experts_of_another_state(offload):
    """The manifest is lost, so each file must tell by itself that it is of another state."""
    old = open_store(offload)
    old.write(key(3), data_of(3))
    (old.folder / "manifest.json").unlink()
    warnings: list[str] = []
    new = open_store(offload, warnings, fingerprint="f2")
    assert new.find(key(3)) is None
    assert len(warnings) == 1
    new.write(key(3), data_of(4))
    assert open_store(offload, fingerprint="f2").verify(key(3), data_of(4))
