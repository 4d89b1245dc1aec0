"""`fill` with a fake session: formats, batches, inputs that fail, options that contradict each other."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from switchrun.model.records import GenerationOptions
from switchrun.planning.options import OpenOptions
from switchrun.planning.plan import HubCost
from switchrun.units import GIB
from tests.cli.conftest import Invoke
from tests.cli.fakes import REPAIR, UNUSED
from tests.conftest import validate

GOOD = "A <extra_id_0> b"
ANSWER = "A wörd [x] b\n"


def test_one_text(invoke: Invoke) -> None:
    outcome = invoke("fill", GOOD)
    assert (outcome.code, outcome.stdout) == (0, ANSWER)
    assert outcome.stderr == f"switchrun: note: {REPAIR}\nswitchrun: note: {UNUSED}\n"
    assert outcome.sessions[0].closed


def test_texts_keep_their_order(invoke: Invoke) -> None:
    outcome = invoke("fill", "1 <extra_id_0>", "2 <extra_id_0>", "-q")
    assert outcome.stdout == "1 wörd [x]\n2 wörd [x]\n"
    assert outcome.stderr == ""
    assert outcome.sessions[0].batches == [["1 <extra_id_0>", "2 <extra_id_0>"]]


def test_raw_is_one_line(invoke: Invoke) -> None:
    assert invoke("fill", GOOD, "--format", "raw").stdout == "<pad> <extra_id_0> wörd [x]</s>\n"


def test_jsonl_is_a_valid_record_a_line(invoke: Invoke) -> None:
    outcome = invoke("fill", GOOD, "no sentinel", GOOD, "--format", "jsonl")
    records = [json.loads(line) for line in outcome.stdout.splitlines()]
    for record in records:
        validate(record, "fill")
    assert [record["id"] for record in records] == [0, 1, 2]
    assert records[1]["error"]["kind"] == "input"
    assert records[1]["input"] == "no sentinel"
    assert records[2]["text"] == "A wörd\n[x] b"
    assert "wörd" in outcome.stdout
    assert outcome.code == 3


CODES = "\x1b[31m\x07\x9b2J\u202eb\u2028 👩\u200d🚀\ttab"


@pytest.mark.parametrize("style", ["text", "raw"])
def test_codes_in_a_text_are_written_out(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, style: str) -> None:
    """From whatever they come: the user's text, or words that a vocabulary has."""
    shown = r"\x1b[31m\x07\x9b2J\u202eb\u2028 " + "👩\u200d🚀\ttab"
    monkeypatch.setattr("tests.cli.fakes.WORD", CODES + "\n[x]")
    outcome = invoke("fill", GOOD, "--format", style)
    assert outcome.stdout == (f"A {shown} [x] b\n" if style == "text" else f"<pad> <extra_id_0> {shown} [x]</s>\n")
    assert invoke("fill", f"{CODES} <extra_id_0>").stdout.startswith(f"{shown} ")


@pytest.mark.parametrize("style", ["json", "jsonl"])
def test_json_holds_codes_escaped(invoke: Invoke, style: str) -> None:
    outcome = invoke("fill", f"{CODES} <extra_id_0>", f"{CODES}\x7f\udcff", "--format", style)
    assert not set(outcome.stdout) & set("\x1b\x07\x9b\x7f\u202e\u2028")
    assert "👩\u200d🚀" in outcome.stdout
    records = list(map(json.loads, outcome.stdout.splitlines())) if style == "jsonl" else json.loads(outcome.stdout)
    assert records[0]["input"] == f"{CODES} <extra_id_0>"
    assert records[0]["text"].startswith(CODES)


def test_json_is_one_document(invoke: Invoke) -> None:
    stdout = invoke("fill", GOOD, "--format", "json").stdout
    validate(json.loads(stdout), "fill")
    assert stdout.startswith('{\n  "schema_version"')
    for outcome in (
        invoke("fill", GOOD, "no sentinel", GOOD, "--format", "json"),
        invoke("fill", "--format", "json", input=f"{GOOD}\nno sentinel\n{GOOD}\n".encode()),
    ):
        records = json.loads(outcome.stdout)
        for record in records:
            validate(record, "fill")
        assert [record["id"] for record in records] == [0, 1, 2]
        assert ["error" in record for record in records] == [False, True, False]
        assert outcome.stdout.startswith('[\n{\n  "schema_version"')
    one = invoke("fill", "--format", "json", input=GOOD.encode())
    assert json.loads(one.stdout)["id"] == 0
    assert json.loads(invoke("fill", "--format", "json", input=b"").stdout) == []


