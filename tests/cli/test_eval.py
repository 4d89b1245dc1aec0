"""`switchrun eval`: options, texts, formats and failures; the measuring itself in this process, on small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from switchrun.bench import evaluation
from switchrun.bench.child_process import ChildError
from switchrun.errors import SwitchrunError
from switchrun.kernels import native
from tests.cli.conftest import Invoke
from tests.conftest import RunSwitchrun, validate
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.qmoe_checkpoints import qmoe_config, save_qmoe, save_twin, ternary_model
from tests.support.sessions import small_process

__all__ = ["small_process"]

LINES = (
    "the man walks into a bar and orders beer with pinch of salt\n"
    "a cat sat on the mat and the dog sat on the red mat with a cat\n"
    "the\n"
    "\n"
    "the blue dog walks into the red bar with a man and a cat and a pinch of salt\n"
)
ENGLISH = (
    "The old man walked slowly along the shore and looked out over the grey water toward the islands.\n"
    "She opened the door of the little house, and there upon the table lay the letter of her brother.\n"
    "It was a cold morning in the month of December, and the snow lay deep upon the roofs of the town.\n"
)

Tasks = list[dict[str, Any]]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch, small_process: None) -> Tasks:
    """Evaluate in this process, and keep the tasks."""
    found: Tasks = []

    def run_child(module: str, task: dict[str, Any], **_: Any) -> dict[str, Any]:
        found.append(task)
        try:
            # As through a pipe.
            return dict(json.loads(json.dumps(evaluation.evaluate_dtype(json.loads(json.dumps(task))))))
        except SwitchrunError as error:
            raise ChildError(error.message, error.hint, error.kind, error.exit_code) from error

    monkeypatch.setattr(evaluation, "run_child", run_child)
    return found


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    folder = save_checkpoint(random_model(tiny_config()), tmp_path / "tiny")
    save_tiny_tokenizer(folder)
    (tmp_path / "text.txt").write_text(LINES)
    return str(folder)


def run(invoke: Invoke, model: str, *options: str, **more: Any) -> Any:
    args = ("eval", "--text", "text.txt", "--model", model, "--cpu-memory", "2GiB", "--max-new-tokens", "6")
    return invoke(*args, *options, **more)


def record_of(done: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(done.stdout)
    validate(record, "eval")
    return record


def test_a_dtype_agrees_with_itself(invoke: Invoke, tasks: Tasks, tiny: str) -> None:
    done = run(invoke, tiny, *"--dtype fp32,auto --format json".split())
    assert done.code == 0, done.stderr
    record = record_of(done)
    first, second = record["rows"]
    assert (second["loss_difference"], second["token_agreement"], second["output_agreement"]) == (0, 1, 1)
    assert first["loss"] == second["loss"] > 0
    assert record["reference"] == "fp32"
    assert (record["text"]["lines"], record["text"]["passages"], record["text"]["skipped"]) == (5, 3, 2)
    assert "note: lines skipped, for they are too short for a span: 2" in done.stderr
    for row in record["rows"]:
        assert row["loss_pass"]["expert_loads"] == row["experts_used"] > 0
        assert row["passes"] == 1


def test_every_dtype_and_a_reference_in_the_middle(invoke: Invoke, tasks: Tasks, tiny: str) -> None:
    options = "--dtype int8,fp32,nf4,bf16 --reference fp32 --format json".split()
    first = record_of(run(invoke, tiny, *options))
    rows = {row["name"]: row for row in first["rows"]}
    assert list(rows) == ["int8", "fp32", "nf4", "bf16"]
    assert rows["fp32"]["loss_difference"] == 0
    assert 0 < abs(rows["int8"]["loss_difference"]) < 0.05
    assert rows["int8"]["slot_bytes"] < rows["fp32"]["slot_bytes"]
    done = run(invoke, tiny, *options)
    again = {row["name"]: row for row in record_of(done)["rows"]}
    # Packed once, they are read from the offload folder.
    assert again["nf4"]["loss_pass"]["load_bytes"] <= again["nf4"]["experts_used"] * again["nf4"]["slot_bytes"]
    assert "packed" not in done.stderr
    for name, row in rows.items():
        assert (again[name]["loss"], again[name]["token_agreement"]) == (row["loss"], row["token_agreement"])


def test_the_demo_model_in_int8(invoke: Invoke, tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(ENGLISH)
    done = invoke(*"eval --text text.txt --dtype fp32,int8 --cpu-memory 2GiB --max-new-tokens 6 --format json".split())
    assert done.code == 0, done.stderr
    full, packed = record_of(done)["rows"]
    assert abs(packed["loss_difference"]) < 0.05
    assert packed["token_agreement"] > 0.9
    assert (packed["dtype"], packed["compute_dtype"]) == ("int8", "bf16")
    assert 1 < full["loss"] < 8  # far below the 8.3 of guessing among 4,096 pieces
    assert "note: int8: experts were read from the checkpoint and packed" in done.stderr


@pytest.mark.skipif(not native.paths(), reason="built without kernels, by which test models are encoded")
def test_qmoe_beside_its_original(invoke: Invoke, tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(LINES)
    model = ternary_model(qmoe_config(d_model=34, d_ff=70, num_experts=6), seed=4)
    packed, twin = save_qmoe(model, tmp_path / "packed"), save_twin(model, tmp_path / "twin")
    done = run(invoke, str(packed), "--reference-model", str(twin), "--format", "json")
    assert done.code == 0, done.stderr
    record = record_of(done)
    # Its experts are stored in few bits, so there is nothing to compare them with but the other model.
    original, row = record["rows"]
    assert (original["name"], row["name"], row["dtype"]) == ("reference", "auto", "qmoe")
    assert (record["reference"], record["reference_model"]["id"]) == ("reference", str(twin))
    assert abs(row["loss_difference"]) < 0.01
    assert row["token_agreement"] > 0.9
    assert row["loss_pass"]["load_bytes"] < original["loss_pass"]["load_bytes"]
    table = run(invoke, str(packed), "--reference-model", str(twin), "--format", "md").stdout
    assert f"reference {twin} (BF16)" in table


def test_a_reference_model_that_cuts_the_text_in_another_way(invoke: Invoke, tasks: Tasks, tiny: str) -> None:
    done = run(invoke, tiny, "--dtype", "fp32", "--reference-model", "demo")
    assert (done.code, done.stdout) == (2, "")
    assert "--reference-model: it cuts the text into other tokens than the model" in done.stderr
    done = run(invoke, tiny, "--reference", "fp32", "--dtype", "fp32", "--reference-model", tiny)
    assert done.code == 2
    assert "--reference and --reference-model exclude one another" in done.stderr


def test_the_limit_of_the_offload_folder(invoke: Invoke, tasks: Tasks, tiny: str, tmp_path: Path) -> None:
    options = "--dtype int8 --format json --offload-folder tier --offload-limit".split()
    done = run(invoke, tiny, *options, "1KiB")
    assert done.code == 0
    assert "warning: int8: " in done.stderr
    assert "the limit leaves no room" in done.stderr
    assert not list((tmp_path / "tier").rglob("*.safetensors"))
    refused = run(invoke, tiny, *options, "little")
    assert (refused.code, refused.stdout) == (2, "")
    assert "--offload-limit: 'little' is not a size" in refused.stderr


def test_a_seed_decides(invoke: Invoke, tasks: Tasks, tiny: str) -> None:
    losses = [
        record_of(run(invoke, tiny, *f"--dtype fp32 --seed {seed} --format json".split()))["rows"][0]["loss"]
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_the_batch_decides_nothing_but_speed(invoke: Invoke, tasks: Tasks, tiny: str) -> None:
    losses = [
        record_of(run(invoke, tiny, *f"--dtype fp32 --batch-size {size} --format json".split()))["rows"][0]["loss"]
        for size in (1, 2, 8)
    ]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_little_memory_makes_several_passes(invoke: Invoke, tasks: Tasks, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(LINES * 120)
    options = "--dtype fp32 --batch-size 1 --limit 500 --max-new-tokens 0 --format json".split()
    one = record_of(run(invoke, tiny, *options))["rows"][0]
    least = run(invoke, tiny, *options, "--cpu-memory", "1MiB")
    assert least.code == 6
    assert "eval keeps all dense weights in memory" in least.stderr
    needed = int(least.stderr.partition("needs ")[2].split()[0])
    row = record_of(run(invoke, tiny, *options, "--cpu-memory", f"{needed}MiB"))["rows"][0]
    assert row["passes"] > one["passes"] == 1
    assert row["hidden_bytes"] < one["hidden_bytes"]
    assert row["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert row["generation"] is None
    assert row["output_agreement"] is None


def test_stdin_and_limit(invoke: Invoke, tasks: Tasks, tiny: str) -> None:
    args = f"eval --text - --model {tiny} --dtype fp32 --cpu-memory 2GiB --limit 2 --max-new-tokens 0 --format json"
    record = record_of(invoke(*args.split(), input=LINES.encode()))
    assert record["text"]["name"] == "stdin"
    assert record["text"]["lines"] == record["text"]["passages"] == 2
    assert tasks[0]["lines"] == LINES.splitlines()[:2]


def test_tables(invoke: Invoke, tasks: Tasks, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(invoke, tiny, *"--dtype fp32,int8 -q".split())
    assert (done.code, done.stderr) == (0, "")
    assert "same tokens  same outputs  experts read" in done.stdout
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, run(invoke, tiny, *"--dtype fp32,int8 -q".split()).stdout.splitlines()[1:])) <= 80
    assert "1 pass," in done.stdout
    assert "of hidden states" in done.stdout
    markdown = run(invoke, tiny, *"--dtype fp32,int8 -q --format md".split()).stdout.splitlines()
    table = [line for line in markdown if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("text", "options", "code", "message"),
    [
        ("the\n\na\n", "", 4, "no line of text.txt is long enough for a span"),
        ("", "", 4, "text.txt has no lines"),
        (b"the man walks\n\xff\xfe\n", "", 4, "text.txt, line 2: not UTF-8"),
        (LINES, "--text nothing.txt", 2, "--text: 'nothing.txt' cannot be read: No such file"),
        (LINES, "--text .", 2, "--text: '.' cannot be read"),
        (LINES, "--dtype fp32,fp32", 2, "--dtype: 'fp32,fp32' is not a list"),
        (LINES, "--dtype fp31", 2, "'fp31' is not a dtype"),
        (LINES, "--reference bf16", 2, "--reference: 'bf16' is not one of --dtype"),
        (LINES, "--cpu-memory much", 2, "--cpu-memory: 'much' is not a size"),
        (LINES, "--model nothing", 5, "nothing"),
    ],
)
def test_what_is_refused(
    invoke: Invoke, tasks: Tasks, tiny: str, tmp_path: Path, text: str | bytes, options: str, code: int, message: str
) -> None:
    (tmp_path / "text.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run(invoke, tiny, *"--dtype fp32 -q".split(), *options.split())
    assert (done.code, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("style", ["table", "md", "json"])
def test_names_are_shown_and_not_obeyed(
    invoke: Invoke, tasks: Tasks, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    real = evaluation.evaluate_dtype
    name = "\x1b[31m[red]\u202e"
    monkeypatch.setattr(evaluation, "evaluate_dtype", lambda task: real(task) | {"model": _named(name)})
    done = run(invoke, tiny, *f"--dtype fp32 -q --format {style}".split())
    assert (done.code, done.stderr) == (0, "")
    assert "[red]" in done.stdout
    assert not set(done.stdout) & set("\x1b\u202e")


def _named(name: str) -> dict[str, Any]:
    return {"id": name, "revision": None, "stored_dtype": "F32"}


def edit_tokenizer(tiny: str, **settings: Any) -> None:
    path = Path(tiny) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_token_that_the_model_has_not_refuses_the_text(
    invoke: Invoke, tasks: Tasks, tiny: str, tmp_path: Path
) -> None:
    """A loss over the other lines would not be that of the text."""
    vocabulary = json.loads((Path(tiny) / "tokenizer.json").read_text())
    vocabulary["added_tokens"].append(vocabulary["added_tokens"][0] | {"id": 500, "content": "[new]"})
    (Path(tiny) / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert run(invoke, tiny, *"--dtype fp32 -q".split()).code == 0
    (tmp_path / "text.txt").write_text(f"{LINES}the man walks into a [new] bar\n")
    done = run(invoke, tiny, *"--dtype fp32,bf16 -q".split())
    assert (done.code, done.stdout, len(tasks)) == (4, "", 2)
    assert done.stderr.startswith(
        "switchrun: text.txt, line 6: the text has the token '[new]' with id 128, the model's"
    )


def test_a_tokenizer_that_is_not_t5s_own(invoke: Invoke, tasks: Tasks, tiny: str) -> None:
    """Neither a padding token nor an end mark, and settings that say as little: the same passages, the same loss."""
    first = record_of(run(invoke, tiny, *"--dtype fp32 --format json".split()))
    edit_tokenizer(tiny, pad_token=None, eos_token=None, model_input_names=["input_ids"])
    config = Path(tiny) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": 9}))
    second = record_of(run(invoke, tiny, *"--dtype fp32 --format json".split()))
    assert first["rows"][0]["loss"] == second["rows"][0]["loss"]


def test_a_tokenizer_with_too_few_sentinels(invoke: Invoke, tasks: Tasks, tiny: str) -> None:
    save_tiny_tokenizer(Path(tiny), extra_ids=1)
    done = run(invoke, tiny, *"--dtype fp32 -q".split())
    assert (done.code, done.stdout) == (5, "")
    assert done.stderr == "switchrun: eval needs 2 sentinels, the tokenizer has 1\n"


def test_a_dtype_that_fails_keeps_its_row(
    invoke: Invoke, tasks: Tasks, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = evaluation.run_child

    def run_child(module: str, task: dict[str, Any], **_: Any) -> dict[str, Any]:
        if task["dtype"] == "fp32":
            raise ChildError("the process was killed", "lower --cpu-memory", "killed", 6)
        return real(module, task)

    monkeypatch.setattr(evaluation, "run_child", run_child)
    done = run(invoke, tiny, *"--dtype fp32,bf16 --format json -q".split())
    assert done.code == 3
    assert done.stderr == "switchrun: fp32: the process was killed (lower --cpu-memory)\n"
    failed, row = record_of(done)["rows"]
    assert failed["status"] == "failed"
    assert row["loss"] > 0
    assert (row["loss_difference"], row["token_agreement"], row["output_agreement"]) == (None, None, None)
    assert "failed" in run(invoke, tiny, *"--dtype fp32,bf16 -q".split()).stdout
    done = run(invoke, tiny, *"--dtype fp32 --format json -q".split())
    assert (done.code, done.stdout) == (6, "")


@pytest.mark.slow
def test_processes_of_their_own(run_switchrun: RunSwitchrun) -> None:
    lines = ENGLISH * 80
    options = "--dtype fp32,int8 --max-new-tokens 0 --cpu-memory 900MiB --format json"
    done = run_switchrun(["eval", "--text", "-", *options.split()], input=lines, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    validate(record, "eval")
    for row in record["rows"]:
        assert row["hidden_bytes"] > 3 * 2**20
        assert 100 * 2**20 < row["peak_rss_bytes"] < 900 * 2**20
