"""A process in which torch and transformers are imported, and which forks a child for each job: that takes no time.

Jobs and results are lines of JSON. A child has 10 s of processor time and a limit of memory, and is watched: which
files outside of its folders it writes or reads. Run by `Zygote`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CPU_SECONDS = 10
#: A child that sleeps or waits is ended after this time, on a machine that is busy with others.
WALL_SECONDS = 60
_ADDRESS_SPACE = 4 << 30


class Zygote:
    """The process, from outside; a context manager."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**env, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parent.parent.parent,
            text=True,
        )

    def run(self, **job: Any) -> dict[str, Any]:
        """Run a job: `work` is `switchrun` with `args`, or `transformers` with `folder` and `text`.

        The result has `exit` (a code, `hang`, or the name of a signal), `stdout`, `stderr`, `grown_bytes`, by how much
        the child grew, and `touched`, files outside that it wrote or read.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        return result

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def _serve() -> None:
    import accelerate.hooks
    import torch
    import transformers
    from transformers import AutoTokenizer, GenerationConfig, SwitchTransformersForConditionalGeneration

    import switchrun.cli.app
    import switchrun.model.engine

    assert all((accelerate.hooks, torch, switchrun.cli.app, switchrun.model.engine))
    assert all((AutoTokenizer, GenerationConfig, SwitchTransformersForConditionalGeneration))
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    # Read by itself: a child must not find the next job in the buffer of its stdin.
    with os.fdopen(os.dup(0), "rb", buffering=0) as jobs:
        while line := jobs.readline():
            sys.stdout.write(json.dumps(_run(json.loads(line))) + "\n")
            sys.stdout.flush()


def _run(job: dict[str, Any]) -> dict[str, Any]:
    scratch = Path(job["scratch"])
    before = _resident_bytes()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 99
        try:
            code = _child(job, scratch)
        finally:
            os._exit(code)
    handle = os.pidfd_open(child)
    hangs = not select.select([handle], [], [], WALL_SECONDS)[0]
    if hangs:
        os.kill(child, signal.SIGKILL)
    os.close(handle)
    _, status, usage = os.wait4(child, 0)
    end: int | str = os.waitstatus_to_exitcode(status)
    if hangs or end == -signal.SIGXCPU:
        end = "hang"
    elif isinstance(end, int) and end < 0:
        end = signal.Signals(-end).name
    touched = scratch / "touched"
    return {
        "exit": end,
        "stdout": (scratch / "out").read_text(encoding="utf-8", errors="replace")[:100_000],
        "stderr": (scratch / "err").read_text(encoding="utf-8", errors="replace")[:10_000],
        "grown_bytes": max(0, usage.ru_maxrss * 1024 - before),
        "touched": touched.read_text().splitlines() if touched.exists() else [],
    }


def _child(job: dict[str, Any], scratch: Path) -> int:
    for target, name, flags in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
        path = scratch / name
        path.write_bytes(job.get("stdin", "").encode() if name == "in" else b"")
        os.dup2(os.open(path, flags | os.O_APPEND), target)
    (scratch / "touched").unlink(missing_ok=True)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, encoding="utf-8", closefd=False) for number, mode in enumerate(("r", "w", "w"))
    )
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + _ADDRESS_SPACE, size + _ADDRESS_SPACE))
    os.chdir(scratch)
    _watch(scratch / "touched", [*map(Path, job["writable"]), scratch], Path(job["secret"]))
    code = _transformers(job) if job["work"] == "transformers" else _switchrun(job["args"])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


def _watch(report: Path, writable: list[Path], secret: Path) -> None:
    """Note what is written outside of some folders, what is read in `secret`, and every program that is started."""
    file = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    allowed = [str(path.resolve()) for path in writable]
    forbidden = str(secret.resolve())

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            flags = args[2] if isinstance(args[2], int) else 0
            given = Path(os.fsdecode(args[0]))
            path = os.path.realpath(given)
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            outside = not any(path.startswith(each) for each in (*allowed, "/dev/"))
            # A descriptor of a folder was given: the name alone says nothing.
            if path.startswith(forbidden) or (writes and outside and given.is_absolute()):
                os.write(file, f"{event} {path}\n".encode("utf-8", "backslashreplace"))
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "exec.checkpoint"):
            os.write(file, f"{event} {args[0]!r}\n".encode())

    sys.addaudithook(hook)


def _switchrun(args: list[str]) -> int:
    from switchrun.cli.app import main

    sys.argv = ["switchrun", *args]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def _transformers(job: dict[str, Any]) -> int:
    """Print what plain transformers answers, and how it loaded the model: the oracle."""
    import torch
    from transformers import AutoTokenizer, SwitchTransformersForConditionalGeneration

    model, info = SwitchTransformersForConditionalGeneration.from_pretrained(
        job["folder"], dtype="auto", trust_remote_code=False, output_loading_info=True
    )
    model = model.eval()
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=False)
    encoded = tokenizer(job["text"], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(
            encoded.input_ids,
            attention_mask=encoded.get("attention_mask"),
            max_new_tokens=job["max_new_tokens"],
            do_sample=False,
            num_beams=1,
        )[0].tolist()
    eos = model.generation_config.eos_token_id
    record = {
        "ids": ids,
        "eos": eos if isinstance(eos, list) else [eos],
        "dtype": str(model.dtype),
        "clean": not any(len(info[key]) for key in ("missing_keys", "mismatched_keys", "error_msgs")),
    }
    sys.stdout.write(json.dumps(record) + "\n")
    return 0


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    _serve()
