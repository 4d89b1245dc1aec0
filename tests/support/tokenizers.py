"""Tiny checkpoints whose tokenizer's files can be edited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from switchrun.checkpoint import open_checkpoint
from switchrun.model.records import GenerationOptions
from switchrun.model.tokenizer import Tokenizer
from switchrun.model.tokenizer_files import find_tokenizer
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config

TEXT = "the man <extra_id_0> walks into a bar with <extra_id_1>."
SHORT = GenerationOptions(max_new_tokens=6)

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(random_model(tiny_config()), tmp_path_factory.mktemp("original") / "m")
    return save_tiny_tokenizer(folder)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "m"))


def load(folder: Path, source: str | None = None) -> Tokenizer:
    checkpoint = open_checkpoint(str(folder))
    return Tokenizer.load(checkpoint, find_tokenizer(checkpoint.path, source))


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


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change_all(folder: Path) -> None:
        for change in changes:
            change(folder)

    return change_all


def normalizer(*rules: dict[str, Any]) -> Change:
    return lambda t: t.update(normalizer={"type": "Sequence", "normalizers": list(rules)})


def template(parts: int, ids: int) -> Change:
    token = {"id": "</s>", "ids": [1] * ids, "tokens": ["</s>"] * ids}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, *[{"SpecialToken": {"id": "</s>", "type_id": 0}}] * parts]
    post = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"</s>": token}}
    return lambda t: t.update(post_processor=post)
