"""Whose backward pass is it? Several models, threads, interruptions: each frame holds its own model's."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from entropy_hooks import attach

from .training import Job, flushed, frames, observe, tiny_gpt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from entropy_hooks import Monitor

STEPS = 4


class Net(nn.Module):
    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(num_in, 24), nn.Linear(24, num_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.gelu(self.first(x)))


def check(run: Path, losses: list[float]) -> None:
    """One frame a step, with that step's loss and the gradients of its own pass."""
    found = frames(run)
    assert [frame.step for frame in found] == list(range(len(losses)))
    for frame, loss in zip(found, losses, strict=True):
        assert frame.scalars["loss"] == pytest.approx(loss, rel=1e-6)
        for group in frame.groups:
            tokens = slice(None, 8 * frame.num_patches)
            assert group.gradients is not None
            assert np.isfinite(group.gradients[:, tokens]).all()
            assert (group.gradients[:, tokens] != 0).any(axis=(1, 2)).all()


def check_steps(run: Path, backward: Callable[[Job], torch.Tensor]) -> None:
    """Train a job whose gradients `backward` makes, and hold the frames against the losses that it returns."""
    job = Job(lambda: tiny_gpt(dropout=0.0))
    losses: list[float] = []
    with observe(job, run=run, every=1) as monitor:
        for _ in range(STEPS):
            job.optimizer.zero_grad()
            losses.append(backward(job).item())
            job.optimizer.step()
            flushed(monitor)
    assert monitor.stats().faults == {}
    check(run, losses)


def test_a_generator_and_its_discriminator(tmp_path: Path) -> None:
    """As usually written: the generator runs, the discriminator learns from what it made, then the generator does."""

    def train(observed: bool) -> tuple[list[list[float]], list[torch.Tensor], list[Monitor]]:
        torch.manual_seed(0)
        generator, critic = Net(8, 16), Net(16, 1)
        steps = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (generator, critic)]
        monitors = [
            attach(model, optimizer, run=tmp_path / name, every=1)
            for model, optimizer, name in zip((generator, critic), steps, ("generator", "critic"), strict=True)
            if observed
        ]
        losses: list[list[float]] = [[], []]
        for _ in range(STEPS):
            fake = generator(torch.randn(16, 8))
            steps[1].zero_grad()
            of_critic = F.softplus(critic(fake.detach())).mean() + F.softplus(-critic(torch.randn(16, 16))).mean()
            of_critic.backward()
            steps[1].step()
            steps[0].zero_grad()
            of_generator = F.softplus(-critic(fake)).mean()
            of_generator.backward()
            steps[0].step()
            losses[0].append(of_generator.item())
            losses[1].append(of_critic.item())
            assert all(flushed(monitor) for monitor in monitors)
        for monitor in monitors:
            monitor.detach()
        return losses, [*generator.parameters(), *critic.parameters()], monitors

    plain, parameters, _ = train(False)
    losses, same, monitors = train(True)
    assert losses == plain
    assert all(torch.equal(one, other) for one, other in zip(same, parameters, strict=True))
    assert monitors[0].stats().faults == {}
    check(tmp_path / "generator", losses[0])


@pytest.mark.parametrize("order", ["in order", "crosswise"])
def test_two_models_before_either_is_differentiated(tmp_path: Path, order: str) -> None:
    torch.manual_seed(0)
    models = [Net(8, 4), Net(8, 4)]
    steps = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    monitors = [attach(models[i], steps[i], run=tmp_path / str(i), every=1) for i in (0, 1)]
    losses: list[list[float]] = [[], []]
    for _ in range(STEPS):
        found = [model(torch.randn(16, 8)).square().mean() * (1 + 9 * i) for i, model in enumerate(models)]
        for i in (0, 1) if order == "in order" else (1, 0):
            found[i].backward()
        for i in (0, 1):
            steps[i].step()
            steps[i].zero_grad()
            # A sum that is multiplied by a constant is told as the loss before it.
            losses[i].append(found[i].item() / (1 + 9 * i))
            assert flushed(monitors[i])
    for i, monitor in enumerate(monitors):
        monitor.detach()
        assert monitor.stats().faults == {}
        check(tmp_path / str(i), losses[i])


