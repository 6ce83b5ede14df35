"""Which processes of this machine are ranks of one training job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_monitor.errors import NoSuchProcessError
from entropy_monitor.injection.interpreter import is_python, maps_torch
from entropy_monitor.injection.process import ZOMBIE, Process, read_environ, read_process

if TYPE_CHECKING:
    from collections.abc import Mapping

_JOB = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a job."""

    pid: int
    rank: int | None
    """None where the process's environment does not tell."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    process: Process
    environ: Mapping[str, str]


def find_ranks(pid: int) -> list[Rank]:
    """Find all ranks of a process's job on this machine.

    Ranks of a launcher share ``MASTER_ADDR:MASTER_PORT`` and ``TORCHELASTIC_RUN_ID``, as far as they are set, and
    differ in ``RANK``. Without these (``torch.multiprocessing.spawn``), ranks are Python processes that have loaded
    PyTorch and have the same parent.

    Args:
        pid: one of them.

    Returns:
        The ranks, this one among them, by rank.
    """
    given = read_process(pid)
    environ = _environ(pid)
    if "RANK" in environ and any(name in environ for name in _JOB):
        found = _by_environment(_Candidate(given, environ))
    else:
        siblings = [other for other in _processes() if other.parent == given.parent and other.pid != pid]
        found = {other.pid: None for other in siblings if maps_torch(pid) and maps_torch(other.pid)} | {pid: None}
    ranks = [Rank(number, rank) for number, rank in found.items()]
    return sorted(ranks, key=lambda one: (one.rank is None, one.rank or 0, one.pid))


def _by_environment(given: _Candidate) -> dict[int, int | None]:
    members = {given.process.pid: given}
    for process in _processes():
        environ = _environ(process.pid)
        same = all(environ.get(name) == given.environ.get(name) for name in _JOB)
        if same and "RANK" in environ and is_python(process.pid):
            members[process.pid] = _Candidate(process, environ)
    ranks: dict[int, int | None] = {given.process.pid: _rank(given)}
    for number, one in members.items():
        # Workers of a DataLoader and other children inherit the environment of their rank.
        parent = members.get(one.process.parent)
        inherited = parent is not None and _rank(parent) == _rank(one)
        if not inherited and _rank(one) not in ranks.values():
            ranks[number] = _rank(one)
    return ranks


def _rank(one: _Candidate) -> int | None:
    rank = one.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else None


def _environ(pid: int) -> dict[str, str]:
    try:
        return read_environ(pid)
    except OSError:  # gone, or another user's: no rank of ours
        return {}


def _processes() -> list[Process]:
    found: list[Process] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                process = read_process(int(entry.name))
            except NoSuchProcessError:
                continue
            if process.state not in ZOMBIE:
                found.append(process)
    return found
