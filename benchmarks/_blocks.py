"""Interleaved blocks of steps: each contender between two bare blocks, in a new random order every round.

A machine that is shared grows slower and faster from minute to minute; neighbours in time meet the same machine.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from _contenders import Attached, Contender, Watch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from _gpt import Job

CLOCKS = ("thread", "process", "wall")


@dataclass(slots=True)
class Block:
    """Seconds a step on each clock, and what was left on disk."""

    thread: float
    """CPU time of the training thread: what other processes do hardly shows in it."""
    process: float
    """CPU time of all threads and child processes, background work of the block included."""
    wall: float
    megabytes: float = 0.0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Median over rounds, in percent of a bare step."""

    median: float
    low: float
    high: float
    standard_error: float


@contextlib.contextmanager
def _attached(job: Job, contender: Contender, directory: Path) -> Iterator[Attached]:
    directory.mkdir(parents=True)
    try:
        with contender.watch(job, directory) as attached:
            yield attached
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def measure(job: Job, contender: Contender, directory: Path, steps: int) -> Block:
    """Set-up, a first sampled step and teardown are outside what is measured."""
    with _attached(job, contender, directory) as attached:
        for _ in range(2 if contender.every == 1 else 1):
            job.step(attached.on_step)
        attached.drain()
        size, dropped = _size(directory), attached.dropped()
        process, wall, thread = _process_s(), time.perf_counter(), time.thread_time()
        for _ in range(steps):
            job.step(attached.on_step)
        thread, wall = time.thread_time() - thread, time.perf_counter() - wall
        attached.drain()
        process = _process_s() - process
        written = (_size(directory) - size) / 1e6
        return Block(thread / steps, process / steps, wall / steps, written / steps, attached.dropped() - dropped)


def interleave(
    job: Job, contenders: Sequence[Contender], directory: Path, rounds: int, steps: int, bare_steps: int
) -> Iterator[tuple[int, str, Block, tuple[Block, Block]]]:
    """Blocks of each contender with its two bare neighbours, as they are measured.

    Raises:
        Exception: whatever a contender raises.
    """
    bare = Contender(name="bare", watch=contenders[0].watch, kind="floor")
    order, draw = list(contenders), random.Random(0)
    for index in range(rounds):
        draw.shuffle(order)
        before = measure(job, bare, directory / "bare", bare_steps)
        for contender in order:
            # Multiples of the period: each block holds its share of sampled steps.
            length = contender.every * max(1, round(steps / contender.every))
            block = measure(job, contender, directory / "watched", length)
            after = measure(job, bare, directory / "bare", bare_steps)
            yield index, contender.name, block, (before, after)
            before = after


def overhead(pairs: Sequence[tuple[Block, tuple[Block, Block]]], clock: str) -> Estimate:
    """How much longer a contender's steps are than those of its neighbours; medians, quartiles and standard error."""
    added = [
        100 * (getattr(block, clock) / statistics.mean(getattr(bare, clock) for bare in neighbours) - 1)
        for block, neighbours in pairs
    ]
    return _estimate(added)


def _estimate(added: Sequence[float]) -> Estimate:
    if len(added) < 2:
        return Estimate(added[0], added[0], added[0], math.nan)
    low, median, high = statistics.quantiles(added, n=4, method="inclusive")
    # Of a median: 1.25 times that of a mean; the spread from the quartiles, for a stray block is not noise of all.
    return Estimate(median, low, high, 1.253 * (high - low) / 1.349 / math.sqrt(len(added)))


def sampled_step_overhead(job: Job, watch: Watch, directory: Path, periods: int) -> Estimate:
    """What one sampled step costs, in percent of a bare step, from `watch` at every 5th step.

    A sampled step and the one after it, beside which the background thread works, against the last two steps of its
    period and of the one before: the same machine within seconds, so that far less noise is left than between blocks.
    """
    seconds: list[tuple[bool, float]] = []
    directory.mkdir(parents=True)
    try:
        with watch(job, directory) as attached:
            for _ in range(5 * (periods + 2)):
                sampling, begun = attached.sampling(), time.thread_time()
                job.step()
                seconds.append((sampling, time.thread_time() - begun))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    added = []
    for index in range(5, len(seconds) - 4):
        if seconds[index][0]:
            clean = statistics.mean(seconds[index + offset][1] for offset in (-2, -1, 3, 4))
            added.append(100 * ((seconds[index][1] + seconds[index + 1][1]) / clean - 2))
    return _estimate(added)


def as_record(index: int, name: str, block: Block, neighbours: tuple[Block, Block]) -> dict[str, object]:
    return {"round": index, "contender": name, "block": asdict(block), "bare": [asdict(bare) for bare in neighbours]}


def _size(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # retention and renames go on meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def _process_s() -> float:
    """CPU seconds of this process and of its living descendants (a logger's service is one)."""
    return time.process_time() + sum(_descendants_s(os.getpid()))


def _descendants_s(pid: int) -> Iterator[float]:
    with contextlib.suppress(OSError):  # no /proc, or gone meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
                yield (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                yield from _descendants_s(int(child))
