"""What tests of sessions share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from switchrun.checkpoint import remote
from switchrun.checkpoint.remote import Patience
from tests.support.fake_hub import FakeHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.use(monkeypatch)
        monkeypatch.setattr(remote, "Patience", lambda: Patience(2, 2, attempts=3, first_wait_seconds=0.01))
        yield hub
