"""Small compiled jobs, trained with and without us."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from entropy_hooks import attach

from .training import flushed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from entropy_hooks import Monitor
    from entropy_monitor.types import Frame

BATCH, TOKENS, WIDTH, VOCABULARY = 8, 16, 16, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.outer(F.gelu(self.inner(z)))


class Net(nn.Module):
    """Plain; what is special is in its children."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        z = self.embedding(ids)
        for block in self.blocks:
            z = block(z)
        return z

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.hidden(ids))


class Helper:
    """An object of the user's own, no module."""

    def __init__(self) -> None:
        self.total = 0.0
        self.term: Any = None

    def see(self, z: torch.Tensor) -> None:
        self.total += 0.1


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def each_block(model: nn.Module) -> nn.Module:
    """The model's own code stays Python; only its blocks are compiled."""
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="aot_eager")
    return model


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def wrapped_for_eager(model: nn.Module) -> nn.Module:
    """Autograd sees the model's own operations, not one node."""
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


@dataclass
class Trained:
    losses: list[float]
    model: nn.Module
    faults: dict[str, int]


def train(
    make: Callable[[], nn.Module],
    compile_it: Callable[[nn.Module], nn.Module],
    run: Path | None,
    *,
    loss_of: Callable[[Any, torch.Tensor], torch.Tensor] = next_token_loss,
    call: Callable[[nn.Module, torch.Tensor], Any] = lambda model, ids: model(ids),
    steps: int = 4,
    batch: int = BATCH,
    **options: Any,
) -> Trained:
    torch.manual_seed(0)
    model = make()
    called = compile_it(model)
    optimizer = torch.optim.AdamW([entry for entry in model.parameters() if entry.requires_grad], lr=1e-2)
    monitor: Monitor | None = None
    if run is not None:
        monitor = attach(called, optimizer, run=run, every=1, **options)
    losses: list[float] = []
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (batch, TOKENS))
        loss = loss_of(call(called, ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if monitor is not None:
            assert flushed(monitor)
    if monitor is not None:
        monitor.detach()
    return Trained(losses, model, {} if monitor is None else dict(monitor.stats().faults))


def assert_alike(one: Trained, other: Trained) -> None:
    assert one.losses == other.losses
    for first, second in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def assert_finite(found: list[Frame], number: int) -> None:
    assert len(found) == number
    for frame in found:
        for group in frame.groups:
            tokens = slice(None, 8 * frame.num_patches)
            assert group.gradients is not None
            assert np.isfinite(group.gradients[:, tokens]).all()
            assert (group.gradients[:, tokens] != 0).any()
