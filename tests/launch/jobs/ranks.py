"""Two ranks of DistributedDataParallel, however they are started: by a launcher, or as `spawn` or `fork` children."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from net import Net, report, train
from torch.nn.parallel import DistributedDataParallel

STEPS = 6


def work(rank: int | None = None, directory: str = "") -> None:
    where = {} if rank is None else {"init_method": f"file://{directory}/meet", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", **where)
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())
    losses = train(model, STEPS, seed=dist.get_rank())
    dist.barrier()
    report(rank=dist.get_rank(), losses=losses, pid=os.getpid())
    dist.destroy_process_group()
    time.sleep(0.3)  # torch aborts if Python ends before gloo's threads are done (pytorch pull request 179291)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        mp.start_processes(work, args=(sys.argv[2],), nprocs=2, start_method=sys.argv[1])
    else:
        work()
