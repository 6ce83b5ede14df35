"""Whoever never detaches: models are freed as without us, and the run ends."""

from __future__ import annotations

import gc
import time
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from entropy_hooks import attach
from entropy_monitor.store import open_run, read_status

from .training import Job, flushed, observe, tiny_gpt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from entropy_hooks import Monitor

DEADLINE_S = 15.0


@pytest.fixture(autouse=True)
def _by_reference_count_alone() -> Iterator[None]:
    """A model in a cycle would wait for the collector, with all its memory."""
    Job().run(1)  # what torch imports in a process's first step leaves a cycle through its caller behind
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def ended(monitor: Monitor) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while monitor.enabled and time.monotonic() < deadline:
        time.sleep(0.02)
    return not monitor.enabled


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("every", "options"),
    [(1, {}), (2, {"steer": True}), (2, {"observe": "probe"})],
    ids=["observing", "steering", "probing"],
)
def test_a_dropped_model_is_freed_at_once_and_its_run_ends(run: Path, every: int, options: dict[str, object]) -> None:
    job = Job()
    monitor = observe(job, run=run, every=every, **options)
    job.run(4)
    assert flushed(monitor)
    parts = [weakref.ref(thing) for thing in (job.model, job.optimizer, *job.model.modules(), *job.model.parameters())]
    del job
    assert not [part() for part in parts if part() is not None]
    assert ended(monitor)
    opened = open_run(run)
    assert read_status(opened).state == "ended"
    assert len(list(opened.frames(arrays=False))) == monitor.stats().frames_committed == 4 // every
    assert not monitor.stats().faults


@pytest.mark.parametrize("compile_it", [compiled, compiled_in_place])
def test_a_compiled_model_is_freed_as_without_us(run: Path, compile_it: Callable[[nn.Module], nn.Module]) -> None:
    def train(*, observed: bool) -> list[bool]:
        job = Job()
        job.model = compile_it(job.model)
        monitor = observe(job, run=run, every=1) if observed else None
        job.run(3)
        if monitor is not None:
            assert flushed(monitor)
        parts = [weakref.ref(parameter) for parameter in job.model.parameters()]
        parts.append(weakref.ref(job.model))
        del job
        torch._dynamo.reset()  # its caches know the model, observed or not
        gc.collect()
        alive = [part() is not None for part in parts]
        assert monitor is None or ended(monitor)
        return alive

    assert train(observed=True) == train(observed=False)


def test_a_container_that_nobody_else_keeps_is_observed_as_long_as_it_is_trained(run: Path) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    monitor = attach(nn.ModuleDict({"first": first, "second": second}), optimizer, run=run, every=1)
    for _ in range(3):
        second(first(torch.randn(4, 16, 8))).square().mean().backward()
        optimizer.step()
        assert flushed(monitor)
    frames = list(open_run(run).frames())
    assert [frame.step for frame in frames] == [0, 1, 2]
    assert frames[0].groups[0].layers == ("first", "second")
    assert not monitor.stats().faults
    monitor.detach()


def test_the_run_ends_when_only_the_optimizer_is_dropped_and_the_model_goes_on_without_hooks(run: Path) -> None:
    job = Job()
    monitor = observe(job, run=run, every=1)
    job.run(2)
    model = job.model
    del job
    assert ended(monitor)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    again = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), run=run, every=1)
    assert again.stats().attempt == 2
    again.detach()


def test_the_model_lives_while_its_run_does(run: Path) -> None:
    model = tiny_gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, run=run) as monitor:
        reference = weakref.ref(model)
        del model
        assert reference() is not None, "by its optimizer"
        assert monitor.enabled
    assert reference() is None
