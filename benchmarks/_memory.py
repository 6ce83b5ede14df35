"""Does a long run's memory stay constant? Resident and device memory of a small model over many steps."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from _gpt import Job, Size

from entropy_hooks import attach

SMALL = Size(layers=2, width=32, heads=2, context=32, batch=4, vocabulary=64)
SAMPLE_EVERY = 100
GROWTH_MB = 2.0
"""Per 10,000 steps, that counts as none: what allocators keep moves by more than that."""

Samples = list[tuple[int, float, float]]
"""Step, resident MB, device MB."""


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def record(steps: int, device: str, every: int | None) -> tuple[Samples, int, int]:
    """Train; with `every=None` without a monitor, else with its defaults. Samples, frames committed and dropped."""
    torch.set_num_threads(1)
    job, samples = Job(SMALL, device), []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        monitor = None
        if every is not None:
            monitor = stack.enter_context(attach(job.model, job.optimizer, run=Path(name) / "run", every=every))
        for step in range(steps):
            job.step()
            if step % SAMPLE_EVERY == 0:
                on_device = torch.cuda.memory_allocated() / 1e6 if device == "cuda" else 0.0
                samples.append((step, resident_mb(), on_device))
        stats = monitor.stats() if monitor is not None else None
    return samples, stats.frames_committed if stats else 0, stats.frames_dropped if stats else 0


def growth(samples: Samples, column: int) -> tuple[float, float]:
    """MB per 10,000 steps by least squares over the second half, and its standard error."""
    half = np.array(samples[len(samples) // 2 :])
    step, memory = half[:, 0] - half[:, 0].mean(), half[:, column]
    slope = (step * memory).sum() / (step * step).sum()
    residual = memory - memory.mean() - slope * step
    error = np.sqrt((residual * residual).sum() / (len(half) - 2) / (step * step).sum())
    return 1e4 * float(slope), 1e4 * float(error)


def memory(steps: int, device: str) -> tuple[int, dict[str, Samples]]:
    """Print the table; each row in a process of its own.

    Returns:
        1 where memory grows, and the samples.
    """
    print(f"| {steps} steps, {device} | resident MB: start, warm, end | MB per 10,000 steps | frames (dropped) | |")
    print("|---|---|---|---|---|")
    grows, raw = False, {}
    context = multiprocessing.get_context("spawn")
    for name, every in (("no monitor", None), ("every=1", 1), ("the default, every=10", 10)):
        with context.Pool(1) as pool:
            samples, committed, dropped = pool.apply(record, (steps, device, every))
        raw[name] = samples
        columns = (1, 2) if device == "cuda" else (1,)
        found = [growth(samples, column) for column in columns]
        constant = all(slope < GROWTH_MB for slope, _ in found)
        grows |= not constant and every is not None
        shown = ", ".join(f"{slope:+.2f} +- {error:.2f}" for slope, error in found)
        levels = ", ".join(f"{samples[index][1]:.0f}" for index in (0, len(samples) // 2, -1))
        verdict = "constant" if constant else f"GROWS (line: {GROWTH_MB:g})"
        print(f"| {name} | {levels} | {shown} | {committed} ({dropped}) | {verdict} |", flush=True)
    return int(grows), raw
