"""Few bits on a GPU that bitsandbytes does not know: the tokens of the CPU, for every mix of tiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from switchrun import GenerationOptions, Session
from switchrun.kernels import native
from switchrun.planning.memory import kept_parts
from tests.model.test_same_tokens import TEXTS, saved
from tests.support.fake_accelerator import fake_gpus
from tests.support.gpu_sessions import open_on_gpus
from tests.support.qmoe_checkpoints import qmoe_config, save_qmoe, ternary_model
from tests.support.sessions import open_with_slots, small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")


def fill(session: Session) -> list[tuple[int, ...]]:
    return [result.output_ids for result in session.fill(TEXTS, GenerationOptions(max_new_tokens=8))]


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_the_tokens_of_the_cpu(tmp_path: Path, dtype: str) -> None:
    # Stored in bfloat16, it would be computed in that: torch's int8 kernel on the CPU rounds the scales then.
    saved(CheckpointSpec(dtype="fp32"), tmp_path / "model")
    settings: dict[str, Any] = {"dtype": dtype, "batch_size": 3, "offload_folder": tmp_path / "offload"}
    with open_with_slots(tmp_path / "model", None, **settings) as session:
        expected = fill(session)
    for device_map, slots in (({"": 0}, (2, 1)), ({"": 0, "encoder": "cpu", "decoder": "disk"}, (1, 2))):
        with fake_gpus(None) as (gpu,), open_on_gpus(tmp_path / "model", device_map, *slots, **settings) as session:
            assert fill(session) == expected
            level = session.engine.tiers.counters()["gpu:0"]
            assert level.loads > 0
            # What is copied is as small as what is stored.
            assert level.load_bytes == level.loads * sum(kept_parts(session.checkpoint, session.plan.precision))
            assert gpu.side_copies == 4 * level.loads


@pytest.mark.skipif(not native.paths(), reason="built without kernels, by which test models are encoded")
def test_qmoe_is_decoded_there(tmp_path: Path) -> None:
    folder = save_qmoe(ternary_model(qmoe_config(d_model=34, d_ff=70, num_experts=6), seed=4), tmp_path / "model")
    settings: dict[str, Any] = {"dtype": "fp32", "batch_size": 3}
    with open_with_slots(folder, None, **settings) as session:
        expected = fill(session)
    for device_map, slots in (({"": 0}, (2, 1)), ({"": 0, "encoder": "cpu", "decoder": "disk"}, (1, 2))):
        with fake_gpus(None) as (gpu,), open_on_gpus(folder, device_map, *slots, **settings) as session:
            assert fill(session) == expected
            level = session.engine.tiers.counters()["gpu:0"]
            assert 0 < level.load_bytes <= level.loads * sum(kept_parts(session.checkpoint, session.plan.precision))
            assert gpu.side_copies == 6 * level.loads
