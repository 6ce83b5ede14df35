"""Three trainings, one after another; each is dropped at its end, and must be gone."""

from __future__ import annotations

import gc
import time
import weakref

import torch
from net import Net, batch, loss_of, report

if __name__ == "__main__":
    losses, alive = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(6):
            loss = loss_of(model, batch())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        dropped = [weakref.ref(thing) for thing in (model, optimizer, *model.parameters())]
        del model, optimizer, loss
        gc.collect()
        deadline = time.monotonic() + 10  # the last frame may still be on its way to the disk
        while any(one() is not None for one in dropped) and time.monotonic() < deadline:
            time.sleep(0.01)
        alive.append(sum(one() is not None for one in dropped))
    report(losses=losses, alive=alive)
