"""The Session API in-process, on tiny checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from switchrun import GenerationOptions, Session
from switchrun.errors import BudgetError, InputError, ModelError, UsageError
from switchrun.model.records import FillResult, Progress
from tests.conftest import validate
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import encode, open_with_slots, small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = (
    "the <extra_id_0> sat on the <extra_id_1> .",
    "a man walks into a <extra_id_0>",
    "<extra_id_0> and salt , <extra_id_1> with the red cat and the blue dog",
)
SHORT = GenerationOptions(max_new_tokens=6)


def save(folder: Path, **values: Any) -> Any:
    spec = CheckpointSpec(**values)
    model = spec.model()
    spec.save(model, folder)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "m")
    return save_tiny_tokenizer(tmp_path / "m")


def test_records_follow_the_schema(folder: Path) -> None:
    with open_with_slots(folder, 2, batch_size=2) as session:
        batches: list[list[FillResult]] = []
        results = session.fill(TEXTS, SHORT, ids=range(7, 10), on_results=lambda batch: batches.append(list(batch)))
    assert sorted(map(len, batches)) == [1, 2]
    assert sorted((each for batch in batches for each in batch), key=lambda result: result.id) == results
    for result in results:
        validate(result.as_record() | {"output_ids": list(result.output_ids), "spans": list_spans(result)}, "fill")
        assert result.tokens.output == len(result.output_ids) - 1
        assert result.raw.startswith("<pad>")
        assert 0 < result.timing.ttft_seconds <= result.timing.total_seconds
        assert result.experts.requests == result.experts.hits + result.experts.loads
    assert [result.id for result in results] == [7, 8, 9]
    assert [result.input for result in results] == list(TEXTS)
    assert [len(result.spans) for result in results] == [2, 1, 2]


def list_spans(result: Any) -> list[dict[str, Any]]:
    return [{"sentinel": span.sentinel, "text": span.text} for span in result.spans]


def test_why_an_answer_ends(folder: Path) -> None:
    with open_with_slots(folder, None) as session:
        text = TEXTS[0]
        full = session.fill([text], GenerationOptions(max_new_tokens=3))[0]
        assert (full.finish_reason, full.tokens.output) == ("length", 3)
        # The token that comes first becomes the end of sequence.
        session.engine.model.generation_config.eos_token_id = full.output_ids[2]
        ended = session.fill([text], GenerationOptions(max_new_tokens=3))[0]
        first = full.output_ids.index(full.output_ids[2], 1)
        assert (ended.finish_reason, ended.output_ids) == ("stop", full.output_ids[: first + 1])


def test_dropped_tokens_are_counted_as_the_oracle_drops_them(tmp_path: Path) -> None:
    oracle = save(tmp_path, capacity=1, encoder_step=1)
    save_tiny_tokenizer(tmp_path)
    dropped: list[torch.Tensor] = []
    for block in oracle.encoder.block:
        block.layer[-1].mlp.router.register_forward_hook(
            lambda module, inputs, output: dropped.append(output[0].sum(dim=-1).reshape(-1) == 0)
        )
    for text in TEXTS:
        with open_with_slots(tmp_path, None) as session:
            result = session.fill([text], SHORT)[0]
            input_ids, mask = encode(session, [text])
        dropped.clear()
        with torch.no_grad():
            oracle.encoder(input_ids=input_ids, attention_mask=mask)
        expected = int(sum(layer.sum() for layer in dropped))
        assert result.tokens.dropped == expected
        assert expected > 0


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batches_answer_as_one_by_one(folder: Path, batch_size: int) -> None:
    with open_with_slots(folder, 2) as session:
        single = [result.output_ids for result in session.fill(TEXTS, SHORT)]
    with open_with_slots(folder, 2, batch_size=batch_size) as session:
        assert [result.output_ids for result in session.fill(TEXTS, SHORT)] == single


def test_sampling_is_decided_by_the_seed(folder: Path) -> None:
    def sample(session: Session, seed: int) -> tuple[int, ...]:
        options = GenerationOptions(max_new_tokens=8, sample=True, temperature=3.0, seed=seed)
        return session.fill(TEXTS[:1], options)[0].output_ids

    with open_with_slots(folder, None) as session:
        state = torch.random.get_rng_state()
        answers = [sample(session, seed) for seed in range(5)]
        assert torch.equal(torch.random.get_rng_state(), state), "the caller's own random numbers are left alone"
        assert [sample(session, seed) for seed in range(5)] == answers
    assert len(set(answers)) > 1


def test_more_beams_than_memory_is_reserved_for(folder: Path) -> None:
    with open_with_slots(folder, None, num_beams=2) as session:
        session.fill(TEXTS[:1], GenerationOptions(max_new_tokens=2, num_beams=2))
        with pytest.raises(BudgetError, match="3 beams are asked for, memory is reserved for 2") as caught:
            session.fill(TEXTS[:1], GenerationOptions(num_beams=3))
    assert "num_beams" in caught.value.hint


def test_too_long_an_input(folder: Path) -> None:
    with open_with_slots(folder, None) as session:
        text = "a " * 600 + "<extra_id_0>"
        with pytest.raises(InputError, match=r"the text has (\d+) tokens, there is memory for 512") as caught:
            session.fill([TEXTS[0], text])
        length = len(session._tokenizer._tokenizer(text).input_ids)
        assert f"has {length} tokens" in caught.value.message
        with pytest.raises(InputError, match="has no <extra_id_20>"):
            session.encode("".join(f"<extra_id_{number}>" for number in range(21)))


def test_nothing_to_fill(folder: Path) -> None:
    with open_with_slots(folder, None) as session:
        assert session.fill([]) == []


def test_progress_tells_each_stage_to_its_end(folder: Path) -> None:
    told: list[Progress] = []
    with open_with_slots(folder, None, progress=told.append) as session:
        session.fill(TEXTS[:1], SHORT)
        dense = session.plan.tier("cpu").dense_bytes
    stages = list(dict.fromkeys(progress.stage for progress in told))
    assert stages == ["index", "plan", "import", "open", "encode", "decode"]
    for stage, total in (("open", dense), ("encode", 2), ("decode", 6)):
        of_stage = [progress for progress in told if progress.stage == stage]
        assert {progress.total for progress in of_stage} == {total}
        done = [progress.done for progress in of_stage]
        assert done == sorted(done)
        assert done[-1] <= total
    assert max(p.done for p in told if p.stage == "open") == dense
    assert max(p.done for p in told if p.stage == "encode") == 2
    assert told[0].load_bytes == 0
    assert {p.ids for p in told} == {(), (0,)}
    assert [p.load_bytes for p in told] == sorted(p.load_bytes for p in told)


def test_a_tokenizer_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    with open_with_slots(folder, None) as session:
        expected = session.fill(TEXTS, SHORT)
    (tmp_path / "elsewhere").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(tmp_path / "elsewhere" / name)
    with pytest.raises(ModelError, match="has no tokenizer") as caught:
        open_with_slots(folder, None)
    assert "--tokenizer" in caught.value.hint
    with open_with_slots(folder, None, tokenizer=str(tmp_path / "elsewhere")) as session:
        assert [r.text for r in session.fill(TEXTS, SHORT)] == [r.text for r in expected]


def test_a_tokenizer_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path / "large", vocab_size=300)
    with pytest.raises(ModelError, match="gives id 299 to <extra_id_0>, the model's vocabulary has 128"):
        open_with_slots(folder, None, tokenizer=str(tmp_path / "large"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not valid JSON"):
        open_with_slots(folder, None)


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """As on the Hub: T5's tokenizer adds the 100 sentinels behind the pieces, the first one last."""
    import sentencepiece

    from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

    (tmp_path / "text").write_text("the cat sat on the mat and a man walks into a bar with salt\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spiece"), vocab_size=40, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    save_checkpoint(random_model(tiny_config(vocab_size=160)), tmp_path / "m")
    (tmp_path / "spiece.model").rename(tmp_path / "m" / "spiece.model")
    with open_with_slots(tmp_path / "m", None) as session:
        (result,) = session.fill(["the <extra_id_0> sat"], SHORT)
        pieces = len(session._tokenizer._tokenizer) - 100
        assert session._tokenizer.sentinel_id(0) == pieces + 99
        assert session.encode("the <extra_id_0> cat").ids[-1] == 1
    assert result.tokens.input >= 4