def test_a_failure_leaves_a_whole_json_document(invoke: Invoke) -> None:
    for good, expected in ((1, 0), (2, [0, 1])):
        lines = f"{GOOD}\n" * good + "BUDGET <extra_id_0>\n"
        outcome = invoke("fill", "--format", "json", "-q", "--batch-size", "1", input=lines.encode())
        document = json.loads(outcome.stdout)
        assert outcome.code == 6
        assert (document["id"] if good == 1 else [record["id"] for record in document]) == expected


@pytest.mark.parametrize("option", ["--model", "--tokenizer", "--offload-folder"])
def test_an_empty_name_is_not_the_current_folder(invoke: Invoke, option: str) -> None:
    outcome = invoke("fill", GOOD, option, "")
    assert (outcome.code, outcome.sessions) == (2, [])
    assert outcome.stderr == f"switchrun: {option}: the name is empty (name one, or leave the option out)\n"


def test_a_device_map_may_be_a_pipe(invoke: Invoke, tmp_path: Path) -> None:
    """As `--device-map <(switchrun plan --format json)` gives it: it can be read once, and is no regular file."""
    reading, writing = os.pipe()
    os.write(writing, b'{"device_map": {"": "cpu"}}')
    os.close(writing)
    try:
        outcome = invoke("fill", GOOD, "--device-map", f"/dev/fd/{reading}")
    finally:
        os.close(reading)
    assert (outcome.code, outcome.sessions[0].opening.tiers) == (0, {"": "cpu"})


def test_a_single_bad_text_leaves_stdout_empty(invoke: Invoke) -> None:
    for style in ("text", "raw", "json", "jsonl"):
        outcome = invoke("fill", "no sentinel", "--format", style)
        assert (outcome.code, outcome.stdout) == (4, "")
        assert outcome.stderr.startswith("switchrun: the text has no sentinel")
        assert "quote" in outcome.stderr
        assert outcome.stderr.count("\n") == 1
        assert outcome.sessions == [], "a bad text must not cost the opening of the model"


def test_a_text_that_only_the_tokenizer_refuses(invoke: Invoke) -> None:
    outcome = invoke("fill", "TOO LONG <extra_id_0>", "-q")
    assert (outcome.code, outcome.stdout) == (4, "")
    assert outcome.stderr == "switchrun: the text has 600 tokens, there is memory for 512 (shorten it)\n"


def test_a_stream_answers_the_good_lines(invoke: Invoke) -> None:
    lines = b"1 <extra_id_0>\r\nbad\n\xff <extra_id_0>\nTOO LONG <extra_id_0>\n<extra_id_1>\n6 <extra_id_0>"
    outcome = invoke("fill", "-q", input=lines)
    assert outcome.code == 3
    assert outcome.stdout == "1 wörd [x]\n\n\n\n\n6 wörd [x]\n"
    messages = outcome.stderr.splitlines()
    assert [message.split(":")[1] for message in messages] == [" line 2", " line 3", " line 4", " line 5"]
    assert "not UTF-8: byte 0xff at offset 0" in messages[1]


def test_a_stream_with_nothing_good(invoke: Invoke) -> None:
    outcome = invoke("fill", "-", "--format", "jsonl", input=b"bad\n\xff\n")
    assert outcome.code == 4
    records = [json.loads(line) for line in outcome.stdout.splitlines()]
    for record in records:
        validate(record, "fill")
    assert [record["input"] for record in records] == ["bad", "\ufffd"]


def test_an_empty_stream_is_no_error(invoke: Invoke) -> None:
    outcome = invoke("fill", input=b"")
    assert (outcome.code, outcome.stdout) == (0, "")


def test_batches_hold_lines_until_they_are_full(invoke: Invoke) -> None:
    lines = b"bad\n1 <extra_id_0>\nbad\n2 <extra_id_0>\n3 <extra_id_0>\n"
    outcome = invoke("fill", "--batch-size", "2", "-q", "--format", "jsonl", input=lines)
    assert outcome.sessions[0].batches == [["1 <extra_id_0>", "2 <extra_id_0>"], ["3 <extra_id_0>"]]
    assert [json.loads(line)["id"] for line in outcome.stdout.splitlines()] == [0, 1, 2, 3, 4]
    assert outcome.code == 3


