"""Alternatives and explanations, held against plain transformers on the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, SwitchTransformersForConditionalGeneration

import switchrun
from switchrun import Filling, GenerationOptions, Session
from switchrun.errors import BudgetError, UsageError
from switchrun.model.records import LayerRouting
from tests.conftest import validate
from tests.model.test_score import by_span, saved
from tests.support.sessions import encode, open_with_slots, oracle_for, small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = (
    "the <extra_id_0> sat on the <extra_id_1> .",
    "a man walks into a <extra_id_0>",
    "<extra_id_0> and salt , <extra_id_1> with the red cat and the blue dog",
)
N = 3
BEST = GenerationOptions(max_new_tokens=8, alternatives=N)
DEMO = Path(switchrun.__file__).parent / "demo"


class _AtClosing(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


def forward(oracle: Any, session: Session, text: str, output_ids: tuple[int, ...]) -> tuple[float, ...]:
    """Each generated token's log-probability, as `model(input_ids, labels=…)` computes it."""
    labels = torch.tensor([output_ids[1:]])
    with torch.no_grad():
        logits = oracle(encode(session, [text])[0], labels=labels).logits
    return tuple(logits.float().log_softmax(-1).gather(-1, labels[..., None])[0, :, 0].tolist())


@pytest.fixture(scope="module")
def demo() -> Any:
    """The demo model, which was trained to answer in sentinels: a random one does not close its answers."""
    return SwitchTransformersForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()


