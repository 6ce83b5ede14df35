"""The Hugging Face Trainer on two ranks, started by ``accelerate launch``; see `jobs`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_jobs import train

from entropy_hooks.huggingface import EntropyCallback

if __name__ == "__main__":
    torch.set_num_threads(1)
    run, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    ours = EntropyCallback(run, every=2)
    options = {"ddp_backend": "gloo", "max_steps": 5, "per_device_train_batch_size": 2}
    observed = train(run.parent / "observed", ours, **options)
    plain = train(run.parent / "plain", None, **options)
    report = {"observed": observed, "plain": plain, "faults": dict(ours.monitor.stats().faults)}
    sys.stdout.write(f"REPORT {json.dumps({f'rank {rank}': report})}\n")
    sys.stdout.flush()
    dist.destroy_process_group()
    time.sleep(0.3)  # torch aborts if Python ends before gloo's threads are done (pytorch pull request 179291)
