"""What a model is opened with: values that make no sense are refused by name, the others are read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import switchrun
from switchrun import GenerationOptions, Session
from switchrun.errors import UsageError
from switchrun.planning.options import OpenOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 1.0),
        ("batch_size", "all"),
        ("batch_size", True),
        ("num_beams", 0),
        ("num_beams", True),
        ("max_new_tokens", 0),
        ("cpu_memory", 2e9),
        ("cpu_memory", -5),
        ("cpu_memory", "lots"),
        ("gpu_memory", -1),
        ("gpu_memory", "0=1GiB,0=2GiB"),
        ("gpu_memory", "0=x"),
        ("offload_limit", "x"),
        ("offload_limit", 1.5),
        ("hub", "ftp"),
        ("hub", None),
        ("dtype", "fp8"),
        ("model", ""),
        ("tokenizer", ""),
        ("offload_folder", ""),
        ("device_map", "nowhere.json"),
        ("device_map", 3),
        ("model", 3),
        ("tokenizer", b"x"),
        ("dtype", None),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    for build in (lambda: OpenOptions(**{name: value}), lambda: Session.open(**{name: value})):
        with pytest.raises(UsageError) as caught:
            build()
        assert caught.value.option == name
        assert str(caught.value).startswith(f"{name}: ")
        flag = "--" + name.replace("_", "-")
        assert caught.value.on_command_line() == flag + str(caught.value).removeprefix(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("num_beams", 0),
        ("num_beams", 2.0),
        ("temperature", 0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_p", 2.0),
        ("top_p", 0),
        ("top_k", -1),
        ("seed", -(10**30)),
        ("seed", 2**63),
        ("sample", "yes"),
    ],
)
def test_generation_options_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        GenerationOptions(**{name: value})
    assert caught.value.option == name
    assert str(value) in str(caught.value)


def test_a_small_negative_seed_is_as_good_as_any() -> None:
    assert GenerationOptions(seed=-1).seed == -1


def test_sizes_and_maps_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"": "cpu", "decoder": 1}')
    options = OpenOptions(
        cpu_memory="1MiB",
        gpu_memory="1=2KiB",
        offload_limit="3KiB",
        offload_folder=tmp_path,
        device_map=tmp_path / "map.json",
    )
    (tmp_path / "map.json").unlink()
    assert (options.cpu_bytes, options.gpu_bytes, options.limit_bytes) == (1 << 20, {1: 2048}, 3072)
    assert (options.folder, options.tiers) == (tmp_path, {"": "cpu", "decoder": "gpu:1"})


def test_a_map_without_gpus_asks_no_driver() -> None:
    assert OpenOptions(device_map={"": "cpu"}).gpu_bytes == {0: 0}
    assert OpenOptions(device_map={"": 0}).gpu_bytes is None
    assert OpenOptions().gpu_bytes is None


def test_it_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        OpenOptions().batch_size = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("disk_bandwidth", "fast"),
        ("disk_bandwidth", -1),
        ("network_bandwidth", "0MB/s"),
        ("network_bandwidth", float("inf")),
        ("hub", "ftp"),
        ("input_tokens", 0),
    ],
)
def test_what_a_plan_cannot_estimate_with(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name}: "):
        switchrun.plan(**{name: value})
