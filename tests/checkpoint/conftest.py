"""What the tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import random_model, save_checkpoint, tiny_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(random_model(tiny_config(tie_word_embeddings=False)), tmp_path / "m")
