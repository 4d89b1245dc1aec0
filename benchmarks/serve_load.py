r"""What a warm server answers: 16 clients against one, beside the cold command; and a long run that may lose nothing.

    python benchmarks/serve_load.py speed [--model DIR]
    python benchmarks/serve_load.py load --requests 10000 --seconds 300

`speed` prints requests/s and the 50th and 95th percentile of their seconds for 1 and for 16 clients, each against a
server whose batch size is 1 and one whose batch size is auto, and the seconds of the cold command.
`load` sends requests from 16 clients, of which a tenth leave before the answer, and a twentieth are wrong. Every answer
must be that of its own text. It prints memory and open files over the second half, in which neither may grow.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLIENTS = 16
WORDS = "the a man walks into bar and orders beer with pinch of salt while old woman reads book".split()


def text(draw: random.Random) -> str:
    """Make a text with one or two sentinels."""
    words = draw.choices(WORDS, k=draw.randint(4, 12))
    for number, place in enumerate(sorted(draw.sample(range(len(words)), draw.randint(1, 2)))):
        words[place] = f"<extra_id_{number}>"
    return " ".join(words) + " ."


@contextlib.contextmanager
def server(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server; yields its process and address."""
    command = [sys.executable, "-m", "switchrun", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = ""
        while "is ready at" not in line:
            line = process.stderr.readline()
            if not line:
                raise SystemExit("the server did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, line.split()[-1].removeprefix("http://")
    finally:
        process.terminate()
        process.wait()


def post(connection: http.client.HTTPConnection, body: dict[str, Any]) -> tuple[int, Any]:
    """Send one request on a connection that stays open."""
    connection.request("POST", "/v1/fill", json.dumps(body))
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def measure(address: str, clients: int, seconds: float) -> tuple[float, float, float]:
    """Return requests/s, and the median and 95th percentile of their seconds."""
    took: list[float] = []
    end = time.monotonic() + seconds

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        connection = http.client.HTTPConnection(address, timeout=600)
        while time.monotonic() < end:
            start = time.monotonic()
            status, _ = post(connection, {"text": text(draw), "max_new_tokens": 8})
            assert status == 200
            took.append(time.monotonic() - start)

    start = time.monotonic()
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = time.monotonic() - start
    return len(took) / whole, statistics.median(took), statistics.quantiles(took, n=20)[-1]


def speed(options: argparse.Namespace) -> None:
    """Print the table of speeds."""
    model = ["--model", options.model] if options.model else []
    start = time.monotonic()
    for _ in range(3):
        command = [
            sys.executable,
            "-m",
            "switchrun",
            "fill",
            "-q",
            "--max-new-tokens",
            "8",
            *model,
            text(random.Random(0)),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    cold = (time.monotonic() - start) / 3
    print(f"cold command: {cold:.2f} s, {1 / cold:.2f} requests/s\n")
    print("| batch size | clients | requests/s | p50 s | p95 s | x cold |\n| --- | --- | --- | --- | --- | --- |")
    for size in ("1", "auto"):
        with server("--batch-size", size, *model) as (_, address):
            measure(address, 4, 2)  # warm
            for clients in (1, CLIENTS):
                rate, median, late = measure(address, clients, options.seconds)
                print(
                    f"| {size} | {clients} | {rate:.1f} | {median:.3f} | {late:.3f} | {rate * cold:.0f} |", flush=True
                )


def load(options: argparse.Namespace) -> None:
    """Send many requests, and look for one that is lost, or answered with another's answer."""
    answers: dict[str, str] = {}
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    left = iter(range(options.requests))
    samples: list[tuple[float, int, int]] = []
    start = time.monotonic()
    pause = options.seconds / options.requests * CLIENTS

    def ask(seed: int, address: str) -> None:
        draw = random.Random(seed)
        host, port = address.rsplit(":", 1)
        connection = http.client.HTTPConnection(address, timeout=600)
        while True:
            with lock:
                if next(left, None) is None:
                    return
            begun = time.monotonic()
            sent, kind = text(random.Random(draw.randrange(200))), draw.random()
            if kind < 0.1:
                body = json.dumps({"text": sent, "max_new_tokens": 8, "stream": draw.random() < 0.5}).encode()
                with socket.create_connection((host, int(port))) as leaving:
                    head = f"POST /v1/fill HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                    leaving.sendall(head.encode() + body)
                    time.sleep(draw.random() * 0.1)
                outcome = "left"
            elif kind < 0.15:
                status, _ = post(connection, draw.choice([{"text": "none"}, {}, {"text": sent, "num_beams": 99}]))
                outcome = "refused" if status == 422 else f"wrong status {status}"
            else:
                status, record = post(connection, {"text": sent, "max_new_tokens": 8})
                outcome = "answered" if status == 200 else f"status {status}"
                if status == 200:
                    with lock:
                        if record["input"] != sent or answers.setdefault(sent, record["text"]) != record["text"]:
                            outcome = "another's answer"
            with lock:
                counts[outcome] += 1
            time.sleep(max(0.0, pause - (time.monotonic() - begun)))

    with server() as (process, address):
        threads = [threading.Thread(target=ask, args=(seed, address)) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            status = Path(f"/proc/{process.pid}/status").read_text()
            rss = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) // 1024
            fds = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
            samples.append((time.monotonic() - start, rss, fds))
            time.sleep(1)
    print(f"{sum(counts.values())} requests in {time.monotonic() - start:.0f} s: {dict(counts)}")
    half = samples[len(samples) // 2 :]
    for name, at in (("MiB resident", 1), ("open files", 2)):
        values = [sample[at] for sample in half]
        print(
            f"{name} in the second half: first {values[0]}, least {min(values)}, most {max(values)}, last {values[-1]}"
        )


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    table = commands.add_parser("speed")
    table.add_argument("--model")
    table.add_argument("--seconds", type=float, default=10)
    table.set_defaults(run=speed)
    long = commands.add_parser("load")
    long.add_argument("--requests", type=int, default=10_000)
    long.add_argument("--seconds", type=float, default=300)
    long.set_defaults(run=load)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
