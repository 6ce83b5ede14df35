"""A model that trains while the optimizer we were given never steps: said once, and not of a long accumulation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from entropy_hooks import attach, unstepped

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from entropy_hooks import Monitor


def small(run: Path) -> tuple[nn.Module, torch.optim.Optimizer, Monitor]:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, optimizer, attach(model, optimizer, run=run)


def backward(model: nn.Module) -> None:
    model(torch.randn(2, 16, 4)).square().mean().backward()


def test_a_loop_that_steps_another_optimizer_is_told_once(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, ours, monitor = small(run)
    theirs = torch.optim.AdamW(model.parameters())
    for _ in range(2 * unstepped.MANY_PASSES + 1):
        theirs.zero_grad()
        backward(model)
        theirs.step()
    assert monitor.stats().faults == {"no_step": 1}
    assert "expected SGD.step()" in caplog.text
    for _ in range(2):
        backward(model)
        ours.step()
    monitor.detach()
    assert monitor.stats().faults == {"no_step": 1}


def test_a_long_accumulation_is_none(run: Path) -> None:
    model, optimizer, monitor = small(run)
    for _ in range(2):
        for _ in range(3 * unstepped.MANY_PASSES):
            backward(model)
        optimizer.step()
    monitor.detach()
    assert not monitor.stats().faults


def test_steps_that_leave_no_trace_are_told_later(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unstepped, "TOO_MANY_PASSES", 2 * unstepped.MANY_PASSES)
    model, optimizer, monitor = small(run)
    for _ in range(3 * unstepped.MANY_PASSES):
        model.zero_grad()
        backward(model)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data -= 0.01 * parameter.grad
    assert optimizer.param_groups
    monitor.detach()
    assert monitor.stats().faults == {"no_step": 1}
