"""`switchrun map`: each output, what fails, and a journal to go on from; with a fake session."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from switchrun.cli.journal import Journal, open_journal
from switchrun.errors import CorruptCheckpointError, StorageError, UsageError
from tests.cli.conftest import Invoke
from tests.cli.fakes import FakeCheckpoint, FakeSession
from tests.conftest import ROOT, validate
from tests.store.conftest import Mount, tmpfs

__all__ = ["tmpfs"]

LINES = "A <extra_id_0> b\nno sentinel\nTOO LONG <extra_id_0>\nc\x1b <extra_id_0>\n"
ANSWERS = "A wörd [x] b\n\n\nc\\x1b wörd [x]\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text(LINES)
    return path


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Inputs of which some fail, more than two windows of them."""
    path = tmp_path / "many.txt"
    path.write_text("".join("bad\n" if n % 7 == 3 else f"{n} <extra_id_0>\n" for n in range(2500)))
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"home", "in.txt", "many.txt"}


def test_lines_of_text(invoke: Invoke, source: Path, tmp_path: Path) -> None:
    done = invoke("map", str(source), "-o", "out.txt", "--seed", "1", "--sample")
    assert (done.code, done.stdout) == (3, "")
    assert Path("out.txt").read_text() == ANSWERS
    assert names(tmp_path) == {"out.txt", "out.txt.errors.jsonl"}
    errors = [json.loads(line) for line in Path("out.txt.errors.jsonl").read_text().splitlines()]
    assert [(error["id"], error["input"], error["error"]["kind"]) for error in errors] == [
        (1, "no sentinel", "input"),
        (2, "TOO LONG <extra_id_0>", "input"),
    ]
    assert errors[1]["error"]["hint"] == "shorten it"
    last = done.stderr.splitlines()[-1]
    assert last.startswith("switchrun: 2 of 4 inputs answered in out.txt, ")
    assert last.endswith("; 2 failed, for the reasons in out.txt.errors.jsonl")
    (session,) = done.sessions
    assert session.closed
    assert session.options[0].seed == 1


def test_records(invoke: Invoke, source: Path) -> None:
    assert invoke("map", str(source), "-o", "out.jsonl").code == 3
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    for record in records:
        validate(record, "fill")
    assert [record["id"] for record in records] == [0, 1, 2, 3]
    filled = invoke("fill", "--format", "jsonl", input=LINES.encode())
    assert Path("out.jsonl").read_text() == filled.stdout


