"""The overhead on a GPU: GPT-2 124M, batch 16 x 1024, bf16 autocast, eager and compiled.

Step time by CUDA events, bare blocks before and after each block with the monitor. A profiler counts the calls that
wait for the device: there must be as many with the monitor as without.
"""

from __future__ import annotations

import statistics
from collections import Counter
from typing import TYPE_CHECKING

import torch
from _gpt import Job, Size
from _memory import resident_mb
from torch.profiler import ProfilerActivity, profile

from entropy_hooks import attach

if TYPE_CHECKING:
    from pathlib import Path

GPT2 = Size(layers=12, width=768, heads=12, context=1024, batch=16, vocabulary=50257)
LINE_PERCENT = 0.5
"""Of step time, at every 10."""
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
"""Not `cudaEventSynchronize`: the writer thread waits for its copies so."""


def block_ms(job: Job, steps: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(steps):
        job.step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / steps


def waiting_calls(job: Job, steps: int) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            job.step()
    return Counter(event.name for event in found.events() if event.name in WAITING)


def _prepare(job: Job, compiled: bool, warm_up: int) -> None:
    """Compile anew, as hooks are a part of what is compiled; then run until shapes, rings and caches are settled."""
    if compiled:
        torch._dynamo.reset()
        job.forward = torch.compile(job.model)
    for _ in range(warm_up):
        job.step()


def measure(directory: Path, rounds: int, block: int, every: int, compiled: bool) -> list[tuple[str, str, bool]]:
    """Rows of the table: what, what was found, whether the promise is kept."""
    torch.set_float32_matmul_precision("high")
    job = Job(GPT2, "cuda", torch.bfloat16)
    block = every * max(1, round(block / every))
    _prepare(job, compiled, 5)
    calls = waiting_calls(job, every)
    added, bare, committed, dropped, host, device = [], [], 0, 0, [], []
    for index in range(rounds):
        before = block_ms(job, block)
        memory = resident_mb(), torch.cuda.memory_allocated() / 1e6
        run = directory / f"{every}-{compiled}-{index}"
        with attach(job.model, job.optimizer, run=run, every=every) as monitor:
            _prepare(job, compiled, 2 * every)
            watched = block_ms(job, block)
            if index == 0:
                calls_watched = waiting_calls(job, every)
            stats = monitor.stats()
        _prepare(job, compiled, 3)
        after = block_ms(job, block)
        host.append(resident_mb() - memory[0])
        device.append(torch.cuda.memory_allocated() / 1e6 - memory[1])
        added.append(100 * (2 * watched / (before + after) - 1))
        bare += [before, after]
        committed, dropped = committed + stats.frames_committed, dropped + stats.frames_dropped
    low, median, high = statistics.quantiles(added, n=4) if rounds > 1 else added * 3
    what = f"every={every}, {'compiled' if compiled else 'eager'}"
    shown = {name: (calls[name], calls_watched[name]) for name in WAITING}
    noise = 100 * statistics.pstdev(bare) / statistics.mean(bare)
    return [
        (f"{what}: a bare step", f"{statistics.median(bare):.2f} ms (sd of blocks {noise:.2f} %)", True),
        (
            f"{what}: step time added" + (f", below {LINE_PERCENT} %" if every == 10 else ""),
            f"{median:+.2f} % (quartiles {low:+.2f}, {high:+.2f}; n={rounds})",
            every != 10 or median < LINE_PERCENT,
        ),
        (f"{what}: waiting calls a period, without and with", str(shown), all(a == b for a, b in shown.values())),
        (f"{what}: frames committed (dropped)", f"{committed} ({dropped})", committed > 0),
        (f"{what}: host MB left behind, by round", ", ".join(f"{value:+.0f}" for value in host), True),
        (f"{what}: device MB left behind, by round", ", ".join(f"{value:+.1f}" for value in device), device[-1] < 1),
    ]
