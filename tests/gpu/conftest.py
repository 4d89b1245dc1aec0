"""Fake GPUs for tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_accelerator import Device, fake_gpus


@pytest.fixture
def two_gpus() -> Iterator[list[Device]]:
    """Two GPUs without a limit."""
    with fake_gpus(None, None) as devices:
        yield devices
