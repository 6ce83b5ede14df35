"""Promise 1: with hooks, and without a compress command, training is bit-identical."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from entropy_hooks import attach
from entropy_monitor.store import open_run

from .training import Job, apply_now, assert_same_training, frames, observe, tiny_gpt

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 200


@pytest.fixture(scope="module")
def unobserved() -> tuple[Job, torch.Tensor]:
    torch.set_num_threads(1)
    job = Job().run(STEPS)
    return job, torch.get_rng_state()


def hook_dictionaries(module: nn.Module) -> list[dict]:
    names = [name for name in vars(module) if "hook" in name and isinstance(vars(module)[name], dict)]
    assert {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called"} <= set(names)
    return [dict(vars(module)[name]) for name in names]


def optimizer_hooks(optimizer: torch.optim.Optimizer) -> list[dict]:
    return [dict(optimizer._optimizer_step_pre_hooks), dict(optimizer._optimizer_step_post_hooks)]


@pytest.mark.parametrize(
    ("every", "options"),
    [(1, {}), (10, {}), (1, {"steer": True}), (10, {"gradients": False, "patches": 4})],
    ids=["every step", "every tenth", "steer without a command", "without gradients"],
)
def test_training_is_bit_identical(
    unobserved: tuple[Job, torch.Tensor], run: Path, every: int, options: dict[str, object]
) -> None:
    expected, expected_state = unobserved
    threads, backward = set(threading.enumerate()), torch.autograd.backward
    job = Job()
    modules = list(job.model.modules())
    before = [hook_dictionaries(module) for module in modules], optimizer_hooks(job.optimizer)
    monitor = attach(job.model, job.optimizer, run=run, every=every, **options)
    assert torch.autograd.backward is not backward
    job.run(STEPS)
    state = torch.get_rng_state()
    monitor.detach()

    assert_same_training(job, expected)
    assert torch.equal(state, expected_state)
    assert ([hook_dictionaries(module) for module in modules], optimizer_hooks(job.optimizer)) == before
    assert torch.autograd.backward is backward
    assert set(threading.enumerate()) == threads

    # It did observe: bit-identical because nothing was hooked would be no feat.
    stats = monitor.stats()
    assert stats.frames_committed + stats.frames_dropped == STEPS // every
    assert stats.frames_committed >= 1
    assert set(stats.faults) <= {"ring_full"}
    assert [frame.step % every for frame in frames(run)] == [0] * stats.frames_committed
    scalars = open_run(run).scalars()
    assert scalars["step"].values.tolist() == list(range(STEPS))
    assert scalars["loss"].values.tolist() == job.losses


def test_the_comparison_can_fail(unobserved: tuple[Job, torch.Tensor], run: Path) -> None:
    """A compress command does change training, so that equality above means something."""
    expected, _ = unobserved
    job = Job()
    with attach(job.model, job.optimizer, run=run, steer=True) as monitor:
        apply_now(job, run, monitor, "compress", weight=0.5)
        job.run(3)
    assert job.losses[:2] == expected.losses[:2]
    assert job.losses[2] != expected.losses[2]


def test_attach_is_idempotent_for_a_model(run: Path, tmp_path: Path) -> None:
    job = Job()
    first = attach(job.model, job.optimizer, run=run)
    assert attach(job.model, job.optimizer, run=tmp_path / "other", every=3) is first
    assert not (tmp_path / "other").exists()
    first.detach()
    again = attach(job.model, job.optimizer, run=run)
    assert again is not first
    again.detach()
    again.detach()
    assert [record["attempt"] for record in open_run(run).attempts()] == [1, 2]


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_two_monitors_at_once(tmp_path: Path, first_to_leave: int) -> None:
    jobs = [Job(seed=seed) for seed in (0, 1)]
    runs = [tmp_path / name for name in ("a", "b")]
    monitors = [observe(job, run=run, every=1) for job, run in zip(jobs, runs, strict=True)]
    for _ in range(3):
        for job in jobs:
            job.step()
    monitors[first_to_leave].detach()
    for _ in range(3):
        for job in jobs:
            job.step()
    monitors[1 - first_to_leave].detach()
    for index, (job, run) in enumerate(zip(jobs, runs, strict=True)):
        observed = 3 if index == first_to_leave else 6
        assert open_run(run).scalars()["loss"].values.tolist() == job.losses[:observed]
        assert [frame.step for frame in frames(run)] == list(range(observed))
        for frame in frames(run):
            assert frame.scalars["loss"] == job.losses[frame.step]
            assert frame.gradients is not None
            assert bool((frame.gradients != 0).any(axis=(1, 2)).all())


def test_a_foreign_wrapper_of_backward_survives_detach(run: Path) -> None:
    """Somebody wraps ours, as we wrapped torch's: theirs must not be thrown away."""
    original = torch.autograd.backward
    job = Job()
    monitor = attach(job.model, job.optimizer, run=run)
    ours, calls = torch.autograd.backward, []

    @functools.wraps(ours)
    def theirs(*args: object, **kwargs: object) -> None:
        calls.append(1)
        ours(*args, **kwargs)

    torch.autograd.backward = theirs
    try:
        monitor.detach()
        assert torch.autograd.backward is theirs
        job.step()
        assert len(calls) == 1
        second = attach(job.model, job.optimizer, run=run, every=1)
        job.step()
        second.detach()
        assert len(calls) == 2
        assert torch.autograd.backward is theirs
        assert second.stats().faults == {}
    finally:
        torch.autograd.backward = original


