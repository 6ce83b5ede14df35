"""The processes that are struck: the ranks of a trainer, and the watcher."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from entropy_monitor.store import open_run

RANKS = (0, 1)
LAYERS, FEATURES, BATCH, CONTEXT, PATCHES = 3, 4, 2, 16, 4
KEEP = 128
"""Frames a rank keeps: few, so that the storm also strikes removals."""
STEP_S = 0.004
KEY = "the storm's key"


def activations_of(step: int) -> np.ndarray:
    """What every layer's every token holds at a step; exact in bfloat16."""
    digits = [(step >> shift) % 16 for shift in (0, 4, 8, 12)]
    return np.array(digits[:FEATURES], np.float32) + 1


def train(run: str, rank: int, launch: int, log: str, stop: str) -> None:
    """One rank of one launch: trains until the file `stop` exists, and logs what it promised and saw."""
    os.setsid()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(RANKS)),
        "MASTER_ADDR": "storm",
        "MASTER_PORT": str(launch),
        "ENTROPY_MONITOR_KEY": KEY,
    }
    import torch
    from torch import nn

    from entropy_hooks import attach

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # the store is slow in a storm, and forged commands are part of it

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(FEATURES))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scale

    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
    model.forward = lambda x: _through(model.blocks, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Path(log).open("a", encoding="utf-8", buffering=1) as out:
        monitor = attach(
            model, optimizer, run=run, every=1, patches=PATCHES, keep=KEEP, steer=True, weight_alignment=False
        )
        if not monitor.enabled:
            raise RuntimeError(f"not attached: {monitor.stats().faults}")
        attempt = monitor.stats().attempt
        monitor.on_phase(lambda phase, weight: _say(out, attempt, monitor.stats().step, "applied", phase))
        _say(out, attempt, 0, "attached", monitor.phase)
        step = 0
        while not Path(stop).exists():
            x = torch.from_numpy(activations_of(step)).expand(BATCH, CONTEXT, FEATURES).clone()
            loss = (model(x) - x).sum() + float(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            time.sleep(STEP_S)
        monitor.detach()
        stats = monitor.stats()
        _say(out, attempt, stats.frames_committed, "detached", monitor.phase)
        if unexpected := set(stats.faults) - {"frames_removed_unmeasured", "ring_full", "rejected_command"}:
            _say(out, attempt, step, "fault", f"{ {kind: stats.faults[kind] for kind in unexpected} }")


def _through(blocks: Any, x: Any) -> Any:
    for block in blocks:
        x = block(x)
    return x


def _say(out: Any, attempt: int, step: int, what: str, detail: str) -> None:
    out.write(json.dumps([attempt, step, what, detail]) + "\n")


def observe_run(run: str, log: str) -> None:
    """The watcher, as `entropy-monitor watch` runs it."""
    os.setsid()
    with Path(log).open("a", encoding="utf-8", buffering=1) as out:
        try:
            import torch

            from entropy_monitor.watcher import watch

            torch.set_num_threads(1)
            logging.disable(logging.WARNING)  # that ranks are missing is what a storm is about
            watch(open_run(run), threading.Event())
        except BaseException:
            out.write(traceback.format_exc())
            raise
