"""Processes that are killed, and processes that share a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from switchrun.store import Layout, expert_path, verify_store
from tests.store.conftest import data_of, holds, key, no_temporaries, open_store, read, temporaries

_LAYOUT = Layout.of([("wi.weight", "I8", (100_000,))])

_START = """
import itertools, os, random, signal, sys
from switchrun.checkpoint.types import ExpertKey
from switchrun.store import ExpertStore, Layout
from switchrun.store.manifest import Manifest
layout = Layout.of([("wi.weight", "I8", (100_000,))])
store = ExpertStore(sys.argv[1], Manifest("google/switch-base-8", "f1", "int8", layout), warn=sys.exit)
def write(n):
    assert store.write(ExpertKey("encoder", 1, n), random.Random(n).randbytes(layout.nbytes))
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
_POINTS = {
    "half": "real = os.pwrite; os.pwrite = lambda file, data, at: real(file, data[:1], at) if at else (die(), 0)[1]",
    "header": "real = os.pwrite; os.pwrite = lambda file, data, at: die() if at else real(file, data, at)",
    "unsynced": "os.fsync = lambda file: die()",
    "unnamed": "os.replace = lambda *names, **folders: die()",
    "named": "real = os.replace; os.replace = lambda *names, **folders: (real(*names, **folders), die())",
}
#: For every number on stdin, a process that dies at that line of the store's code; its exit code goes to stdout.
_DYING = """
def die_at(last):
    lines = itertools.count(1)
    def trace(frame, event, _):
        if "/switchrun/store/" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(lines) == last:
            die()
        return trace
    sys.settrace(trace)
for number in sys.stdin:
    child = os.fork()
    if child == 0:
        die_at(int(number))
        write(1)
        write(2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def start(offload: Path, code: str, **pipes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _START + code, str(offload)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **pipes)


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


def test_killed_at_every_line(offload):
    """Each line of the store is once the last that a process runs while it replaces an expert and adds another one."""
    first = open_store(offload, layout=_LAYOUT)
    first.write(key(1), data_of(1, _LAYOUT))
    added = expert_path(first.folder, key(2))
    killed = there = 0
    with start(offload, _DYING, stdin=subprocess.PIPE) as process:
        for line in range(1, 1000):
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            store = open_store(offload, layout=_LAYOUT)
            assert no_temporaries(store)
            assert not verify_store(store.folder).damaged
            assert holds(store, 1)
            there += added.exists()
            added.unlink(missing_ok=True)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            killed += 1
    assert code == 0
    assert 1 < there < killed, "some died before the second expert was there, some after"


def test_two_writers_and_a_reader(offload):
    """Both write the same experts again and again; whoever reads meanwhile sees whole ones only."""
    reader = open_store(offload, layout=_LAYOUT)
    code = (
        "import select\n"
        "for n in itertools.count():\n"
        "    write(n % 3)\n"
        "    if n == 3: print('ready', flush=True)\n"
        "    if select.select([sys.stdin], [], [], 0)[0]: break\n"
        "print('done')\n"
    )
    processes = [start(offload, code, stdin=subprocess.PIPE) for _ in range(2)]
    reads = 0
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        while reads < 200:
            assert [process.poll() for process in processes] == [None, None]
            for number in range(3):
                data = read(reader, key(number))
                if data is not None:
                    assert data == data_of(number, _LAYOUT)
                    assert reader.verify(key(number), data)
                    reads += 1
        for process in processes:
            process.stdin.close()
        assert [process.stdout.read() for process in processes] == ["done\n"] * 2
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
            process.stdout.close()
    assert verify_store(reader.folder).experts == 3
    assert not verify_store(reader.folder).damaged
    assert no_temporaries(reader)


def test_a_store_that_another_process_opens_while_it_is_begun(offload, monkeypatch):
    real, stores = fcntl.flock, []

    def flock(file: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        # The first one has created its manifest's temporary file, and nothing tells yet that it has an owner.
        stores.append(open_store(offload))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    stores.append(open_store(offload))
    for number, store in enumerate(stores):
        assert store.write(key(number), data_of(number))
    assert all(holds(store, number) for store in stores for number in range(2))
    assert no_temporaries(stores[0])


def test_processes_that_begin_a_store_at_the_same_time(offload):
    code = "print('ready', flush=True)\nsys.stdin.readline()\n"
    begin = _START.replace("store = ", f"{code}store = ") + "write(int(sys.argv[2]))\nprint('done')"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([sys.executable, "-c", begin, str(offload), str(number)], text=True, **pipes)
        for number in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=30) for process in processes] == [("done\n", "")] * 2
    store = open_store(offload, layout=_LAYOUT)
    assert holds(store, 0)
    assert holds(store, 1)
    assert no_temporaries(store)


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
