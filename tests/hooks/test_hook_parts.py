"""A loop that calls the model's parts and never the model, and optimizers inside other optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from entropy_hooks import attach
from entropy_hooks.taps import find_taps

from .training import frames

if TYPE_CHECKING:
    from pathlib import Path


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.Tanh())
        self.decoder = nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by type alone, whose own step hooks nobody calls."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


def train(run: Path | None, *, whole: bool, num_evaluated: int = 9, **options: Any) -> tuple[list[float], Any]:
    torch.manual_seed(0)
    model = Autoencoder()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = Wrapper(Wrapper(inner))
    monitor = attach(model, optimizer, run=run, every=2, **options) if run else None
    losses = []
    for _ in range(5):
        for _ in range(2):
            x = torch.randn(16, 12)
            with torch.no_grad():  # another number of rows, before and after: a frame of these would not hold the loss
                model.decoder(model.encoder(x[:num_evaluated]))
            found = model(x) if whole else model.decoder(model.encoder(x))
            with torch.no_grad():
                model.encoder(x[:num_evaluated])
            loss = F.mse_loss(found, x)
            (loss / 2).backward()
        optimizer.step()
        inner.zero_grad()
        losses.append(loss.item())
        if monitor is not None:
            assert monitor.stats().step == len(losses)
            monitor._session.writer.flush(20.0)
    if monitor is not None:
        monitor.detach()
        assert monitor.stats().faults == {}
    assert not [
        m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called
    ]
    assert not inner._optimizer_step_pre_hooks
    return losses, model


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "its parts"])
def test_calls_of(run: Path, whole: bool) -> None:
    observed, model = train(run, whole=whole)
    plain, twin = train(None, whole=whole)
    assert observed == plain
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    found = frames(run)
    assert [frame.step for frame in found] == [0, 2, 4]
    for frame in found:
        assert frame.scalars["loss"] == pytest.approx(observed[frame.step], rel=1e-6)
        assert {layer for group in frame.groups for layer in group.layers} == {"encoder", "decoder"}
        assert frame.num_patches == 2
        for group in frame.groups:
            assert group.gradients is not None
            assert bool((group.gradients[:, :16] != 0).any(axis=2).all())


def test_several_backward_passes_in_one_call(run: Path) -> None:
    """Manual optimization under DistributedDataParallel: the training step is the model's forward."""

    class Step(Autoencoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in x.chunk(2):
                loss = F.mse_loss(self.decoder(self.encoder(part)), part)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return x

    torch.manual_seed(0)
    model, losses = Step(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, run=run, every=1) as monitor:
        for _ in range(2):
            model(torch.randn(32, 12))
    assert monitor.stats().faults == {}
    assert [frame.scalars["loss"] for frame in frames(run)] == losses
    assert len(losses) == 4


def test_a_wrapped_network_is_tapped_inside_and_losses_are_not() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))
            self.criterion = nn.CrossEntropyLoss()

    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(4, 4)

    assert list(find_taps(Wrapped(), None)) == ["net.0", "net.1", "net.2"]
    assert list(find_taps(Child(), None)) == ["only"]
    assert list(find_taps(Autoencoder(), None)) == ["encoder", "decoder"]
