"""Optimizers inside optimizers: each step is counted once, whichever of them the loop steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from entropy_hooks import attach
from entropy_hooks.wrapped_optimizers import look_through
from entropy_monitor.errors import ConfigError

from .training import Job, Truth, assert_same_training, flushed, frames, observe, positions, rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

STEPS = 4


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization in its usual interface (arXiv 2010.01412)."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float) -> None:
        super().__init__(params, {"rho": 0.05, "lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups
        self.offsets: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def first_step(self) -> None:
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        self.offsets = [(p, p.grad * 0.05 / norm) for p in trained]
        for parameter, offset in self.offsets:
            parameter.add_(offset)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter, offset in self.offsets:
            parameter.sub_(offset)
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is not None
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """Steps the optimizer inside, then moves the parameters itself."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.optimizer = torch.optim.AdamW(self.param_groups, lr=lr)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        with torch.no_grad():
            for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"]), strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class Halves(torch.optim.Optimizer):
    """Two optimizers for two kinds of parameters, in a list."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float) -> None:
        given = list(params)
        super().__init__(given, {"lr": lr})
        self.optimizers = [
            torch.optim.SGD([p for p in given if p.dim() > 1], lr=lr),
            torch.optim.AdamW([p for p in given if p.dim() <= 1], lr=lr),
        ]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


class NameAlone(torch.optim.Optimizer):
    """As Accelerate's: an optimizer that has not called ``Optimizer.__init__``."""

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.inside = optimizer

    @property
    def param_groups(self) -> Any:
        return [] if self.inside is None else self.inside.param_groups

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert self.inside is not None
        self.inside.step()


def first_pass(job: Job) -> torch.Tensor:
    job.optimizer.zero_grad()
    loss = job.forward_loss()
    loss.backward()
    job.losses.append(loss.item())
    return job.batches[-1]


def again(job: Job, tokens: torch.Tensor) -> torch.Tensor:
    loss = torch.nn.functional.cross_entropy(job.model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
    loss.backward()
    job.losses.append(loss.item())
    return loss


def two_calls(job: Job) -> None:
    assert isinstance(job.optimizer, SAM)
    tokens = first_pass(job)
    job.optimizer.first_step()
    again(job, tokens)
    job.optimizer.second_step()


def closure(job: Job) -> None:
    assert isinstance(job.optimizer, SAM)
    tokens = first_pass(job)
    job.optimizer.step(lambda: again(job, tokens))


def train(loop: Callable[[Job], None], job: Job, steps: int = STEPS) -> Job:
    for _ in range(steps):
        loop(job)
        if job.monitor is not None:
            assert flushed(job.monitor)
    return job


@pytest.mark.parametrize("loop", [two_calls, closure])
def test_a_frame_of_sam_holds_its_second_pass(run: Path, loop: Callable[[Job], None]) -> None:
    plain = train(loop, Job(make_optimizer=SAM))
    job = Job(make_optimizer=SAM)
    monitor = observe(job, run=run, every=1)
    train(loop, job, STEPS - 1)
    truth = Truth(job.model, list(monitor.layers))
    train(loop, job, 1)
    monitor.detach()
    assert_same_training(job, plain)
    found = frames(run)
    assert [frame.step for frame in found] == list(range(STEPS))
    assert [float(frame.scalars["loss"]) for frame in found] == pytest.approx(job.losses[1::2], rel=1e-6)
    where = positions(found[-1], job.batches[-1])
    for index, layer in enumerate(found[-1].groups[0].layers):
        z = torch.stack([truth.activation(layer)[sequence, place] for sequence, place in where])
        assert torch.equal(torch.as_tensor(found[-1].groups[0].activations[index, : len(where)]), rounded(z))
    assert monitor.stats().step == STEPS
    assert not monitor.stats().faults
    assert not job.optimizer._optimizer_step_pre_hooks
    assert not job.optimizer.base_optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]


@pytest.mark.parametrize("make_optimizer", [Lookahead, Halves])
def test_a_wrapper_s_step_and_what_is_stepped_in_it_are_one(run: Path, make_optimizer: Any) -> None:
    plain = Job(make_optimizer=make_optimizer).run(STEPS)
    job = Job(make_optimizer=make_optimizer)
    monitor = observe(job, run=run, every=1)
    job.run(STEPS)
    monitor.detach()
    assert_same_training(job, plain)
    assert [frame.step for frame in frames(run)] == list(range(STEPS))
    assert monitor.stats().step == STEPS
    assert not monitor.stats().faults


def test_the_inner_optimizers_may_be_stepped_past_their_wrapper(run: Path) -> None:
    job = Job(make_optimizer=Halves)
    monitor = observe(job, run=run, every=1)
    for _ in range(STEPS):
        first_pass(job)
        for optimizer in job.optimizer.optimizers:  # type: ignore[attr-defined]
            optimizer.step()
        assert flushed(monitor)
    assert monitor.stats().step == STEPS
    assert [frame.step for frame in frames(run)] == list(range(STEPS))
    monitor.detach()


def test_a_step_that_raised_costs_no_other(run: Path) -> None:
    job = Job(make_optimizer=SAM)
    monitor = observe(job, run=run, every=1)
    two_calls(job)
    tokens = first_pass(job)
    with pytest.raises(ZeroDivisionError):
        job.optimizer.step(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    assert isinstance(job.optimizer, SAM)
    again(job, tokens)
    job.optimizer.second_step()
    train(closure, job, 2)
    monitor.detach()
    assert monitor.stats().step == 4


def test_wrapper_and_wrapped_given_together_are_one(run: Path) -> None:
    job = Job(make_optimizer=SAM)
    monitor = attach(job.model, [job.optimizer, job.optimizer.base_optimizer], run=run, every=1)  # type: ignore[attr-defined]
    train(two_calls, job, 2)
    train(closure, job, 2)
    assert monitor.stats().step == 4
    monitor.detach()


def test_what_is_looked_through() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    plain = torch.optim.SGD(parameters, lr=0.1)
    assert look_through([plain]).inner == (plain,)
    assert look_through([NameAlone(NameAlone(plain))]).inner == (plain,)
    assert not look_through([NameAlone(plain)]).wrappers
    plain.shard = torch.optim.SGD(parameters[:1], lr=0.1)  # type: ignore[attr-defined]
    assert look_through([plain]).inner == (plain,), "the other trains a part of what this one trains"
    outer = SAM(parameters, lr=0.1)
    assert look_through([outer]).wrappers == ((outer, (outer.base_optimizer,)),)


def test_an_optimizer_without_step_hooks_is_refused(run: Path) -> None:
    job = Job()
    with pytest.raises(ConfigError, match="expected an optimizer with step hooks; found NameAlone"):
        attach(job.model, NameAlone(None), run=run)
    assert not run.exists()
