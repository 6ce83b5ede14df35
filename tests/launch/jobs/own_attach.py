"""A script that observes itself, in a run of its own choice, and does not care about its user's handlers."""

from __future__ import annotations

import sys
import time

import torch
from net import Net, batch, loss_of, report

from entropy_hooks import attach

torch.manual_seed(0)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with attach(model, optimizer, run=sys.argv[1], every=2) as monitor:
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
        time.sleep(0.02)
report(attempt=monitor.stats().attempt, step=monitor.stats().step, run=monitor.run_url)
