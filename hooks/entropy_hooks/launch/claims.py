"""Which run a launched process writes to: the one named, or beside it when another job of the launch trains there.

Ranks of one distributed job share a run. Independent ones must not: each trainer of a run takes over from the other.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from entropy_hooks.ranks import launch_id, process_started

Slots = dict[str, dict[str, Any]]


def claim_run() -> str | None:
    """Claim the run in ``ENTROPY_MONITOR_RUN``, else ``RUN-2``, ``RUN-3``, ...

    A claim ends with its processes, so that a job started again under the same launcher is a new attempt.

    Returns:
        The run; None when the environment names none.
    """
    run, directory = os.environ.get("ENTROPY_MONITOR_RUN"), os.environ.get("ENTROPY_MONITOR_LAUNCH")
    if not run or not directory:
        return run
    try:
        number = _claim(Path(directory) / "claims.json")
    except (OSError, ValueError):  # the launcher is on another machine, or has gone
        number = 1
    return run if number == 1 else f"{run.rstrip('/')}-{number}"


def _claim(path: Path) -> int:
    job = _job()
    with path.open("a+", encoding="utf-8") as table:
        fcntl.flock(table, fcntl.LOCK_EX)
        table.seek(0)
        slots: Slots = json.loads(table.read() or "{}")
        number = 1
        while _is_taken(slot := slots.setdefault(str(number), {"job": job, "processes": {}}), job):
            number += 1
        if slot["job"] != job:
            slot["job"], slot["processes"] = job, {}
        slot["processes"][str(os.getpid())] = process_started(os.getpid())
        table.truncate(0)
        table.write(json.dumps(slots))
    return number


def _is_taken(slot: dict[str, Any], job: str) -> bool:
    return slot["job"] != job and any(
        process_started(int(pid)) == started and started is not None for pid, started in slot["processes"].items()
    )


def _job() -> str:
    """What all ranks of a job share, and no other job has.

    Returns:
        The name.
    """
    if (launch := launch_id()) is not None:
        # torchrun calls every job "none" unless told otherwise.
        return f"{launch} at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if dist.is_available() and dist.is_initialized():
        return f"children of {os.getppid()}"
    return f"process {os.getpid()}"
