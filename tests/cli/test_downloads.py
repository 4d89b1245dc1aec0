"""Downloads of whole models: the question before much is downloaded, and the progress."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from switchrun.cli import downloads
from switchrun.cli.downloads import open_for_processes
from switchrun.errors import SwitchrunError
from switchrun.planning.options import OpenOptions
from tests.cli.conftest import Invoke
from tests.support.fake_hub import FakeHub

COMMAND = ("fill", "A <extra_id_0> b", "--model", "org/tiny", "-q")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub that has org/tiny, of 5,002 bytes."""
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(5000))
    (folder / "pytorch_model.bin").write_bytes(bytes(7000))
    with FakeHub() as hub:
        hub.use(monkeypatch)
        hub.add("org/tiny", folder)
        yield hub


def test_a_terminal_is_asked_before_a_large_download(
    invoke: Invoke, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_MUCH_BYTES", 5000)
    done = invoke(*COMMAND, "--hub", "download", input=b"n\n", terminal=True)
    question = "Download 4.88 KiB of org/tiny? [y/N] "
    refusal = "switchrun: nothing was downloaded (--hub ranges reads what is needed, and no more)\n"
    assert (done.code, done.stdout, done.stderr) == (2, "", question + refusal)
    assert not done.sessions
    done = invoke(*COMMAND, "--hub", "download", input=b"y\n", terminal=True)
    assert done.code == 0
    assert done.stderr.startswith(question)
    assert done.sessions[0].opening.hub == "download"
    assert not hub.sent("cdn")


def test_nobody_is_asked_needlessly(invoke: Invoke, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for way, much, terminal in (
        ("download", 5002, True),  # not more than that
        ("download", 0, False),  # a script
        ("ranges", 0, True),
        ("auto", 0, True),
    ):
        monkeypatch.setattr(downloads, "_MUCH_BYTES", much)
        done = invoke(*COMMAND, "--hub", way, terminal=terminal)
        assert (done.code, "Download" in done.stderr) == (0, False)


def test_a_hub_that_does_not_answer_is_left_to_whoever_opens_the_model(
    invoke: Invoke, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_MUCH_BYTES", 0)
    done = invoke("fill", "A <extra_id_0> b", "--model", "org/none", "-q", "--hub", "download", terminal=True)
    assert (done.code, len(done.sessions)) == (0, 1)


def test_the_way_from_the_environment_and_a_wrong_one(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(*COMMAND, "--hub", "ftp").code == 2
    monkeypatch.setenv("SWITCHRUN_HUB", "ranges")
    assert invoke(*COMMAND).sessions[0].opening.hub == "ranges"


def test_what_opens_a_model_for_others_shows_its_steps_and_erases_them(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    shown, quiet = Terminal(), Terminal()
    opening = OpenOptions(model="org/tiny", hub="ranges")
    for stderr, unwanted in ((shown, False), (quiet, True)):
        monkeypatch.setattr("sys.stderr", stderr)
        with pytest.raises(SwitchrunError):  # 5,000 zeros are no weights
            open_for_processes(opening, quiet=unwanted)
    erase = "\r\x1b[2K"
    assert shown.getvalue().split(erase)[1:3] == ["opening tiny…", "opening tiny: asking the Hub"]
    assert "opening tiny: reading headers" in shown.getvalue()
    assert shown.getvalue().endswith(erase)
    assert quiet.getvalue() == ""
