"""Three trainings, one after another; each is dropped at its end, and must be gone."""

from __future__ import annotations

import gc
import time
import weakref

import torch
from net import Net, report, train_with

if __name__ == "__main__":
    losses, alive = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses += train_with(optimizer, model, 6)
        dropped = [weakref.ref(thing) for thing in (model, optimizer, *model.parameters())]
        del model, optimizer
        gc.collect()
        deadline = time.monotonic() + 10  # the last frame may still be on its way to the disk
        while any(one() is not None for one in dropped) and time.monotonic() < deadline:
            time.sleep(0.01)
        alive.append(sum(one() is not None for one in dropped))
    report(losses=losses, alive=alive)
