"""Two forked children that train each on its own, at once; neither is a rank of anything."""

from __future__ import annotations

import multiprocessing
import os
import sys

import torch
from net import Net, report, train


def work(number: int) -> None:
    torch.manual_seed(0)
    losses = train(Net(), 6, seed=number)
    barrier.wait()  # neither has gone before the other has begun
    report(number=number, losses=losses)


barrier = multiprocessing.get_context("fork").Barrier(2)
pids: list[int] = []
for number in range(2):
    if (pid := os.fork()) == 0:
        work(number)
        sys.exit(0)
    pids.append(pid)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