@pytest.mark.parametrize(
    ("args", "terminal", "size"),
    [
        ([], False, "auto"),
        ([], True, 1),
        (["-"], True, 1),
        ([GOOD], False, 1),
        ([GOOD, "--batch-size", "auto"], False, 1),
        ([GOOD, "--batch-size", "3"], False, 3),
        ([GOOD, GOOD], True, "auto"),
        (["--batch-size", "auto"], True, "auto"),
        (["--batch-size", "1"], False, 1),
    ],
)
def test_the_batch_size(invoke: Invoke, args: list[str], terminal: bool, size: int | str) -> None:
    assert invoke("fill", *args, terminal=terminal).sessions[0].opening.batch_size == size


def test_a_backlog_is_answered_in_few_batches(invoke: Invoke) -> None:
    lines = [f"{number} <extra_id_0>" if number % 5 else "bad" for number in range(1000)]
    outcome = invoke("fill", "-q", "--format", "jsonl", input="\n".join(lines).encode())
    records = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [record["id"] for record in records] == list(range(1000))
    assert [record["input"] for record in records] == lines
    (session,) = outcome.sessions
    assert len(session.batches) == 2
    assert session.ids == [number for number in range(1000) if number % 5], "what is drawn depends on it"


def test_a_backlog_of_long_lines_is_bounded(invoke: Invoke) -> None:
    line = "x" * 300_000
    outcome = invoke("fill", "-q", input=f"{line} <extra_id_0>\n{line}\n".encode() * 10)
    assert [len(batch) for batch in outcome.sessions[0].batches] == [2, 2, 2, 2, 2]
    outcome = invoke("fill", "-q", "--batch-size", "2", input=f"{GOOD}\n".encode() + b"\n" * 2000 + GOOD.encode())
    assert [len(batch) for batch in outcome.sessions[0].batches] == [1, 1]


def test_blanks(invoke: Invoke) -> None:
    outcome = invoke("fill", "A ___ b", "--blank", "___", "--format", "jsonl")
    assert json.loads(outcome.stdout)["input"] == GOOD
    outcome = invoke("fill", "A ___ <extra_id_0>", "--blank", "___")
    assert (outcome.code, outcome.stdout) == (4, "")


def test_what_ends_the_whole_run(invoke: Invoke) -> None:
    outcome = invoke("fill", "-q", "--batch-size", "1", input=b"1 <extra_id_0>\nBUDGET <extra_id_0>\n3 <extra_id_0>\n")
    assert outcome.code == 6
    assert outcome.stdout == "1 wörd [x]\n"
    assert outcome.stderr == "switchrun: this batch needs 2 GiB (use --batch-size 1)\n"
    assert outcome.sessions[0].closed


def test_memory_that_ran_out(invoke: Invoke) -> None:
    outcome = invoke("fill", "-q", "OOM <extra_id_0>")
    assert (outcome.code, outcome.stdout) == (6, "")
    assert outcome.stderr.startswith("switchrun: out of memory:")


