"""What the processor can do, by made-up texts of /proc/cpuinfo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from switchrun.machine import processor as machine_processor

AVX2 = "flags\t\t: fpu sse2 avx avx2 fma"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq avx512_vnni"

Processor = Callable[[str], None]


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processor]:
    """A function that sets what /proc/cpuinfo says; until it is called, there is no such file."""
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine_processor, "_CPUINFO", file)
    machine_processor.has_bf16_instructions.cache_clear()
    yield lambda flags: file.write_text(f"processor\t: 0\nmodel name\t: A CPU with bf16\n{flags}\nbugs\t\t: none\n")
    machine_processor.has_bf16_instructions.cache_clear()


@pytest.mark.parametrize(
    ("flags", "there"),
    [
        (AVX2, False),
        (AVX512, False),
        (f"{AVX512} avx512_bf16", True),
        (f"{AVX512} amx_bf16 amx_tile", True),
        ("Features\t: fp asimd asimddp i8mm bf16 dgh", True),
        ("Features\t: fp asimd asimddp", False),
        ("", False),
    ],
)
def test_bf16_instructions(processor: Processor, flags: str, there: bool) -> None:
    processor(flags)
    assert machine_processor.has_bf16_instructions() is there


def test_where_the_system_does_not_say_there_are_none(processor: Processor) -> None:
    assert not machine_processor.has_bf16_instructions()
