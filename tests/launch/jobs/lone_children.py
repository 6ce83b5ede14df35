"""Two children that train each on its own, at once: by `os.fork`, or by `multiprocessing`."""

from __future__ import annotations

import multiprocessing
import os
import sys

import torch
from net import Net, report, train


def work(number: int, barrier: multiprocessing.Barrier) -> None:
    torch.manual_seed(0)
    losses = train(Net(), 6, seed=number)
    barrier.wait()  # neither has gone before the other has begun
    report(number=number, losses=losses)


if __name__ == "__main__":
    how = sys.argv[1]
    context = multiprocessing.get_context("fork" if how == "os.fork" else how)
    barrier = context.Barrier(2)
    if how == "os.fork":
        pids = []
        for number in range(2):
            if (pid := os.fork()) == 0:
                work(number, barrier)
                sys.exit(0)
            pids.append(pid)
        sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
    children = [context.Process(target=work, args=(number, barrier)) for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    sys.exit(max(child.exitcode for child in children))