def open_demo(**options: Any) -> Session:
    return open_with_slots(DEMO, None, dtype="fp32", max_new_tokens=8, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(CheckpointSpec(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 3])
def test_alternatives_are_the_beams_of_transformers(demo: Any, batch_size: int) -> None:
    with open_demo(num_beams=2 * N, batch_size=batch_size) as session:
        results = session.fill(TEXTS, BEST)
        ended = 0
        for text, result in zip(TEXTS, results, strict=True):
            closing = session._tokenizer.sentinel_id(text.count("<extra"))
            assert closing is not None
            ids, mask = encode(session, [text])
            beams = demo.generate(
                ids, attention_mask=mask, do_sample=False, num_beams=2 * N, num_return_sequences=2 * N,
                max_new_tokens=8, length_penalty=0.0, stopping_criteria=StoppingCriteriaList([_AtClosing(closing)]),
            ).tolist()  # fmt: skip
            answers = {}
            for beam in beams:
                end = next((at for at, token in enumerate(beam) if at and token in (1, closing)), len(beam))
                kept = (*beam[: end + 1], 1) if beam[end : end + 1] == [closing] else tuple(beam[: end + 1])
                answers[kept] = sum(forward(demo, session, text, kept))
            assert result.alternatives is not None
            found = [each.output_ids for each in result.alternatives]
            assert set(found) <= set(answers)
            assert found[0] == max(answers, key=answers.__getitem__)
            assert len({each.text for each in result.alternatives}) == len(found) <= N
            assert len(found) == N
            for each in result.alternatives:
                assert each.log_probability == pytest.approx(answers[each.output_ids], rel=1e-4)
                ended += each.output_ids[-2:] == (closing, 1)
            totals = [each.log_probability for each in result.alternatives]
            assert totals == sorted(totals, reverse=True)
            first = result.alternatives[0]
            assert (result.text, result.raw, result.output_ids) == (first.text, first.raw, first.output_ids)
            assert [span.text for span in result.spans] == [span.text for span in first.spans]
        assert ended


def test_spans_of_alternatives_and_what_score_says_of_them(demo: Any) -> None:
    compared = 0
    with open_demo(num_beams=12) as session:
        first = session._tokenizer.sentinel_id(0)
        assert first is not None
        for text in TEXTS:
            count = text.count("<extra")
            (result,) = session.fill([text], replace(BEST, alternatives=6))
            for each in result.alternatives or ():
                values = forward(demo, session, text, each.output_ids)
                inside = [token for token in each.output_ids if first - count <= token <= first]
                if inside != [first - at for at in range(count + 1)]:
                    continue  # not all spans are there, or one is there twice
                expected = by_span(each.output_ids[1:], values, count, first)
                assert [span.log_probability for span in each.spans] == pytest.approx(expected, rel=1e-4, abs=1e-5)
                (scored,) = session.score([Filling(text, [span.text or "" for span in each.spans])])
                if scored.target_ids == each.output_ids[1:]:  # not where the model spells in its own way
                    compared += 1
                    assert scored.log_probability == pytest.approx(each.log_probability, rel=1e-5)
    assert compared > N


def test_draws(demo: Any) -> None:
    options = GenerationOptions(max_new_tokens=8, alternatives=4, sample=True, temperature=2.0, seed=3)
    with open_demo(num_beams=8) as session:
        results = session.fill(TEXTS, options)
        assert [each.alternatives for each in session.fill(TEXTS, options)] == [each.alternatives for each in results]
        same = session.fill(TEXTS[:1], replace(options, temperature=1e-6))[0].alternatives
    with open_demo(num_beams=8, batch_size=3) as session:
        together = session.fill(TEXTS, options)
    for one, other in zip(results, together, strict=True):
        assert [each.output_ids for each in one.alternatives or ()] == [
            each.output_ids for each in other.alternatives or ()
        ]
    assert same is not None
    assert [each.text for each in same] == [same[0].text] * 4, "draws are draws"
    for text, result in zip(TEXTS, results, strict=True):
        assert result.alternatives is not None
        totals = [each.log_probability for each in result.alternatives]
        assert len(totals) == 4
        assert totals == sorted(totals, reverse=True)
        for each in result.alternatives:
            assert each.log_probability == pytest.approx(sum(forward(demo, session, text, each.output_ids)), rel=1e-4)


def test_one_alternative_has_a_score(folder: Path) -> None:
    with open_with_slots(folder, None, num_beams=2, max_new_tokens=8) as session:
        (result,) = session.fill(TEXTS[:1], GenerationOptions(max_new_tokens=8, alternatives=1))
        (plain,) = session.fill(TEXTS[:1], GenerationOptions(max_new_tokens=8))
    assert result.alternatives is not None
    assert [each.text for each in result.alternatives] == [result.text]
    assert (plain.alternatives, plain.routing) == (None, None)
    assert not {"alternatives", "routing"} & plain.as_record().keys()


def test_a_stop_string_ends_alternatives(tmp_path: Path) -> None:
    saved(CheckpointSpec(), tmp_path)
    with open_with_slots(tmp_path, None, num_beams=2, max_new_tokens=8) as session:
        (plain,) = session.fill(TEXTS[:1], GenerationOptions(max_new_tokens=8, num_beams=2))
        stop = session._tokenizer.decode(plain.output_ids[3:4])
    (tmp_path / "generation_config.json").write_text(
        f'{{"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "stop_strings": ["{stop}"]}}'
    )
    with open_with_slots(tmp_path, None, num_beams=6, max_new_tokens=8) as session:
        (result,) = session.fill(TEXTS[:1], BEST)
    assert result.alternatives is not None
    stopped = [each for each in result.alternatives if each.raw.endswith(stop)]
    assert stopped
    assert all(each.finish_reason == "stop" for each in stopped)
    assert all(stop not in each.raw.removeprefix("<pad>")[: -len(stop)] for each in stopped)


def test_what_memory_is_reserved_for(folder: Path) -> None:
    with open_with_slots(folder, None, num_beams=4, batch_size=8, max_new_tokens=8) as session:
        session.fill(TEXTS[:1], GenerationOptions(max_new_tokens=8, alternatives=2))
        with pytest.raises(BudgetError, match="6 beams are asked for, memory is reserved for 4") as caught:
            session.fill(TEXTS[:1], BEST)
        assert caught.value.hint == "open the session with num_beams=6"
        with pytest.raises(BudgetError, match="9 new tokens are asked for, memory is reserved for 8"):
            session.fill(TEXTS[:1], GenerationOptions(max_new_tokens=9, alternatives=2))
    with pytest.raises(UsageError, match=r"^alternatives: with sampling they are draws"):
        GenerationOptions(alternatives=2, sample=True, num_beams=2)
    for wrong in ({"alternatives": -1}, {"alternatives": 1.5}, {"explain": 1}):
        with pytest.raises(UsageError, match=f"^{next(iter(wrong))}: "):
            GenerationOptions(**wrong)  # type: ignore[arg-type]


# Explanations.


@contextmanager
def routers_heard(oracle: Any) -> Iterator[dict[tuple[str, int], list[torch.Tensor]]]:
    """The logits of each router of plain transformers, a tensor a run, as its own `output_router_logits` has them."""
    heard: dict[tuple[str, int], list[torch.Tensor]] = {}
    hooks = []
    for stack in ("encoder", "decoder"):
        for number, block in enumerate(getattr(oracle, stack).block):
            if block.layer[-1].is_sparse:
                runs = heard.setdefault((stack, number), [])
                hooks.append(
                    block.layer[-1].mlp.router.register_forward_hook(
                        lambda _router, _inputs, output, runs=runs: runs.append(output[2][0])
                    )
                )
    yield heard
    for hook in hooks:
        hook.remove()


def check_routing(layers: tuple[LayerRouting, ...], heard: dict[tuple[str, int], list[torch.Tensor]]) -> None:
    assert [(layer.stack, layer.block) for layer in layers] == list(heard)
    for layer in layers:
        probabilities, experts = torch.cat(heard[layer.stack, layer.block]).softmax(-1).max(-1)
        assert list(layer.experts) == experts.tolist()
        assert list(layer.probabilities) == pytest.approx(probabilities.tolist(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("capacity", [1, 64])
def test_explained_are_the_routers_own_choices(tmp_path: Path, batch_size: int, capacity: int) -> None:
    model = saved(CheckpointSpec(encoder_step=1, decoder_step=1, experts=8, capacity=capacity), tmp_path)
    oracle = oracle_for(model, "fp32")
    options = GenerationOptions(max_new_tokens=6, explain=True)
    with open_with_slots(tmp_path, 3, batch_size=batch_size) as session:
        plain = session.fill(TEXTS, replace(options, explain=False))
        results = session.fill(TEXTS, options)
        assert [result.output_ids for result in results] == [result.output_ids for result in plain]
        for text, result in zip(TEXTS, results, strict=True):
            ids, mask = encode(session, [text])
            with routers_heard(oracle) as heard:
                oracle.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6)
            routing = result.routing
            assert routing is not None
            check_routing(routing.layers, heard)
            assert list(routing.input_tokens) == session._tokenizer._tokenizer.convert_ids_to_tokens(ids[0].tolist())
            assert len(routing.output_tokens) == result.tokens.output
            assert sum(len(layer.dropped) for layer in routing.layers) == result.tokens.dropped
            assert result.tokens.dropped > 0 or capacity > 1
            for layer in routing.layers:
                seen: dict[int, int] = {}
                over = []
                for at, expert in enumerate(layer.experts):
                    seen[expert] = seen.get(expert, 0) + 1
                    if seen[expert] > capacity:
                        over.append(at)
                assert list(layer.dropped) == (over if layer.stack == "encoder" else [])
    hooks = [router._forward_hooks for router in session.engine.model.modules() if hasattr(router, "classifier")]
    assert not any(hooks), "nothing listens any more"


def test_rows_that_end_early_are_explained(demo: Any) -> None:
    """With them out of the decoder, its routers would have fewer rows."""
    with open_demo(batch_size=3) as session:
        results = session.fill(TEXTS, GenerationOptions(max_new_tokens=24, explain=True))
        for text, result in zip(TEXTS, results, strict=True):
            ids, mask = encode(session, [text])
            with routers_heard(demo) as heard:
                demo.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
            assert result.routing is not None
            check_routing(result.routing.layers, heard)
    assert len({result.tokens.output for result in results}) > 1


@pytest.mark.parametrize("options", [GenerationOptions(num_beams=3), BEST])
def test_beams_are_explained_by_going_over_the_answer(demo: Any, options: GenerationOptions) -> None:
    options = replace(options, explain=True, max_new_tokens=8)
    with open_demo(batch_size=3, num_beams=6) as session:
        results = session.fill(TEXTS, options)
        for text, result in zip(TEXTS, results, strict=True):
            with routers_heard(demo) as heard:
                forward(demo, session, text, result.output_ids)
            assert result.routing is not None
            check_routing(result.routing.layers, heard)
            assert len(result.routing.output_tokens) == len(result.output_ids) - 1


def test_records_follow_the_schema(folder: Path) -> None:
    with open_with_slots(folder, None, num_beams=6, max_new_tokens=8) as session:
        for options in (BEST, replace(BEST, explain=True), GenerationOptions(max_new_tokens=8, explain=True)):
            for result in session.fill(TEXTS, options):
                record = json.loads(json.dumps(result.as_record()))
                validate(record, "fill")
                assert ("alternatives" in record, "routing" in record) == (
                    options.alternatives > 0,
                    options.explain,
                )
