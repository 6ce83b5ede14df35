"""`entropy-monitor run` as a user calls it, and what the jobs under it report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_monitor.store import open_run

ROOT = Path(__file__).resolve().parents[2]
JOBS = Path(__file__).parent / "jobs"


def environment(*paths: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ENTROPY_MONITOR_")}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    path = os.pathsep.join(map(str, [*paths, ROOT, ROOT / "hooks", ROOT / "dashboard"]))
    return {**kept, "PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", **variables}


@dataclass
class Ended:
    code: int
    reports: list[dict[str, Any]]
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        (only,) = self.reports
        return only


def start(*command: object, paths: tuple[Path, ...] = (), **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(*paths, **variables),
        cwd=JOBS,
    )


def end(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=90)
    lines = [line for line in out.splitlines() if line.startswith("REPORT ")]
    return Ended(process.returncode, [json.loads(line.removeprefix("REPORT ")) for line in lines], out, err)


def launcher(run: Path, *options: object) -> list[object]:
    return [sys.executable, "-m", "entropy_monitor", "run", "--run", run, *options, "--"]


def launch(run: Path, *command: object, every: int = 2, options: tuple[str, ...] = (), **more: Any) -> Ended:
    """Run a command under the launcher to its end."""
    return end(start(*launcher(run, "--every", every, "-v", *options), *command, **more))


def steps(run: Path, rank: int = 0) -> list[tuple[int, int]]:
    """Attempt and step of each frame of a rank."""
    return [(frame.attempt, frame.step) for frame in open_run(run).frames(arrays=False) if frame.rank == rank]
