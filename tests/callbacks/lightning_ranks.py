"""Lightning's Trainer on two ranks, started by torchrun; see `jobs`."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from lightning_jobs import Adversarial, Autoencoder, Language, fit

from entropy_hooks.lightning import EntropyCallback

JOBS = {
    "calls itself": (Language, "ddp", {}),
    "calls its parts": (Autoencoder, "ddp", {}),
    "by hand": (Adversarial, "ddp_find_unused_parameters_true", {"layers": "generator.*"}),
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    report = {}
    for name, (steps, strategy, options) in JOBS.items():
        ours = EntropyCallback(folder / name / "run", every=2, **options)
        both = {
            "devices": 2,
            "strategy": strategy,
            "max_steps": 3 if steps.automatic else 6,
            "val_check_interval": None,
        }
        observed, plain = (fit(folder / name, callback, steps, **both) for callback in (ours, None))
        report[f"{name}, rank {rank}"] = {
            "observed": observed,
            "plain": plain,
            "faults": dict(ours.monitor.stats().faults),
        }
    sys.stdout.write(f"REPORT {json.dumps(report)}\n")
    sys.stdout.flush()
    dist.destroy_process_group()
    time.sleep(0.3)  # torch aborts if Python ends before gloo's threads are done (pytorch pull request 179291)
