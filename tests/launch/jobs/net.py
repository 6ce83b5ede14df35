"""A small model with blocks, and a loop over its own random batches: alike in every process that seeds alike."""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, VOCABULARY, TOKENS = 16, 64, 16


class Net(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3)])
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        z = self.embedding(tokens)
        for block in self.blocks:
            z = self.dropout(z + block(z))
        return self.head(z)


def batch() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (4, TOKENS))


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


def train(model: nn.Module, steps: int, *, seed: int = 0) -> list[float]:
    torch.manual_seed(seed)
    return train_with(torch.optim.AdamW(model.parameters(), lr=1e-2), model, steps)


def train_with(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> list[float]:
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        time.sleep(0.02)  # a frame every 2 steps: no disk is so slow that one is dropped
    return losses


def report(**values: object) -> None:
    sys.stdout.write("REPORT " + json.dumps(values) + "\n")  # in one piece: ranks share the pipe
    sys.stdout.flush()
