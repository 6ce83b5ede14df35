"""A probe's loss from which nothing can be learned is a fault that says why."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from entropy_hooks.faults import Faults
from entropy_hooks.probe_loss import depends_on

from .probing import next_byte_loss
from .training import Job, assert_same_training, frames, observe, tiny_gpt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKENS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(9))
loss_of = next_byte_loss(TOKENS)


def not_a_number(model: nn.Module) -> torch.Tensor:
    return loss_of(model) * float("nan")


def infinite(model: nn.Module) -> torch.Tensor:
    return loss_of(model) / 0.0


def zero(model: nn.Module) -> torch.Tensor:
    return loss_of(model) * 0.0


def another_model(model: nn.Module) -> torch.Tensor:
    return loss_of(tiny_gpt())


def a_leaf(model: nn.Module) -> torch.Tensor:
    model(TOKENS)
    return torch.ones((), requires_grad=True)


def without_gradient(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return loss_of(model)


def gradients_left_off(model: nn.Module) -> torch.Tensor:
    torch.set_grad_enabled(False)
    return loss_of(model)


def detached(model: nn.Module) -> torch.Tensor:
    return loss_of(model).detach()


GRADIENT = "without a gradient (torch.no_grad"
PARAMETERS = "depends on the model's trained parameters"
NOT_FINITE = "expected a finite loss on the probe batch"


@pytest.mark.parametrize("observed", ["training", "probe"])
@pytest.mark.parametrize(
    ("probe", "kind", "reason"),
    [
        (not_a_number, "probe_failed", NOT_FINITE),
        (infinite, "probe_failed", NOT_FINITE),
        (zero, "probe_failed", NOT_FINITE),
        (another_model, "probe_failed", PARAMETERS),
        (a_leaf, "probe_failed", PARAMETERS),
        (without_gradient, "no_probe_loss", GRADIENT),
        (gradients_left_off, "no_probe_loss", GRADIENT),
        (detached, "no_probe_loss", GRADIENT),
    ],
)
def test_it_is_counted_and_logged_once(
    run: Path,
    probe: Callable[[nn.Module], torch.Tensor],
    kind: str,
    reason: str,
    observed: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job, twin = Job(lambda: tiny_gpt(dropout=0.0)), Job(lambda: tiny_gpt(dropout=0.0))
    twin.run(3)
    options = {"exact_alignment_every": 2, "observe": observed, "probe": probe}
    with caplog.at_level(logging.WARNING), observe(job, run=run, every=1, **options) as monitor:
        job.run(3)
    assert_same_training(job, twin)
    assert torch.is_grad_enabled()
    assert set(monitor.stats().faults) == {kind}
    (message,) = [message for message in caplog.messages if message.startswith(f"{kind}: ")]
    assert reason in message
    assert "give attach(probe=...)" in message
    if observed == "training":
        assert [frame.step for frame in frames(run)] == [0, 1, 2]
    for frame in frames(run):
        assert frame.exact_alignment is not None
        assert torch.from_numpy(frame.exact_alignment.cosines.copy()).isnan().all()


def test_an_audit_of_layers_before_every_trained_parameter_is_no_fault(run: Path) -> None:
    """Their entropy depends on no parameter: undetermined by definition, the probe has done what it can."""

    def frozen_but_for_the_head() -> nn.Module:
        model = tiny_gpt(dropout=0.0)
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        return model

    job = Job(frozen_but_for_the_head)
    with observe(job, run=run, every=1, exact_alignment_every=1, gradients=False) as monitor:
        job.run(2)
    assert monitor.stats().faults == {}
    assert all(frame.exact_alignment is not None for frame in frames(run))


@given(st.integers(1, 6), st.integers(0, 6), st.booleans())
def test_the_walk_agrees_with_autograd(depth: int, reached: int, doubled: bool) -> None:
    """A chain of parameters, cut at one place: what lies before the cut has no gradient."""
    parameters = [nn.Parameter(torch.ones(())) for _ in range(depth)]
    x = torch.ones((), requires_grad=True)
    for place, parameter in enumerate(parameters):
        x = (x.detach() if place == reached else x) * parameter
        x = x + x.sin() if doubled else x
    found = torch.autograd.grad(x, parameters, allow_unused=True, retain_graph=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        assert depends_on(x, [parameter]) == (gradient is not None)
    assert depends_on(parameters[0], parameters)
    assert not depends_on(x, [])


def test_a_long_graph_is_walked_without_recursion_and_each_node_once() -> None:
    """With every node met once a path, 3,000 doublings would never end."""
    x = start = torch.ones((), requires_grad=True)
    for _ in range(3000):
        x = x + x.sin()
    assert depends_on(x, [start])
    assert not depends_on(x, [nn.Parameter(torch.ones(()))])


def test_an_exception_of_several_lines_is_logged_in_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Faults().count("probe_failed", RuntimeError("first\n  second\n\nthird"))
    (message,) = caplog.messages
    assert message.startswith("probe_failed: RuntimeError: first second third (")