def test_closing_twice_and_leaving_nothing_behind(folder: Path) -> None:
    def open_files() -> list[str]:
        found = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # the one that the listing itself had open
                found.append(str(link.readlink()))
        return [path for path in found if path.startswith(str(folder))]

    threads = set(threading.enumerate())
    session = open_with_slots(folder, 2)
    session.fill(TEXTS, SHORT)
    assert open_files()
    assert set(threading.enumerate()) > threads
    session.close()
    session.close()
    assert open_files() == []
    assert set(threading.enumerate()) <= threads


def test_a_session_that_does_not_open_leaves_nothing_behind(folder: Path) -> None:
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"relu"', '"no such function"'))
    with pytest.raises(Exception, match="no such function"):
        open_with_slots(folder, 2)
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= files  # noqa: PTH208 - a count


def test_a_second_thread_is_refused_at_once(folder: Path) -> None:
    """Two at a time used to hang, or to fail somewhere inside of the cache."""
    begun, proceed = threading.Event(), threading.Event()

    def hold(progress: Progress) -> None:
        if progress.stage == "encode":
            begun.set()
            assert proceed.wait(30)

    with open_with_slots(folder, 2, progress=hold) as session:
        results: list[Any] = []
        first = threading.Thread(target=lambda: results.extend(session.fill(TEXTS, SHORT)))
        first.start()
        assert begun.wait(30)
        for call in (lambda: session.fill(TEXTS, SHORT), session.close):
            with pytest.raises(UsageError, match="another thread is using this session"):
                call()
        proceed.set()
        first.join(60)
        assert [result.text for result in results] == [result.text for result in session.fill(TEXTS, SHORT)]


