"""Whoever never detaches: models are freed as without us, and the run ends."""

from __future__ import annotations

import gc
import time
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from entropy_hooks import attach, ending
from entropy_monitor.store import open_run, read_heartbeat, read_status

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


def test_the_run_ends_when_only_the_optimizer_is_dropped_and_the_model_goes_on_without_hooks(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "PATIENCE_S", 0.5)
    job = Job()
    monitor = observe(job, run=run, every=1)
    job.run(2)
    model = job.model
    del job
    for _ in range(3):
        model(torch.zeros(1, 16, dtype=torch.long)).sum().backward()  # asked for gradients, and trained no more
    assert ended(monitor)
    assert not monitor.stats().faults
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    again = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), run=run, every=1)
    assert again.stats().attempt == 2
    again.detach()


def test_a_model_that_trains_on_with_a_new_optimizer_is_a_fault_with_its_remedy(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job()
    monitor = observe(job, run=run, every=1)
    job.run(2)
    job.optimizer = torch.optim.SGD(job.model.parameters(), lr=0.1)
    job.run(2)
    assert ended(monitor)
    assert monitor.stats().faults == {"optimizer_replaced": 1}
    assert caplog.text.count("attach(model, new_optimizer)") == 1
    opened = open_run(run)
    assert read_status(opened).state == "ended"
    assert (read_heartbeat(opened.objects, "r00000") or {})["faults"] == {"optimizer_replaced": 1}
    again = observe(job, run=run, every=1)
    job.run(1)
    assert flushed(again)
    assert again.stats().frames_committed == 1
    again.detach()


def test_a_second_stage_is_observed_by_an_attach_of_its_own_at_once(run: Path) -> None:
    job = Job()
    first = observe(job, run=run, every=1)
    job.run(2)
    job.optimizer = torch.optim.SGD(job.model.parameters(), lr=0.1)
    second = observe(job, run=run, every=1, start_step=2)
    assert second is not first
    assert not first.enabled
    job.run(2)
    second.detach()
    assert [frame.step for frame in open_run(run).frames()] == [0, 1, 2, 3]
    assert not first.stats().faults
    assert not second.stats().faults


def test_another_model_s_training_is_no_second_stage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "PATIENCE_S", 0.5)
    job, other = Job(), Job()
    monitor = observe(job, run=run, every=1)
    job.run(2)
    model = job.model
    del job
    other.run(5)
    assert ended(monitor)
    assert not monitor.stats().faults
    assert next(model.parameters()).requires_grad


def test_the_model_lives_while_its_run_does(run: Path) -> None:
    model = tiny_gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, run=run) as monitor:
        reference = weakref.ref(model)
        del model
        assert reference() is not None, "by its optimizer"
        assert monitor.enabled
    assert reference() is None
