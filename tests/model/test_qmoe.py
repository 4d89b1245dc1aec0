"""QMoE checkpoints: the tokens of plain transformers on the decoded weights, from every mix of tiers; exact bytes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchrun import GenerationOptions, Session, plan
from switchrun.checkpoint import open_checkpoint
from switchrun.errors import CorruptCheckpointError, UsageError
from switchrun.kernels import libraries, native
from tests.model.test_same_tokens import MAX_NEW_TOKENS, TEXTS, check_ids, check_logits
from tests.support.fake_hub import FakeHub
from tests.support.qmoe_checkpoints import qmoe_config, rewrite, save_qmoe, ternary_model
from tests.support.sessions import generate, open_with_slots, oracle_for, small_process

__all__ = ["small_process"]
pytestmark = [
    pytest.mark.usefixtures("small_process"),
    pytest.mark.skipif(not native.paths(), reason="built without kernels, by which test models are encoded"),
]

ID = "ISTA-DASLab/switch-tiny_qmoe"
ANY_OF_THESE = given(
    sizes=st.tuples(st.sampled_from([16, 34, 66]), st.sampled_from([32, 70])),
    experts=st.integers(2, 7),
    layers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 1000),
    odd_rows=st.booleans(),
    string_order=st.booleans(),
    dtype=st.sampled_from(["fp32", "bf16"]),
    slots=st.sampled_from([1, 2, 5, None]),
    kernels=st.sampled_from([*native.paths(), "off"]),
)
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(SETTINGS, max_examples=8)
@ANY_OF_THESE
def test_greedy_ids_and_logits(**case: Any) -> None:
    check_greedy(**case)


@pytest.mark.slow
@settings(SETTINGS, max_examples=25)
@ANY_OF_THESE
def test_greedy_ids_and_logits_of_many(**case: Any) -> None:
    check_greedy(**case)


def check_greedy(
    sizes: tuple[int, int], experts: int, layers: tuple[int, int], seed: int, odd_rows: bool, string_order: bool,
    dtype: str, slots: int | None, kernels: str,
) -> None:  # fmt: skip
    with TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patched:
        patched.setenv("SWITCHRUN_KERNELS", kernels)
        model = ternary_model(
            qmoe_config(
                d_model=sizes[0], d_ff=sizes[1], num_experts=experts, num_layers=layers[0],
                num_decoder_layers=layers[1], num_sparse_encoder_layers=layers[0],
                num_sparse_decoder_layers=layers[1],
            ),
            seed, odd_rows=odd_rows,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as encoding:
            encoding.delenv("SWITCHRUN_KERNELS")
            folder = save_qmoe(model, Path(place), string_order=string_order)
        oracle = oracle_for(model, dtype)
        with open_with_slots(folder, slots, dtype=dtype, batch_size=3) as session:
            assert (session.plan.dtype, session.plan.stored_dtype) == ("qmoe", "QMOE")
            assert session.plan.precision.compute == dtype
            check_logits(oracle, session, dtype)
            check_ids(oracle, session, TEXTS, dtype)
            check_ids(oracle, session, TEXTS[:1], dtype)


@pytest.fixture
def model() -> Any:
    return ternary_model(qmoe_config(d_model=34, d_ff=70, num_experts=6), seed=4)


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    return save_qmoe(model, tmp_path / "model")


@pytest.mark.parametrize("slots", [1, 4, None])
def test_beams(model: Any, folder: Path, slots: int | None) -> None:
    oracle = oracle_for(model, "fp32")
    with open_with_slots(folder, slots, dtype="fp32", batch_size=3, num_beams=3) as session:
        expected = generate(oracle, session, TEXTS, num_beams=3, max_new_tokens=MAX_NEW_TOKENS)
        options = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS, num_beams=3)
        assert [list(result.output_ids) for result in session.fill(TEXTS, options)] == expected


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"": "cpu", "decoder": "disk"}])
def test_dense_weights_on_disk(model: Any, folder: Path, device_map: dict[str, str]) -> None:
    with open_with_slots(folder, None, dtype="fp32", batch_size=3, device_map=device_map) as session:
        check_ids(oracle_for(model, "fp32"), session, TEXTS, "fp32")


def test_what_is_read_is_what_the_experts_have(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    checkpoint = open_checkpoint(str(folder))
    asked = []
    with open_with_slots(folder, None, batch_size=3) as session:
        session.engine.cache.on_load = lambda key, segments: asked.append((key, segments))
        result = session.fill(TEXTS, GenerationOptions(max_new_tokens=MAX_NEW_TOKENS))
        experts = session.stats().experts
    assert result
    assert len({key for key, _ in asked}) == len(asked) == experts.loads > 2
    for key, segments in asked:
        # Each tensor is read once, with at most the header of its zip entry before it.
        most = sum(part.nbytes + part.header_bytes for part in checkpoint.experts[key].ranges)
        assert checkpoint.experts[key].nbytes <= sum(segment.length for segment in segments) <= most
    assert experts.load_bytes == sum(segment.length for _, segments in asked for segment in segments)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before  # nothing is copied or unpacked


def test_the_plan(folder: Path) -> None:
    made = plan(folder, cpu_memory="2GiB")
    checkpoint = open_checkpoint(str(folder))
    record = made.as_record()
    assert (record["dtype"], record["compute_dtype"], record["stored_dtype"]) == ("qmoe", "bf16", "QMOE")
    assert plan(folder, cpu_memory="2GiB", dtype="fp32").as_record()["compute_dtype"] == "fp32"
    sizes = [slices.nbytes for slices in checkpoint.experts.values()]
    assert len(set(sizes)) > 1
    assert made.expert_bytes == max(sizes)
    assert made.tier("cpu").slot_bytes >= max(sizes)
    assert made.tier("disk").expert_bytes == sum(sizes)
    assert made.total_bytes == sum(sizes) + sum(tensor.nbytes for tensor in checkpoint.dense.values())


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_another_packing_is_refused(folder: Path, dtype: str) -> None:
    with pytest.raises(UsageError, match="compressed by QMoE to less than a bit a weight"):
        Session.open(folder, dtype=dtype)


@pytest.mark.parametrize("kernels", ["", "off"])
def test_damaged_codes_name_file_and_tensor(folder: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(state: dict[str, torch.Tensor]) -> None:
        for name, tensor in state.items():
            if name.endswith("wo.row_off"):
                tensor[1] += 1

    rewrite(folder / "exp01.pt", damage)
    monkeypatch.setenv("SWITCHRUN_KERNELS", kernels)
    with (
        Session.open(folder, cpu_memory="2GiB") as session,
        pytest.raises(CorruptCheckpointError, match=r"exp01\.pt: tensor .*expert_\d\.wo\.w_comp: row \d has ") as error,
    ):
        session.fill(TEXTS)
    assert error.value.exit_code == 7


@pytest.mark.parametrize("slots", [2, None])
def test_from_the_hub(hub: FakeHub, model: Any, folder: Path, slots: int | None) -> None:
    """Each expert that is needed comes once, and is kept as it is stored."""
    hub.add(ID, folder)
    oracle = oracle_for(model, "fp32")
    options = {"hub": "ranges", "offload_folder": "offload", "max_new_tokens": MAX_NEW_TOKENS, "dtype": "fp32"}
    fetched = set()
    for _ in range(2):
        with Session.open(ID, batch_size=3, **options) as session:
            assert session.plan.tier("hub").expert_bytes > 0
            check_ids(oracle, session, TEXTS, "fp32")
            counters = session.engine.cache.counters()
            fetched.add(counters.hub_loads)
            kept = sorted(Path("offload").rglob("*/qmoe/**/*.safetensors"))
            assert len({path.stat().st_size for path in kept}) == 1
    assert fetched == {len(kept), 0}
    assert len(kept) > 2


def test_a_damaged_kept_expert_comes_again(hub: FakeHub, folder: Path) -> None:
    hub.add(ID, folder)
    options = {"hub": "ranges", "offload_folder": "offload", "max_new_tokens": MAX_NEW_TOKENS}
    with Session.open(ID, **options) as session:
        expected = [result.output_ids for result in session.fill(TEXTS)]
    for path in Path("offload").rglob("*/qmoe/**/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-200] ^= 1
        path.write_bytes(data)
    with Session.open(ID, **options) as session:
        assert [result.output_ids for result in session.fill(TEXTS)] == expected
        assert session.engine.cache.counters().hub_loads > 0


def test_without_kernels_there_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(libraries, "paths", lambda: ())
    with Session.open(folder, cpu_memory="2GiB") as session:
        assert session.fill(TEXTS)
    slow = "switchrun's kernels are not built here, so qmoe is slow; switchrun doctor says what to do"
    assert [record.message for record in caplog.records] == [slow]