def test_csv(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('q,x\n"A, ""<extra_id_0>""\nb",1\nbad,2\n')
    assert invoke("map", "in.csv", "--field", "q", "-o", "out.csv").code == 3
    with open("out.csv", newline="") as file:
        rows = list(csv.reader(file))
    text = 'A, "<extra_id_0>"\nb'
    assert rows == [
        ["id", "input", "text"],
        ["0", text, text.replace("<extra_id_0>", "wörd\n[x]")],
        ["1", "bad", ""],
    ]


def test_parquet(invoke: Invoke, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("switchrun.output.answer_files._GROUP_ROWS", 3)
    assert invoke("map", str(source), "-o", "out.parquet").code == 3
    table = parquet.read_table("out.parquet")
    assert table.column("id").to_pylist() == [0, 1, 2, 3]
    assert table.column("input").to_pylist() == LINES.splitlines()
    assert table.column("text").to_pylist() == ["A wörd\n[x] b", None, None, "c\x1b wörd\n[x]"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = invoke("map", str(source), "-o", "other.parquet")
    assert (done.code, "needs pyarrow" in done.stderr, done.sessions) == (2, True, [])


def test_codes(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("none\nnone\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "good").write_text("<extra_id_0>\n")
    (tmp_path / "out.errors.jsonl").write_text("of an earlier run")
    done = invoke("map", "good", "-o", "out", "-q")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    assert not Path("out.errors.jsonl").exists(), "there are no errors now"
    done = invoke("map", "bad", "-o", "none", "-q")
    assert done.code == 4
    assert done.stderr.count("\n") == 1
    assert Path("none").read_text() == "\n\n"
    assert invoke("map", "empty", "-o", "empty.jsonl").code == 0
    assert Path("empty.jsonl").read_text() == ""


def test_blanks(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "A ___."}\n')
    assert invoke("map", "in.jsonl", "-o", "out", "--blank", "___").code == 0
    assert Path("out").read_text() == "A wörd [x].\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-", "-o", "out"], "IN again when it goes on"),
        (["none.txt", "-o", "out"], "'none.txt' cannot be read: No such file"),
        (["in.txt", "-o", "-"], "--output: '-' is no name for a file"),
        (["in.txt", "-o", ""], "--output: the name is empty"),
        (["in.txt", "-o", "."], "--output: '.' is no name"),
        (["in.txt", "-o", "home"], "--output: 'home' is no name"),
        (["in.txt", "-o", "/dev/null"], "--output: /dev/null is no file"),
        (["in.txt", "-o", "none/out"], "there is no folder 'none'"),
        (["in.txt", "-o", "in.txt", "--force"], "in.txt is IN itself"),
        (["in.txt", "-o", "link", "--force"], "link is IN itself"),
        (["in.txt", "-o", "old"], "old is there already"),
        (["in.txt", "-o", "dangling"], "dangling is there already"),
        (["in.txt", "-o", "out", "--field", "x"], "lines have no fields"),
        (["in.txt", "-o", "out", "--blank", ""], "--blank needs a text"),
        (["in.txt", "-o", "strange"], "strange.journal is in the way, and no journal of map"),
        (["in.txt", "-o", "linked"], "linked.journal is in the way, and a link"),
        (["in.txt", "-o", "strange", "--restart"], "strange.journal is in the way, and no journal of map"),
    ],
)
def test_refusals(invoke: Invoke, source: Path, tmp_path: Path, args: list[str], message: str) -> None:
    (tmp_path / "link").symlink_to("in.txt")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "linked.journal").symlink_to("old")
    (tmp_path / "old").write_text("old")
    (tmp_path / "strange.journal").write_text("dear diary")
    before = names(tmp_path)
    done = invoke("map", *args)
    assert (done.code, done.stdout, done.sessions) == (2, "", [])
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert names(tmp_path) == before
    assert (source.read_text(), Path("strange.journal").read_text()) == (LINES, "dear diary")


def test_force_writes_over_a_file(invoke: Invoke, source: Path) -> None:
    Path("out").write_text("old")
    assert invoke("map", str(source), "-o", "out", "--force").code == 3
    assert Path("out").read_text() == ANSWERS


def test_a_kill_when_all_is_done_but_for_the_journal(
    invoke: Invoke, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda self: (_ for _ in ()).throw(StopError))
        assert invoke("map", str(source), "-o", "out", "--force").code == 1
    assert Path("out").read_text() == ANSWERS
    done = invoke("map", str(source), "-o", "out")
    assert (done.code, asked(done.sessions)) == (3, []), "the journal says that OUT may be written over"
    assert Path("out").read_text() == ANSWERS
    assert names(source.parent) == {"out", "out.errors.jsonl"}


class StopError(Exception):
    """Ends a run in the middle, as a kill would."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give a function that lets so many batches be kept, and no more; 0 is all of them."""
    append = Journal.append
    kept: list[int] = []

    def stop(batches: int) -> None:
        kept.clear()

        def appending(self: Journal, records: Any) -> None:
            if batches and len(kept) == batches:
                raise StopError
            kept.append(len(records))
            append(self, records)

        monkeypatch.setattr(Journal, "append", appending)

    return stop


def asked(sessions: list[FakeSession]) -> list[str]:
    return [text for session in sessions for batch in session.batches for text in batch]