@pytest.mark.slow
def test_what_the_caller_had_in_memory_is_not_the_libraries_fault() -> None:
    code = (
        "data = bytearray(1536 << 20); data[::4096] = bytes(len(data[::4096]));"
        "import switchrun;"
        "switchrun.Session.open(cpu_memory='1GiB')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    last = done.stderr.splitlines()[-1]
    assert re.search(
        r"BudgetError: this process held 1\.\d+ GiB before the model was opened, and the budget counts it", last
    )
    assert re.search(r"raise --cpu-memory by \d+(\.\d+)? MiB|raise --cpu-memory by \d+(\.\d+)? GiB", last)


def test_a_closed_session_says_so(folder: Path) -> None:
    session = open_with_slots(folder, 2)
    session.close()
    session.close()
    for call in (lambda: session.fill(TEXTS), session.__enter__):
        with pytest.raises(UsageError, match="this session is closed"):
            call()


def test_one_text_a_list_and_an_iterator(folder: Path) -> None:
    with open_with_slots(folder, 2, batch_size=2) as session:
        results = session.fill(TEXTS, SHORT)
        one = session.fill(TEXTS[1], SHORT)
        assert (one.id, one.output_ids) == (0, results[1].output_ids)
        assert session.fill(session.encode(TEXTS[1]), SHORT).output_ids == one.output_ids
        assert [each.output_ids for each in session.fill(dict.fromkeys(TEXTS), SHORT)] == [
            each.output_ids for each in results
        ]
        taken: list[str] = []
        lazy = session.fill((taken.append(text) or text for text in TEXTS), SHORT, ids=itertools.count(5))  # type: ignore[func-returns-value]
        assert taken == []
        assert next(lazy).id == 5
        assert taken == list(TEXTS[:2])
        assert session.fill(TEXTS[0], SHORT).output_ids == results[0].output_ids, "it holds no lock meanwhile"
        assert [(each.id, each.output_ids) for each in lazy] == [
            (6, results[1].output_ids),
            (7, results[2].output_ids),
        ]


def test_short_reprs(folder: Path) -> None:
    with open_with_slots(folder, 2) as session:
        result = session.fill("a " * 100 + "<extra_id_0>", GenerationOptions(max_new_tokens=2, explain=True))
        assert repr(session) == f"<Session of {folder}, fp32>"
        assert repr(session.plan).startswith(f"<Plan of {folder}, fp32: cpu ")
    assert repr(session) == f"<Session of {folder}, fp32, closed>"
    assert repr(result).startswith("<FillResult 0: 'a a a a")
    assert len(repr(result)) < 100
    assert repr(result.routing) == "<Routing of 103 + 2 tokens in 4 layers>"


@pytest.mark.parametrize("texts", [3, None, [3], [TEXTS[0], None], [TEXTS[0], 3]])
def test_what_is_no_text(folder: Path, texts: Any) -> None:
    with open_with_slots(folder, 2) as session:
        with pytest.raises(UsageError, match=r"^texts: (3|None) is no str$"):
            list(session.fill(texts))
        with pytest.raises(UsageError, match=r"^options: .* is no GenerationOptions"):
            session.fill([TEXTS[0]], {"max_new_tokens": 3})  # type: ignore[arg-type]