def test_an_unobserved_model_in_between(run: Path) -> None:
    torch.manual_seed(0)
    other = Net(8, 4)

    def backward(job: Job) -> torch.Tensor:
        loss = job.forward_loss()
        other(torch.randn(16, 8)).square().mean().backward()
        loss.backward()
        return loss

    check_steps(run, backward)


def test_two_passes_one_backward(run: Path) -> None:
    """A loss of two views: the frame holds the newer pass, as it always did, and counts one micro-batch."""

    def backward(job: Job) -> torch.Tensor:
        loss = job.forward_loss() + job.forward_loss()
        loss.backward()
        return loss

    check_steps(run, backward)


def test_two_backward_passes_through_one_forward_pass(run: Path) -> None:
    def backward(job: Job) -> torch.Tensor:
        loss = job.forward_loss()
        (loss / 2).backward(retain_graph=True)
        loss.backward()
        return 3 * loss.detach()  # of which the first pass has taken a half

    check_steps(run, backward)


def test_threads_that_train_models_of_their_own(tmp_path: Path) -> None:
    steps = 12

    def train(number: int, run: Path | None) -> None:
        generator = torch.Generator().manual_seed(number)
        optimizer = torch.optim.SGD(models[number].parameters(), lr=0.1)
        monitor = attach(models[number], optimizer, run=run, every=1) if run else None
        for _ in range(steps):
            optimizer.zero_grad()
            loss = models[number](torch.randn(16, 8, generator=generator)).square().mean()
            loss.backward()
            optimizer.step()
            losses[number].append(loss.item())
            if monitor is not None:
                flushed(monitor)
        if monitor is not None:
            monitor.detach()
            faults.append(monitor.stats().faults)

    found: list[list[list[float]]] = []
    faults: list[object] = []
    for observed in (False, True):
        torch.manual_seed(0)
        models = [Net(8, 4) for _ in range(3)]
        losses: list[list[float]] = [[] for _ in models]
        runs = [tmp_path / str(number) if observed else None for number in range(3)]
        threads = [threading.Thread(target=train, args=(number, runs[number])) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found.append(losses)
    assert found[0] == found[1]
    assert faults == [{}, {}, {}]
    for number in range(3):
        check(tmp_path / str(number), found[1][number])


def test_an_interrupted_pass_in_a_notebook(run: Path) -> None:
    """KeyboardInterrupt in the middle of a block; the user goes on, with another model in between."""
    torch.manual_seed(0)
    other = Net(8, 4)
    job = Job(lambda: tiny_gpt(dropout=0.0))
    with observe(job, run=run, every=1) as monitor:

        def interrupt(module: nn.Module, args: object) -> None:
            raise KeyboardInterrupt

        job.step()
        handle = job.model.blocks[1].register_forward_pre_hook(interrupt)  # type: ignore[union-attr,index]
        with pytest.raises(KeyboardInterrupt):
            job.forward_loss()
        handle.remove()
        for _ in range(STEPS - 1):
            loss = job.forward_loss()
            job.optimizer.zero_grad()
            loss.backward()
            other(torch.randn(16, 8)).square().mean().backward()
            job.optimizer.step()
            job.losses.append(loss.item())
            flushed(monitor)
    assert monitor.stats().faults == {}
    check(run, job.losses)


def test_uneven_accumulation(run: Path) -> None:
    """An epoch of eight batches in steps of three: the rest of it makes a step of two."""
    rhythm = (3, 3, 2, 3, 3, 2, 3, 3, 2)
    last: list[float] = []
    job = Job(lambda: tiny_gpt(dropout=0.0))
    with observe(job, run=run, every=1) as monitor:
        for accumulate in rhythm:
            job.optimizer.zero_grad()
            for _ in range(accumulate):
                loss = job.forward_loss()
                (loss / accumulate).backward()
            job.optimizer.step()
            last.append(loss.item())
            flushed(monitor)
    assert monitor.stats().faults == {"fewer_micro_batches": 1}, "the first short step; then all passes are captured"
    found = {frame.step: frame.scalars["loss"] for frame in frames(run)}
    assert sorted(found) == [0, 1, 3, 4, 5, 6, 7, 8]
    for step, loss in found.items():
        assert loss == pytest.approx(last[step]), "the last micro-batch"
