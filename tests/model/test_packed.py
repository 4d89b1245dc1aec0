"""int8 and nf4: the same tokens from every mix of tiers, exact bytes, and a folder that may only cost time."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from switchrun import GenerationOptions, Session
from switchrun.checkpoint import open_checkpoint
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.buffers import Buffers
from switchrun.experts.formats import packed_views
from switchrun.kernels.int8 import quantise_int8
from switchrun.kernels.matrices import ExpertWeights, multiply, quantise
from switchrun.store import expert_store, store_folder
from switchrun.store.layout import layout_of
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import encode, generate, open_with_slots, oracle_for, small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = (
    "the <extra_id_0> sat on the <extra_id_1> .",
    "a man walks into a <extra_id_0>",
    "<extra_id_0> and salt , <extra_id_1> with the red cat and the blue dog <extra_id_2> beer <extra_id_3> mat",
)
OPTIONS = GenerationOptions(max_new_tokens=8)
PACKED = ("int8", "nf4")
#: 16 × 32, of which a matrix has half.
EXPERT_ELEMENTS = 2 * 16 * 32


def saved(spec: CheckpointSpec, folder: Path) -> Any:
    model = spec.model()
    spec.save(model, folder)
    save_tiny_tokenizer(folder)
    return model


def unpacked(model: Any, dtype: str) -> Any:
    """Give a model whose matrices are what the packed ones stand for; plain transformers then computes in float32."""
    result = copy.deepcopy(model)
    config = model.config
    layout = layout_of(dtype, config.d_model, config.d_ff)
    for name, module in result.named_modules():
        if name.rpartition(".")[2].startswith("expert_"):
            into = packed_views(Buffers(1, layout.nbytes)[0], layout, dtype, (config.d_ff, config.d_model))
            quantise(ExpertWeights(module.wi.weight.data, module.wo.weight.data), into)
            for linear, matrix in ((module.wi, into.wi), (module.wo, into.wo)):
                linear.weight.data = multiply(torch.eye(linear.in_features), matrix).T.contiguous()
        elif is_dense_linear(name):
            codes, scb = torch.empty(module.weight.shape, dtype=torch.int8), torch.empty(module.out_features)
            quantise_int8(module.weight.data, codes, scb)
            module.weight.data = codes * (scb / 127)[:, None]
    return result


def is_dense_linear(name: str) -> bool:
    """Tell whether a module is a linear layer that is kept in int8 outside the experts."""
    return ".experts." not in name and name.rpartition(".")[2] in {"q", "k", "v", "o", "wi", "wo"}


def experts_in(offload: Path) -> list[Path]:
    return sorted(offload.rglob("*.safetensors"))


def fill(session: Session) -> list[list[int]]:
    return [list(result.output_ids) for result in session.fill(TEXTS, OPTIONS)]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("slots", [1, 2, 5, None])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_same_tokens_for_every_budget_and_mix_of_tiers(
    tmp_path: Path, dtype: str, slots: int | None, transposed: bool
) -> None:
    spec = CheckpointSpec(container="torch" if transposed else "safetensors", transposed=transposed)
    model = saved(spec, tmp_path / "model")
    offload = tmp_path / "tier"
    oracle = oracle_for(unpacked(model, dtype), "fp32")
    expected = None
    for run in ("from the checkpoint", "from offload", "from both"):
        if run == "from both":
            for path in experts_in(offload)[::2]:
                path.unlink()
        with open_with_slots(tmp_path / "model", slots, dtype=dtype, batch_size=3, offload_folder=offload) as session:
            expected = expected or generate(oracle, session, TEXTS, max_new_tokens=OPTIONS.max_new_tokens)
            assert fill(session) == expected, run
            check_logits(oracle, session)


def check_logits(oracle: Any, session: Session) -> None:
    ours, theirs = logits_of(session.engine.model, session), logits_of(oracle, session)
    torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-4)


def logits_of(model: Any, session: Session) -> torch.Tensor:
    input_ids, attention_mask = encode(session, TEXTS)
    with torch.no_grad():
        result: torch.Tensor = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=torch.tensor([[0, 5, 9, 127]]).repeat(len(TEXTS), 1),
        ).logits
    return result


@pytest.mark.parametrize("dtype", PACKED)
def test_bfloat16_experts_give_the_same_from_either_tier(tmp_path: Path, dtype: str) -> None:
    saved(CheckpointSpec(dtype="bf16"), tmp_path / "model")
    answers = []
    for slots in (None, 1, 2):
        with open_with_slots(
            tmp_path / "model", slots, dtype=dtype, batch_size=3, offload_folder=tmp_path / "tier"
        ) as session:
            assert session.plan.precision.compute == "bf16"
            answers.append((fill(session), logits_of(session.engine.model, session)))
    assert all(tokens == answers[0][0] and torch.equal(logits, answers[0][1]) for tokens, logits in answers)


@pytest.mark.parametrize("dtype", PACKED)
def test_bytes_are_those_of_the_tier_that_was_read(tmp_path: Path, dtype: str) -> None:
    saved(CheckpointSpec(), tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    stored = []
    for each in (checkpoint.expert_bytes, layout_of(dtype, 16, 32).nbytes):
        with Session.open(tmp_path / "model", dtype=dtype, batch_size=3, offload_folder=tmp_path / "tier") as session:
            fill(session)
            experts = session.stats().experts
        assert experts.loads > 0
        assert experts.load_bytes == experts.loads * each
        stored.append([(path, path.read_bytes()) for path in experts_in(tmp_path / "tier")])
        assert len(stored[-1]) == experts.loads
    assert stored[0] == stored[1]


def test_the_plan_counts_what_lies_in_offload(tmp_path: Path) -> None:
    import switchrun

    saved(CheckpointSpec(), tmp_path / "model")

    def planned() -> int:
        return switchrun.plan(tmp_path / "model", dtype="int8", offload_folder=tmp_path / "tier").estimate.load_bytes

    before = planned()
    with Session.open(tmp_path / "model", dtype="int8", batch_size=3, offload_folder=tmp_path / "tier") as session:
        fill(session)
    assert planned() < before


def packed_once(tmp_path: Path) -> list[list[int]]:
    saved(CheckpointSpec(), tmp_path / "model")
    with open_int8(tmp_path) as session:
        return fill(session)


def open_int8(tmp_path: Path, **options: Any) -> Session:
    return Session.open(tmp_path / "model", dtype="int8", batch_size=3, offload_folder=tmp_path / "tier", **options)


@pytest.mark.parametrize("damage", ["a flipped byte", "truncated", "another expert's", "no permission to read"])
def test_a_damaged_expert_is_rebuilt_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = packed_once(tmp_path)
    first, second, *_ = experts_in(tmp_path / "tier")
    whole = first.read_bytes()
    if damage == "a flipped byte":
        first.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "truncated":
        first.write_bytes(whole[:-1])
    elif damage == "another expert's":
        first.write_bytes(second.read_bytes())
    else:
        first.unlink()
        first.mkdir()
    caplog.set_level(logging.WARNING, "switchrun")
    with open_int8(tmp_path) as session:
        assert fill(session) == expected
        experts = session.stats().experts
    assert experts.loads == len(experts_in(tmp_path / "tier"))
    if damage == "no permission to read":
        return
    assert [record.message for record in caplog.records if str(first) in record.message]
    assert first.read_bytes() == whole
    caplog.clear()
    with open_int8(tmp_path) as session:
        assert fill(session) == expected
    assert not caplog.records


def test_experts_that_vanish_while_a_session_is_open_are_taken_from_the_checkpoint(tmp_path: Path) -> None:
    expected = packed_once(tmp_path)
    with open_int8(tmp_path) as session:
        assert fill(session) == expected
        for path in experts_in(tmp_path / "tier"):
            path.unlink()
            session.engine.cache._reader.forget(path)
        session.engine.cache.clear()
        before = session.stats().experts
        assert fill(session) == expected
        assert session.stats().experts.loads == 2 * before.loads


def test_what_another_session_has_stored_meanwhile_is_read(tmp_path: Path) -> None:
    saved(CheckpointSpec(), tmp_path / "model")
    with open_int8(tmp_path) as later:
        with open_int8(tmp_path) as first:
            expected = fill(first)
        assert fill(later) == expected
        experts = later.stats().experts
        assert experts.load_bytes == experts.loads * layout_of("int8", 16, 32).nbytes


def test_a_folder_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    saved(CheckpointSpec(), tmp_path / "model")
    with Session.open(tmp_path / "model", dtype="int8", batch_size=3, offload_folder=tmp_path / "other") as session:
        expected = fill(session)
    monkeypatch.setattr(expert_store, "write_atomically", refuse)
    caplog.set_level(logging.WARNING, "switchrun")
    with open_int8(tmp_path) as session:
        assert fill(session) == expected
    assert len(caplog.records) == 1
    assert "cannot be written: Read-only file system" in caplog.text
    assert not experts_in(tmp_path / "tier")


def test_a_changed_checkpoint_refuses_the_folder(tmp_path: Path) -> None:
    packed_once(tmp_path)
    (tmp_path / "model" / "model.safetensors").touch()
    with pytest.raises(CorruptCheckpointError, match="has changed since") as caught:
        open_int8(tmp_path)
    assert "switchrun offload clear --model" in (caught.value.hint or "")
    assert caught.value.exit_code == 7


def test_the_limit_bounds_the_folder(tmp_path: Path) -> None:
    expected = packed_once(tmp_path)
    paths = experts_in(tmp_path / "tier")
    limit = 2 * paths[0].stat().st_size
    with open_int8(tmp_path, offload_limit=limit) as session:
        assert fill(session) == expected
    assert 0 < sum(path.stat().st_size for path in experts_in(tmp_path / "tier")) <= limit


def test_dtypes_do_not_mix(tmp_path: Path) -> None:
    """`auto` never becomes a packed dtype, whatever lies in the folder."""
    packed_once(tmp_path)
    folder = store_folder(tmp_path / "tier", str(tmp_path / "model"), "int8")
    assert folder.is_dir()
    with Session.open(tmp_path / "model", batch_size=3, offload_folder=tmp_path / "tier") as session:
        assert (session.plan.dtype, session.plan.precision.compute) == ("fp32", "fp32")
        fill(session)
        experts = session.stats().experts
        assert experts.load_bytes == experts.loads * session.checkpoint.expert_bytes
