"""How the benchmarks time and weigh: interleaved rounds, medians of CPU time, peak memory of a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Action = Callable[[], object]
_RESET = Path("/proc/self/clear_refs")


def interleaved_medians(
    functions: Mapping[str, Callable[..., object]], rounds: int, *inputs: object
) -> dict[str, float]:
    """Call every function once unmeasured, then all of them in turn, so that a slow spell of the machine meets each.

    On one thread CPU time is counted, which other processes cannot lengthen by taking turns; with more threads it
    would add up waiting threads, so that wall time is taken.

    Returns:
        Median seconds of each.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for function in functions.values():
        function(*inputs)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function(*inputs)
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(prepare: Callable[..., Action], *arguments: object) -> int:
    """Weigh what `prepare(*arguments)` returns: how far its one run raises the high-water mark of a fresh process.

    Each action gets a fork of a server that has imported this program and done nothing else, since memory that an
    earlier action freed would hide what this one takes. Actions are prepared, input and library set-up included, first;
    where the preparation itself took more than it left, only Linux can forget that.

    Returns:
        Bytes of resident memory.
    """
    context = multiprocessing.get_context("forkserver")
    results = context.SimpleQueue()
    process = context.Process(target=_weigh, args=(results, torch.get_num_threads(), prepare, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"expected {prepare.__name__}{arguments} to be weighed; its process ended with an error")
    return results.get()


def _weigh(results, num_threads: int, prepare: Callable[..., Action], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(num_threads)
    action = prepare(*arguments)
    if _RESET.exists():
        _RESET.write_text("5")  # the high-water mark becomes what is resident now
    before = _high_water_bytes()
    action()
    results.put(_high_water_bytes() - before)


def _high_water_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def gemm_flops(rounds: int) -> float:
    """Measure the machine's peak: a square fp32 product of 2048.

    Returns:
        Floating-point operations a second.
    """
    a_SS = torch.randn(2048, 2048)
    return 2 * 2048**3 / interleaved_medians({"gemm": torch.matmul}, rounds, a_SS, a_SS)["gemm"]