def test_it_goes_on(invoke: Invoke, many: Path, tmp_path: Path, stop_after: Callable[[int], None]) -> None:
    args = ("map", str(many), "--batch-size", "16", "-o")
    assert invoke(*args, "whole").code == 3
    texts: list[str] = []
    for batches in (1, 5, 100):
        stop_after(batches)
        done = invoke(*args, "out")
        assert done.code == 1
        texts += asked(done.sessions)[:-16]
        assert names(tmp_path) == {"whole", "whole.errors.jsonl", "out.journal"}
    assert "switchrun: note: resuming: 231 of 2,500 inputs are answered\n" in done.stderr
    stop_after(0)
    done = invoke(*args, "out", "--cpu-memory", "8GiB")
    assert done.code == 3
    texts += asked(done.sessions)
    assert len(texts) == len(set(texts)) == sum("<" in line for line in many.read_text().splitlines())
    assert Path("out").read_text() == Path("whole").read_text()
    assert Path("out.errors.jsonl").read_text() == Path("whole.errors.jsonl").read_text()
    assert names(tmp_path) == {"whole", "whole.errors.jsonl", "out", "out.errors.jsonl"}


def test_draws_are_by_the_number_of_the_input(
    invoke: Invoke, many: Path, monkeypatch: pytest.MonkeyPatch, stop_after: Callable[[int], None]
) -> None:
    """A session draws by the ids that it is given."""
    seen: dict[str, int] = {}
    fill = FakeSession.fill

    def filling(self: FakeSession, encoded: Any, options: Any, *, ids: Any, on_results: Any) -> Any:
        for number, each in zip(ids, encoded, strict=True):
            assert each.text == f"{number} <extra_id_0>"
            seen[each.text] = number
        return fill(self, encoded, options, ids=ids, on_results=on_results)

    monkeypatch.setattr(FakeSession, "fill", filling)
    stop_after(3)
    assert invoke("map", str(many), "-o", "out", "--sample").code == 1
    stop_after(0)
    assert invoke("map", str(many), "-o", "out", "--sample").code == 3
    assert len(seen) == sum("<" in line for line in many.read_text().splitlines())


def test_texts_are_answered_with_a_prefix(invoke: Invoke, tmp_path: Path) -> None:
    """`--task generate`: no sentinels are needed, and the model's own settings decide."""
    (tmp_path / "in").write_text("one\n\ntwo <extra_id_0>\n")
    done = invoke(
        "map", "in", "-o", "out.jsonl", "--task", "generate", "--prefix", "say: ", "--temperature", "0.5", "--sample"
    )
    assert done.code == 0, done.stderr
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [(each["id"], each["text"]) for each in records] == [(0, "say: one"), (1, "say: "), (2, "say: two ")]
    assert "spans" not in records[0]
    (options,) = done.sessions[0].options
    assert (options.num_beams, options.sample, options.temperature) == (4, True, 0.5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prefix", "x"], "--prefix does nothing without --task generate"),
        (["--task", "generate", "--blank", "___"], "--blank does nothing with --task generate"),
        (["--task", "generate", "--prefix", "a \udcff"], "--prefix: not UTF-8: byte 0xff at offset 2"),
    ],
)
def test_options_that_do_not_go_with_the_task(invoke: Invoke, source: Path, args: list[str], message: str) -> None:
    done = invoke("map", str(source), "-o", "out", *args)
    assert (done.code, done.sessions) == (2, [])
    assert message in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-beams", "2"], "--num-beams is 2, and was 1"),
        (["--sample", "--temperature", "0.5"], "--sample is True, and was False"),
        (["--blank", "___"], "--blank is ___, and was None"),
        (["--input-format", "jsonl"], "--input-format is jsonl, and was lines"),
    ],
)
def test_a_journal_of_another_run(
    invoke: Invoke, source: Path, stop_after: Callable[[int], None], args: list[str], message: str
) -> None:
    stop_after(1)
    assert invoke("map", str(source), "-o", "out").code == 1
    before = Path("out.journal").read_bytes()
    stop_after(0)
    done = invoke("map", str(source), "-o", "out", *args)
    assert (done.code, done.sessions) == (2, []), "seen before the model is opened"
    assert done.stderr == f"switchrun: out.journal belongs to another run: {message} (begin anew with --restart)\n"
    assert Path("out.journal").read_bytes() == before
    done = invoke("map", str(source), "-o", "out", "--restart", *args)
    assert done.code in (3, 4)
    assert "resuming" not in done.stderr
    assert names(source.parent) == {"out", "out.errors.jsonl"}


