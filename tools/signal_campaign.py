"""Sends signals to `switchrun fill` at random moments, and counts the ends: `python tools/signal_campaign.py 200`."""

from __future__ import annotations

import argparse
import collections
import random
import signal
import subprocess
import sys
import time

TEXT = "A <extra_id_0> walks into a bar.\n"
#: So long Python itself may take to start on a busy machine.
START_SECONDS = 0.15


def main() -> None:
    """Send them, and end with 1 if one run was not ended by its signal, or took over a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("signals", type=int, nargs="?", default=30)
    parser.add_argument("--seconds", type=float, default=3.0, help="the latest moment")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments, slowest, bad = random.Random(options.seed), 0.0, 0
    ends: collections.Counter[str] = collections.Counter()
    for number in range(options.signals):
        moment, signum = moments.uniform(0.0, options.seconds), moments.choice((signal.SIGINT, signal.SIGTERM))
        code, stdout, stderr, took = interrupt(moment, signum)
        expected = {128 + signum} | ({0} if stdout else set())
        ends[f"{signum.name}: {code}{', answered' if stdout else ''}"] += 1
        slowest = max(slowest, took)
        if moment > START_SECONDS and (code not in expected or took > 1 or stderr):
            bad += 1
            print(f"{number}: {signum.name} after {moment:.3f} s: {code} in {took:.2f} s: {stderr.strip()!r}")
    print(", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
    print(f"slowest end {slowest:.2f} s; {bad} of {options.signals} bad")
    sys.exit(bool(bad))


def interrupt(moment: float, signum: signal.Signals) -> tuple[int, str, str, float]:
    """Return exit code, stdout, stderr, and the seconds that a run took to end after its signal."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "switchrun", "fill", TEXT]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=_heed) as process:
        time.sleep(moment)
        sent = time.monotonic()
        process.send_signal(signum)
        stdout, stderr = process.communicate()
        return process.returncode, stdout, stderr, time.monotonic() - sent


def _heed() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it


if __name__ == "__main__":
    main()
