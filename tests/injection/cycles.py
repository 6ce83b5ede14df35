"""Attaching to a live training process and detaching again, many times, by whichever way."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropy_monitor.injection.send import Method, choose_route, send

JOB = Path(__file__).parent / "training_job.py"


@dataclass
class Cycles:
    """What many cycles did to the process."""

    stopped_s: list[float] = field(default_factory=list)
    attach_s: list[float] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    """After each detach."""
    descriptors: list[int] = field(default_factory=list)
    mappings: list[int] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    """Of the job that was entered."""
    twin: dict[str, Any] = field(default_factory=dict)
    """Of one that ran as many steps undisturbed."""


def cycle(directory: Path, count: int, method: Method = "ptrace", options: dict[str, Any] | None = None) -> Cycles:
    """Train, attach and detach `count` times, then compare with an undisturbed run of the same length."""
    found = Cycles()
    stop = directory / "stop"
    with subprocess.Popen([sys.executable, JOB, directory / "entered.json", stop], stdout=subprocess.PIPE) as job:
        try:
            assert job.stdout is not None
            assert job.stdout.readline() == b"training\n"
            for _ in range(count):
                _one(found, job.pid, directory / "run", method, options or {})
            stop.touch()
            assert job.wait(60) == 0
        finally:
            job.kill()
    found.report = json.loads((directory / "entered.json").read_text())
    steps = str(found.report["steps"])
    subprocess.run([sys.executable, JOB, directory / "twin.json", stop, steps], check=True, stdout=subprocess.DEVNULL)
    found.twin = json.loads((directory / "twin.json").read_text())
    return found


def _one(found: Cycles, pid: int, run: Path, method: Method, options: dict[str, Any]) -> None:
    before = time.perf_counter()
    attach = {"verb": "attach", "run": str(run), "options": options, "wait_s": 30.0}
    reply, route = send(choose_route(pid, method), attach, 30.0)  # type: ignore[arg-type]
    found.attach_s.append(time.perf_counter() - before)
    assert reply["ok"], reply["message"]
    found.replies.append(dict(reply))
    found.stopped_s.append(route.stopped_s or 0.0)
    reply, route = send(choose_route(pid, method), {"verb": "detach", "wait_s": 30.0}, 30.0)  # type: ignore[typeddict-item]
    assert reply["ok"], reply["message"]
    found.stopped_s.append(route.stopped_s or 0.0)
    found.threads.append(len(list(Path(f"/proc/{pid}/task").iterdir())))
    found.descriptors.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
    found.mappings.append(len(Path(f"/proc/{pid}/maps").read_text().splitlines()))


def quantile(values: list[float], share: float) -> float:
    """Of the sorted values."""
    return statistics.quantiles(values, n=1000, method="inclusive")[round(1000 * share) - 1]