def test_another_input_or_model(
    invoke: Invoke, source: Path, stop_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(1)
    assert invoke("map", str(source), "-o", "out").code == 1
    stop_after(0)
    source.write_text(LINES.replace("A", "B"))
    assert "what is in IN is another" in invoke("map", str(source), "-o", "out").stderr
    source.write_text(LINES)
    for change, what in (
        ({"fingerprint": "e" * 64}, "the content of the model"),
        ({"revision": "e" * 40}, "the revision of the model"),
        ({"generation": {"length_penalty": 2}}, "the configuration of the model"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("tests.cli.fakes.FakeCheckpoint", lambda change=change: FakeCheckpoint(**change))
            done = invoke("map", str(source), "-o", "out")
        assert done.code == 2
        assert f"{what} is another" in done.stderr
    done = invoke("map", str(source), "-o", "out", "--tokenizer", str(source.parent))
    assert "the tokenizer is another" in done.stderr
    assert invoke("map", str(source), "-o", "out").code == 3
    assert Path("out").read_text() == ANSWERS


def test_an_input_that_changes_meanwhile(invoke: Invoke, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = FakeSession.encode

    def change(self: FakeSession, text: str) -> Any:
        source.write_text("other <extra_id_0>\n")
        return encode(self, text)

    monkeypatch.setattr(FakeSession, "encode", change)
    done = invoke("map", str(source), "-o", "out")
    assert done.code == 4
    assert "has changed since it was begun" in done.stderr
    assert not Path("out").exists()


def test_a_model_that_does_not_open_leaves_nothing(invoke: Invoke, source: Path, tmp_path: Path) -> None:
    assert invoke("map", str(source), "-o", "out", "--cpu-memory", "x").code == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeSession, "__enter__", lambda self: (_ for _ in ()).throw(StorageError("no room")))
        assert invoke("map", str(source), "-o", "out").code == 9
    assert names(tmp_path) == set()


@pytest.mark.parametrize("word", ["CRASH", "BUDGET", "OOM"])
def test_a_fault_ends_it_and_keeps_what_was_answered(invoke: Invoke, tmp_path: Path, word: str) -> None:
    (tmp_path / "in").write_text(f"<extra_id_0>\n{word} <extra_id_0>\n")
    done = invoke("map", "in", "-o", "out", "--batch-size", "1")
    assert done.code == {"CRASH": 1, "BUDGET": 6, "OOM": 6}[word]
    with open_journal(tmp_path / "out.journal", 2) as journal:
        assert journal.answered == 1


# The journal alone


def line(number: int, text: str = "x\n\t\0größer") -> tuple[int, str, bool]:
    return number, json.dumps({"id": number, "input": "i", "text": text}) + "\n", False


def test_a_torn_tail_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with open_journal(path, 3) as journal:
        journal.begin({"a": 1, "b": None})
        journal.append([line(2)])
        whole = path.stat().st_size
        journal.append([line(0)])
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        with open_journal(path, 3) as journal:
            begun = length > content.index(b"\n")
            assert journal.key == ({"a": 1, "b": None} if begun else None)
            assert journal.answered == (length >= whole) + (length == len(content))
            if not begun:
                journal.begin({"a": 1, "b": None})
            missing = [number for number in range(3) if number not in journal]
            journal.append([line(number, f"again {number}") for number in missing])
            records = list(journal.records())
            assert [record["id"] for record in records] == [0, 1, 2]
            for number in missing:
                assert records[number]["text"] == f"again {number}"
        with open_journal(path, 3) as journal:
            assert (journal.answered, journal.damaged) == (3, 0)


def test_every_damaged_byte_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with open_journal(path, 2) as journal:
        journal.begin({"a": 1})
        first = path.stat().st_size
        journal.append([line(0), line(1)])
    content = path.read_bytes()
    good = [json.loads(each[1]) for each in (line(0), line(1))]
    for place in range(first, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with open_journal(path, 2) as journal:
            assert journal.answered < 2
            journal.append([line(number) for number in (0, 1) if number not in journal])
            assert list(journal.records()) == good
    for place in range(first - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises((CorruptCheckpointError, UsageError)):
            open_journal(path, 2)
        if place > 20:
            with open_journal(path, 2, restart=True) as journal:
                assert (journal.begun, journal.key, journal.answered) == (True, None, 0)


@pytest.mark.parametrize(
    "record",
    [
        {"id": 5, "input": "i", "text": "t"},
        {"id": -1, "input": "i", "text": "t"},
        {"id": True, "input": "i", "text": "t"},
        {"id": 0, "input": "i"},
        {"id": 0, "input": 3, "text": "t"},
        {"id": 0, "text": "t"},
        {"id": 0, "input": "i", "error": {"message": 3}},
        {"id": 0, "input": "i", "error": {}},
        ["id"],
        3,
    ],
)
def test_records_that_are_none(tmp_path: Path, record: Any) -> None:
    path = tmp_path / "journal"
    with open_journal(path, 1) as journal:
        journal.begin({})
        journal.append([(0, json.dumps(record), False)])
        with pytest.raises(CorruptCheckpointError):
            list(journal.records())
    with open_journal(path, 1) as journal:
        assert (journal.answered, journal.damaged) == (0, 1)


def test_two_processes(invoke: Invoke, source: Path, tmp_path: Path) -> None:
    with open_journal(tmp_path / "out.journal", 4):
        done = invoke("map", str(source), "-o", "out")
        assert (done.code, done.sessions) == (2, [])
        assert "another process is at work on out.journal" in done.stderr
    assert invoke("map", str(source), "-o", "out").code == 3


def test_a_disk_that_is_full(invoke: Invoke, many: Path, tmpfs: Mount) -> None:
    disk = tmpfs("size=64k")
    done = invoke("map", str(many), "-o", str(disk / "out"))
    assert done.code == 9
    assert done.stderr.splitlines()[-1].endswith(
        "out.journal cannot be written: No space left on device (make room there, or name another OUT)"
    )
    size = (disk / "out.journal").stat().st_size
    with open_journal(disk / "out.journal", 2500) as journal:
        assert 0 < journal.answered < 2500
        assert (journal.damaged, journal._end) == (0, size), "nothing is torn"
    tmpfs("remount,size=8m", disk)
    assert invoke("map", str(many), "-o", str(disk / "out")).code == 3
    assert (disk / "out").read_text().count("\n") == 2500


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv", ".parquet"])
def test_an_output_that_has_no_room(
    invoke: Invoke, tmp_path: Path, source: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    remove, records = Journal.remove, Journal.records

    def limited(self: Journal) -> Iterator[dict[str, Any]]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        return records(self)

    monkeypatch.setattr(Journal, "records", limited)
    try:
        done = invoke("map", str(source), "-o", f"out{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 9, done.stderr
    assert "cannot be written: File too large" in done.stderr.splitlines()[-1]
    assert names(tmp_path) == {f"out{ending}.journal"}
    monkeypatch.setattr(Journal, "records", records)
    assert remove is Journal.remove
    again = invoke("map", str(source), "-o", f"out{ending}")
    assert (again.code, asked(again.sessions)) == (3, [])
    assert names(tmp_path) == {f"out{ending}", f"out{ending}.errors.jsonl"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(invoke: Invoke, source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o555)
    assert invoke("map", str(source), "-o", "folder/out").code == 9


def test_a_read_only_disk(invoke: Invoke, source: Path, tmpfs: Mount) -> None:
    disk = tmpfs("size=64k,ro")
    done = invoke("map", str(source), "-o", str(disk / "out"))
    assert (done.code, done.sessions) == (9, [])
    assert "cannot be written: Read-only file system" in done.stderr


# What a person sees


def test_progress_on_a_terminal(invoke: Invoke, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchrun.output.progress.REDRAW_SECONDS", 0.0)
    monkeypatch.setattr("switchrun.output.progress._SETTLING_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    done = invoke("map", str(many), "-o", "out", terminal=True)
    assert "read: " in done.stderr
    assert "opening the demo model: reading dense weights" in done.stderr
    assert " of 2,500 inputs (" in done.stderr
    assert " inputs/s, " in done.stderr
    assert " left, token 3 of at most 64" in done.stderr
    assert "\x1b" not in invoke("map", str(many), "-o", "quiet", "-q", terminal=True).stderr


def test_a_line_now_and_then_without_a_terminal(invoke: Invoke, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert " inputs (" not in invoke("map", str(many), "-o", "out").stderr
    monkeypatch.setattr("switchrun.output.progress.REPORT_SECONDS", 0.0)
    assert re.search(
        r"^switchrun: 1,\d+ of 2,500 inputs \(\d+ %\), ", invoke("map", str(many), "-o", "again").stderr, re.M
    )
    assert " inputs (" not in invoke("map", str(many), "-o", "quiet", "-q").stderr


# In a process of its own


def child(env: dict[str, str], *args: str, module: str = "tests.cli.fakes") -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *args], env={**env, "FAKE_DELAY": "0.01"}, cwd=ROOT, stderr=subprocess.PIPE
    )


def wait_for(path: Path, nbytes: int) -> None:
    end = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > nbytes):
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal(hermetic: dict[str, str], many: Path, tmp_path: Path, signum: signal.Signals, code: int) -> None:
    out = tmp_path / "out"
    with child(hermetic, "map", str(many), "-o", str(out), "--batch-size", "1") as process:
        wait_for(tmp_path / "out.journal", 20_000)
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    last = stderr.decode().splitlines()[-1]
    assert last.startswith("switchrun: stopped: ")
    assert last.endswith(" of 2,500 inputs are answered; the same command goes on from there")
    with open_journal(tmp_path / "out.journal", 2500) as journal:
        assert f"stopped: {journal.answered:,} of" in last
        assert journal.damaged == 0


@pytest.mark.slow
def test_fifty_kills(hermetic: dict[str, str], many: Path, tmp_path: Path, invoke: Invoke) -> None:
    args = ["map", str(many), "--batch-size", "3", "-o"]
    assert invoke(*args, str(tmp_path / "whole.jsonl")).code == 3
    out, chance, kills, done = tmp_path / "out.jsonl", random.Random(5), 0, None
    for _ in range(500):
        if kills < 50 and out.exists() and not Path(f"{out}.journal").exists():
            out.unlink()  # it was through, if only just before the kill: once more
        with child(hermetic, *args, str(out)) as process:
            try:
                process.wait(chance.uniform(0.2, 0.9) if kills < 50 else 60)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
                continue
            assert process.stderr is not None
            done, stderr = process.returncode, process.stderr.read().decode()
        # A kill between the end of the work and the end of the process leaves a complete output and no journal.
        assert done == 3 or (done == 2 and "is there already" in stderr), stderr
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert Path(f"{out}.errors.jsonl").read_bytes() == (tmp_path / "whole.jsonl.errors.jsonl").read_bytes()
        if kills >= 50:
            break
    assert kills >= 50
    assert done is not None
    assert {path.name for path in tmp_path.glob("*out*")} == {"out.jsonl", "out.jsonl.errors.jsonl"}


@pytest.mark.parametrize(
    "options",
    [pytest.param([], marks=pytest.mark.campaign), pytest.param(["--sample", "--seed", "3"], marks=pytest.mark.slow)],
    ids=["greedy", "sampled"],
)
def test_kills_of_a_real_model(hermetic: dict[str, str], tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "in.txt").write_text(
        "".join("bad\n" if n % 9 == 4 else f"The {n} <extra_id_0> {'sat on ' * (n % 5)}it.\n" for n in range(60))
    )
    args = ["map", str(tmp_path / "in.txt"), "--batch-size", "1", "--max-new-tokens", "8", *options, "-o"]
    with child(hermetic, *args, str(tmp_path / "whole"), module="switchrun") as process:
        assert process.wait(120) == 3
    out, size = tmp_path / "out", 0
    for _ in range(3):
        with child(hermetic, *args, str(out), module="switchrun") as process:
            wait_for(tmp_path / "out.journal", size + 5_000)
            process.kill()
        size = (tmp_path / "out.journal").stat().st_size
    with child(hermetic, *args, str(out), module="switchrun") as process:
        assert process.wait(120) == 3
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