def test_a_bug_is_one_line(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = invoke("fill", "-q", "CRASH <extra_id_0>")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert outcome.stderr == (
        "switchrun: internal error: ZeroDivisionError: division by zero in the second line "
        "(set SWITCHRUN_DEBUG=1 to see where)\n"
    )
    monkeypatch.setenv("SWITCHRUN_DEBUG", "1")
    assert "Traceback" in invoke("fill", "-q", "CRASH <extra_id_0>").stderr


HUB_COST = HubCost(
    downloads=False,
    output_tokens=12,
    index_bytes=53_000_000,
    dense_bytes=2 * GIB,
    expert_loads=180,
    expert_bytes=9 * GIB,
    kept_share=0.0,
    kept_bytes=0,
    folder="/home/me/offload",
    disk_bytes=11 * GIB,
    free_bytes=100 * GIB,
    bandwidth_bytes_per_second=12.5e6,
    bandwidth_source="assumed",
    seconds=11 * GIB / 12.5e6,
)


def test_much_from_the_hub_is_announced(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    line = (
        "google/switch-c-2048: about 11 GiB from the Hub, 15 min 45 s at 12.50 MB/s (assumed); kept in /home/me/offload"
    )
    monkeypatch.setattr("tests.cli.fakes.HUB_COST", HUB_COST)
    outcome = invoke("fill", GOOD)
    assert (outcome.code, outcome.stdout) == (0, ANSWER)
    assert outcome.stderr.startswith(f"switchrun: {line}\n")
    assert invoke("fill", GOOD, "-q").stderr == ""
    monkeypatch.setattr("tests.cli.fakes.HUB_COST", replace(HUB_COST, bandwidth_source="measured"))
    assert "12.50 MB/s; kept" in invoke("fill", GOOD).stderr
    monkeypatch.setattr("tests.cli.fakes.HUB_COST", replace(HUB_COST, dense_bytes=0, expert_bytes=999_999_999))
    assert "from the Hub" not in invoke("fill", GOOD).stderr


def test_a_terminal_sees_progress_and_it_is_erased(invoke: Invoke) -> None:
    outcome = invoke("fill", GOOD, terminal=True)
    assert outcome.stderr.startswith("\r\x1b[2Kopening the demo model…")
    assert "opening the demo model: reading dense weights, 1000 B of 1.95 KiB" in outcome.stderr
    assert "token 3 of at most 64, 4.77 MiB read" in outcome.stderr
    assert outcome.stderr.endswith("\r\x1b[2K")
    assert outcome.stdout == ANSWER
    assert "\x1b" not in invoke("fill", GOOD, "-q", terminal=True).stderr


def test_no_cursor_codes_without_a_terminal(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in invoke("fill", GOOD, "--stats").stderr


def test_a_person_is_told_how_to_end(invoke: Invoke) -> None:
    assert "Ctrl-D" in invoke("fill", terminal=True, input=b"").stderr
    assert "Ctrl-D" not in invoke("fill", input=b"").stderr
    assert "Ctrl-D" not in invoke("fill", GOOD, terminal=True).stderr


def test_alternatives_have_as_many_lines_for_each_input(invoke: Invoke) -> None:
    outcome = invoke("fill", GOOD, "no sentinel", GOOD, "--alternatives", "3", "-q")
    answer = "-1.5000\tA wörd [x] b\n-22.0000\tsecond one\n\n"
    assert outcome.stdout == f"{answer}\n\n\n{answer}"
    assert outcome.code == 3
    session = outcome.sessions[0]
    assert (session.opening.num_beams, session.options[0].alternatives, session.options[0].beams) == (6, 3, 6)
    raw = invoke("fill", GOOD, "--alternatives", "1", "--format", "raw", "-q", "--num-beams", "4")
    assert raw.stdout == "-1.5000\t<pad> <extra_id_0> wörd [x]</s>\n"
    assert raw.sessions[0].opening.num_beams == 4


def test_alternatives_that_are_drawn(invoke: Invoke) -> None:
    session = invoke("fill", GOOD, "--alternatives", "2", "--sample").sessions[0]
    assert (session.opening.num_beams, session.options[0].beams) == (4, 1)


def test_alternatives_and_routing_in_records(invoke: Invoke) -> None:
    outcome = invoke("fill", GOOD, "--alternatives", "2", "--explain", "--format", "json", "-q")
    record = json.loads(outcome.stdout)
    validate(record, "fill")
    assert [each["log_probability"] for each in record["alternatives"]] == [-1.5, -22.0]
    assert record["routing"]["layers"][0]["dropped"] == [3]
    assert outcome.stderr == ""


def test_an_explanation_is_a_table_on_stderr(invoke: Invoke) -> None:
    outcome = invoke("fill", GOOD, GOOD, "--explain", "-q")
    assert outcome.stdout == ANSWER * 2
    assert "Experts of text 1" in outcome.stderr
    row = r"encoder\.block\.1 +7 × 3, 3 × 1, 1 × 1, 2 × 1, 5 × 1, and 2 more +9 +1"
    assert len(re.findall(row, outcome.stderr)) == 2
    assert "Experts of the text" in invoke("fill", GOOD, "--explain").stderr


def test_options_reach_the_session(invoke: Invoke, tmp_path: Path) -> None:
    map_file = tmp_path / "map.json"
    map_file.write_text('{"": "cpu"}')
    sampling = ["--sample", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--seed", "3"]
    limits = ["--max-new-tokens", "9", "--num-beams", "2", "--batch-size", "4"]
    memory = ["--cpu-memory", "6GiB", "--gpu-memory", "1GiB", "--offload-folder", "o", "--device-map", str(map_file)]
    memory += ["--offload-limit", "3GiB"]
    outcome = invoke("fill", GOOD, "-m", "M", "--dtype", "fp32", "--tokenizer", "T", *sampling, *limits, *memory)
    session = outcome.sessions[0]
    assert session.options == [GenerationOptions(9, 2, True, 0.5, 0.9, 7, 3)]
    assert session.opening == OpenOptions(
        model="M",
        dtype="fp32",
        cpu_memory="6GiB",
        gpu_memory="1GiB",
        offload_folder="o",
        offload_limit="3GiB",
        device_map=str(map_file),
        tokenizer="T",
        batch_size=4,
        num_beams=2,
        max_new_tokens=9,
    )
    assert (session.opening.cpu_bytes, session.opening.gpu_bytes) == (6 * GIB, {0: GIB})
    assert (session.opening.folder, session.opening.limit_bytes) == (Path("o"), 3 * GIB)
    assert session.opening.tiers == {"": "cpu"}


def test_options_from_the_environment(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "MODEL": "M",
        "DTYPE": "bf16",
        "CPU_MEMORY": "1GiB",
        "GPU_MEMORY": "2GiB",
        "OFFLOAD_FOLDER": "o",
        "TOKENIZER": "T",
        "BATCH_SIZE": "4",
        "MAX_NEW_TOKENS": "9",
        "NUM_BEAMS": "2",
        "FORMAT": "raw",
        "DEVICE_MAP": "auto",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"SWITCHRUN_{name}", value)
    outcome = invoke("fill", GOOD)
    session = outcome.sessions[0]
    assert outcome.stdout.startswith("<pad>")
    assert session.opening.model == "M"
    assert session.opening.cpu_memory == "1GiB"
    assert session.opening.tiers is None
    assert session.options == [GenerationOptions(9, 2)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch-size", "0"], "--batch-size: '0' is neither auto nor a whole number above 0"),
        (["--batch-size", "all"], "--batch-size: 'all' is neither auto nor a whole number above 0"),
        (["--batch-size", "9" * 5000], "--batch-size: '999"),
        (["--max-new-tokens", "0"], "switchrun: --max-new-tokens: '"),
        (["--num-beams", "x"], "switchrun: --num-beams: '"),
        (["--dtype", "fp8"], "switchrun: --dtype: '"),
        (["--format", "xml"], "switchrun: --format: '"),
        (["--temperature", "2"], "--temperature does nothing without --sample"),
        (["--top-p", "0.5"], "--top-p does nothing without --sample"),
        (["--top-k", "5"], "--top-k does nothing without --sample"),
        (["--seed", "5"], "--seed does nothing without --sample"),
        (["--sample", "--temperature", "0"], "--temperature must be above 0"),
        (["--sample", "--temperature", "nan"], "--temperature must be above 0"),
        (["--sample", "--temperature", "inf"], "--temperature must be above 0"),
        (["--sample", "--top-p", "0"], "--top-p must be above 0"),
        (["--sample", "--top-p", "1.5"], "--top-p must be above 0"),
        (["--sample", "--top-k", "-1"], "switchrun: --top-k: '"),
        (["--sample", "--seed", "-1"], "switchrun: --seed: '"),
        (["--cpu-memory", "lots"], "--cpu-memory: 'lots' is not a size"),
        (["--gpu-memory", "0=1GiB,0=2GiB"], "--gpu-memory"),
        (["--device-map", "nowhere.json"], "--device-map: there is no file 'nowhere.json'"),
        (["--blank", ""], "--blank"),
        (["--alternatives", "0"], "switchrun: --alternatives: '"),
        (["--alternatives", "2", "--sample", "--num-beams", "2"], "--alternatives: with sampling they are draws"),
        (["-"], "stdin"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_usage_errors_are_one_line(invoke: Invoke, args: list[str], message: str) -> None:
    outcome = invoke("fill", GOOD, *args)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert outcome.sessions == []
