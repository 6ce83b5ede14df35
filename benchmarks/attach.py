"""Entering running processes: how long a target stands still, and what survives when the entering side is killed.

Targets compute, allocate and wait; each must come to the result of its undisturbed twin. `--storm` kills the process
that holds the target at random microseconds of the stop; `--cli-storm` the command line, at random moments.
Prints a table; exits 1 if a target was harmed.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(prog="run.py bench attach", description=__doc__)
    parser.add_argument("--injections", type=int, default=200, help="a target")
    parser.add_argument("--storm", type=int, default=500, help="deaths of the tracer, a target")
    parser.add_argument("--cli-storm", type=int, default=60, help="deaths of the command line, a target")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    harmed = 0
    with tempfile.TemporaryDirectory() as directory:
        harmed += stop_times(Path(directory), given.injections)
        harmed += tracer_storm(Path(directory), given.storm, random.Random(given.seed))
        harmed += command_storm(Path(directory), given.cli_storm, random.Random(given.seed))
    print(f"targets harmed: {harmed}")
    return 1 if harmed else 0


def stop_times(directory: Path, injections: int) -> int:
    from entropy_monitor.injection.send import choose_route, send
    from tests.injection.targets import Target, find_python

    print(f"{injections} injections a target; milliseconds that its main thread stood still")
    print(f"{'python':>7} {'target':<10} {'p50':>7} {'p99':>7} {'max':>7}   {'answer after, p50':>18}")
    harmed = 0
    for version in ("3.11", "3.12", "3.13", "3.14"):
        python = find_python(version)
        if python is None:
            print(f"{version:>7} not on this machine")
            continue
        for mode in ("memory", "nanosleep", *(["numpy"] if python == sys.executable else [])):
            stopped, answered = [], []
            with Target(directory, mode, python) as target:
                for _ in range(injections):
                    route = choose_route(target.pid, "ptrace")
                    before = time.perf_counter()
                    _, route = send(route, {"verb": "ping"}, 20.0)
                    answered.append(time.perf_counter() - before)
                    stopped.append((route.stopped_s or 0.0) * 1e3)
                harmed += is_harmed(target)
            stopped.sort()
            p50, p99 = (stopped[int(len(stopped) * part)] for part in (0.5, 0.99))
            after = sorted(answered)[len(answered) // 2] * 1e3
            print(f"{version:>7} {mode:<10} {p50:7.2f} {p99:7.2f} {stopped[-1]:7.2f}   {after:18.0f}", flush=True)
    return harmed


def tracer_storm(directory: Path, deaths: int, luck: random.Random) -> int:
    from tests.injection.targets import Target
    from tests.injection.test_tracer_death import INTERRUPTED, strike

    harmed = 0
    for mode in ("numpy", "compute", "read", "nanosleep"):
        marks = directory / mode
        marks.mkdir()
        with Target(directory, mode) as target:
            for _ in range(deaths):
                strike(target, "time", luck.randrange(1, 1500), marks / "mark")
            harmed += is_harmed(target, INTERRUPTED if mode == "nanosleep" else ())
        queued = len(list(marks.iterdir()))
        print(f"tracer killed {deaths} times, target {mode}: {queued} had queued their code", flush=True)
    return harmed


def command_storm(directory: Path, deaths: int, luck: random.Random) -> int:
    from tests.injection.targets import Target, wait_until

    harmed = 0
    numbers = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for mode in ("numpy", "nanosleep"):
        with Target(directory, mode) as target:
            for turn in range(deaths):
                command = [
                    sys.executable,
                    "-m",
                    "entropy_monitor",
                    "attach",
                    str(target.pid),
                    "--run",
                    str(directory / "run"),
                ]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
                time.sleep(luck.uniform(0.3, 0.9))
                process.send_signal(numbers[turn % len(numbers)])
                process.wait(30)
                wait_until(lambda: target.state in "RS", "the target to go on")
            time.sleep(0.5)
            harmed += is_harmed(target)
        print(f"command line killed {deaths} times (KILL, INT, TERM, HUP), target {mode}", flush=True)
    return harmed


def is_harmed(target: object, allowed: tuple[str, ...] = ()) -> bool:
    try:
        target.finish(allowed)  # type: ignore[attr-defined]
    except AssertionError:
        traceback.print_exc(file=sys.stdout)
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
