"""Processes that are killed, and processes that share a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from switchrun.store import Layout, verify_store
from switchrun.store.files import temporaries
from tests.store.conftest import data_of, holds, key, no_temporaries, open_store, read

_LAYOUT = Layout.of([("wi.weight", "I8", (400_000,))])

_START = """
import itertools, os, random, signal, sys
from switchrun.checkpoint.types import ExpertKey
from switchrun.store import ExpertStore, Layout
layout = Layout.of([("wi.weight", "I8", (400_000,))])
store = ExpertStore.open(sys.argv[1], "google/switch-base-8", "f1", "int8", layout, warn=sys.exit)
def write(n):
    assert store.write(ExpertKey("encoder", 1, n), random.Random(n).randbytes(layout.nbytes))
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
_POINTS = {
    "half": "real = os.pwrite; os.pwrite = lambda file, data, at: real(file, data[:1], at) if at else (die(), 0)[1]",
    "header": "real = os.pwrite; os.pwrite = lambda file, data, at: die() if at else real(file, data, at)",
    "unsynced": "os.fsync = lambda file: die()",
    "unnamed": "os.replace = lambda *names: die()",
    "named": "real = os.replace; os.replace = lambda *names: (real(*names), die())",
}
_LOOP = "print('ready', flush=True)\nfor n in itertools.count(): write(n % 5)"


def start(offload: Path, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _START + code, str(offload)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("point", _POINTS)
def test_killed_in_the_middle_of_a_write(offload, point):
    first = open_store(offload, layout=_LAYOUT)
    first.write(key(1), data_of(1, _LAYOUT))
    with start(offload, f"{_POINTS[point]}\nwrite(2)") as process:
        assert process.wait(30) == -signal.SIGKILL
    assert len(temporaries(first.folder)) == (point != "named")

    store = open_store(offload, layout=_LAYOUT)
    assert no_temporaries(store)
    assert holds(store, 1)
    assert (store.find(key(2)) is not None) == (point == "named")
    assert store.write(key(2), data_of(2, _LAYOUT))
    assert holds(store, 1)
    assert holds(store, 2)


def test_killed_at_any_moment(offload):
    chance, seen = random.Random(0), 0
    for _ in range(12):
        with start(offload, _LOOP) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0, 0.03))
            process.kill()
            assert process.wait(30) == -signal.SIGKILL
        store = open_store(offload, layout=_LAYOUT)
        assert no_temporaries(store)
        report = verify_store(store.folder)
        assert not report.damaged
        seen += report.experts
        assert store.write(key(7), data_of(7, _LAYOUT))
        for path in store.folder.glob("*/*.safetensors"):
            assert holds(store, int(path.stem))
            path.unlink()
    assert seen > 12


def test_two_writers_and_a_reader(offload):
    """Both write the same experts again and again; whoever reads meanwhile sees whole ones only."""
    reader = open_store(offload, layout=_LAYOUT)
    code = "print('ready', flush=True)\nfor n in range(60): write(n % 3)\nprint('done')"
    processes = [start(offload, code) for _ in range(2)]
    reads = 0
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        while any(process.poll() is None for process in processes):
            for number in range(3):
                data = read(reader, key(number))
                if data is not None:
                    assert data == data_of(number, _LAYOUT)
                    assert reader.verify(key(number), data)
                    reads += 1
        assert [process.stdout.read() for process in processes] == ["done\n"] * 2
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
            process.stdout.close()
    assert reads > 3
    assert verify_store(reader.folder).experts == 3
    assert not verify_store(reader.folder).damaged
    assert no_temporaries(reader)


def test_without_locks_only_old_temporaries_go(offload, monkeypatch):
    store = open_store(offload)
    new, old = store.folder / ".1-00000000.tmp", store.folder / ".1-00000001.tmp"
    for path, age in ((new, 60), (old, 3600)):
        path.write_text("")
        os.utime(path, (time.time() - age,) * 2)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    open_store(offload)
    assert temporaries(store.folder) == [new]
    assert store.write(key(1), data_of(1))