def test_backward_takes_what_torch_takes(run: Path) -> None:
    """Several roots, an iterator of roots, and a graph edge go through the wrapper unharmed."""
    parameter = torch.nn.Parameter(torch.ones(2))
    job = Job()
    with attach(job.model, job.optimizer, run=run):
        torch.autograd.backward(iter([(parameter * 2).sum(), (parameter * 3).sum()]))
        torch.autograd.backward([(parameter * 5).sum()])
        edge = torch.autograd.graph.get_gradient_edge((parameter * 7).sum())
        torch.autograd.backward(edge, torch.ones(()))
        torch.autograd.backward((parameter * 11).sum(), retain_graph=True)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [28.0, 28.0]


def test_switched_off_by_the_environment(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_MONITOR_MODE", "disabled")
    job = Job()
    before = [hook_dictionaries(module) for module in job.model.modules()]
    monitor = attach(job.model, job.optimizer, run=run, every=1)
    assert [hook_dictionaries(module) for module in job.model.modules()] == before
    job.run(2)
    assert not monitor.enabled
    assert monitor.stats().frames_committed == 0
    assert not run.exists()
    monitor.detach()


def test_leaving_the_context_by_an_exception_detaches(run: Path) -> None:
    job = Job()
    with pytest.raises(ZeroDivisionError), attach(job.model, job.optimizer, run=run, every=1) as monitor:
        job.step()
        _ = 1 / 0
    assert not monitor.enabled
    assert monitor.stats().frames_committed == 1
    assert [frame.step for frame in frames(run)] == [0]


def test_a_sparse_gradient_is_observed(run: Path) -> None:
    def make_model() -> nn.Module:
        model = tiny_gpt(dropout=0.0)
        model.bytes = torch.nn.Embedding(256, 32, sparse=True)
        return model

    sgd = torch.optim.SGD
    job, twin = Job(make_model, make_optimizer=sgd), Job(make_model, make_optimizer=sgd)
    with attach(job.model, job.optimizer, run=run, every=1) as monitor:
        job.run(2)
    assert monitor.stats().faults == {}
    twin.run(1)
    norms = [p.grad.to_dense().norm() for p in twin.model.parameters() if p.grad is not None]
    assert frames(run)[0].scalars["grad_norm"] == pytest.approx(float(torch.stack(norms).norm()), rel=1e-5)


def test_a_closure_is_observed(run: Path) -> None:
    """`optimizer.step(closure)` runs the passes between our two optimizer hooks."""

    def run_closures(job: Job) -> None:
        for _ in range(3):

            def closure() -> torch.Tensor:
                job.optimizer.zero_grad()
                loss = job.forward_loss()
                loss.backward()
                job.losses.append(loss.item())
                return loss

            job.optimizer.step(closure)

    job, twin = Job(), Job()
    torch.manual_seed(5)
    with attach(job.model, job.optimizer, run=run, every=1) as monitor:
        run_closures(job)
    torch.manual_seed(5)
    run_closures(twin)
    assert_same_training(job, twin)
    assert monitor.stats().faults == {}
    assert [frame.scalars["loss"] for frame in frames(run)] == job.losses


class Drawn(nn.Module):
    """A parametrization that draws: DropConnect."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * (torch.rand_like(weight) > 0.1)


@pytest.mark.parametrize("kind", ["spectral norm", "draws"])
@pytest.mark.parametrize("every", [1, 100])
def test_a_weight_that_is_computed_is_computed_as_often_as_without_us(run: Path, kind: str, every: int) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Embedding(256, 16), nn.Linear(16, 16), nn.Linear(16, 256))
        if kind == "spectral norm":
            nn.utils.parametrizations.spectral_norm(model[1])
        else:
            nn.utils.parametrize.register_parametrization(model[1], "weight", Drawn())
        return model

    plain, observed = Job(make), Job(make)
    for job in (plain, observed):
        torch.manual_seed(3)
        if job is observed:
            monitor = observe(job, run=run, every=every)
        job.run(4)
    monitor.detach()
    assert_same_training(observed, plain)
    assert monitor.stats().faults == {}
