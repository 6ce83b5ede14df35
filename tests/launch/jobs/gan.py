"""Two models and two optimizers; the discriminator, the smaller one, steps first and twice as often."""

from __future__ import annotations

import time

import torch
from net import WIDTH, batch, report
from net import Net as Generator
from torch import nn

torch.manual_seed(0)
generator = Generator()
discriminator = nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 1))
first = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
second = torch.optim.RMSprop(generator.parameters(), lr=1e-3)
losses: list[float] = []
for step in range(24):
    fake = generator(batch())
    if step % 3 < 2:
        first.zero_grad()
        loss = discriminator(fake.detach()).mean() - discriminator(torch.randn_like(fake)).mean()
        loss.backward()
        first.step()
    else:
        second.zero_grad()
        loss = -discriminator(fake).mean()
        loss.backward()
        second.step()
    losses.append(loss.item())
    time.sleep(0.01)
report(losses=losses, width=WIDTH)
