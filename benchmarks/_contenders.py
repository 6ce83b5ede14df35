"""What is compared: nothing, the floor, ours, and what people use otherwise.

A contender is a context manager over a job: within it, the job is watched. Peers are used where they are installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _gpt import CAPTURED, Job, OnStep

from entropy_hooks import attach
from entropy_monitor import open_run
from entropy_monitor.store import CommandRequest, issue_command


@dataclass(slots=True)
class Attached:
    """A watched job."""

    on_step: OnStep | None = None
    drain: Callable[[], None] = lambda: None
    """Waits until background work of the steps so far is done."""
    dropped: Callable[[], int] = lambda: 0
    """Records given up so far."""
    sampling: Callable[[], bool] = lambda: True
    """Whether the step under way is sampled."""


Watch = Callable[[Job, Path], AbstractContextManager[Attached]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One row of the table."""

    name: str
    watch: Watch
    every: int = 1
    kind: str = "peer"
    """ "floor", "ours" or "peer"."""
    needs: str | None = None
    """The package it comes from."""

    @property
    def installed(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


@contextlib.contextmanager
def nothing(job: Job, directory: Path) -> Iterator[Attached]:
    """The noise: bare blocks measured as if they were a contender."""
    yield Attached()


@contextlib.contextmanager
def _hooks(job: Job, make: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_hook(make(name)) for name, module in job.captured().items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def empty_hooks(job: Job, directory: Path) -> Iterator[Attached]:
    with _hooks(job, lambda name: lambda module, args, output: None):
        yield Attached()


def bare_copy(gradients: bool, num_tokens: int = 512) -> Watch:
    """The floor of any sampling monitor: `index_select` of the tokens into buffers that exist already."""

    @contextlib.contextmanager
    def watch(job: Job, directory: Path) -> Iterator[Attached]:
        buffers: dict[str, torch.Tensor] = {}
        patches = torch.randperm(job.size.batch * job.size.context // 8)[: num_tokens // 8]
        rows = (8 * patches[:, None] + torch.arange(8)).flatten()

        def copy(name: str, tensor: torch.Tensor) -> None:
            flat = tensor.detach().view(-1, tensor.shape[-1])
            if name not in buffers:
                buffers[name] = torch.empty(num_tokens, tensor.shape[-1])
            torch.index_select(flat, 0, rows, out=buffers[name])

        def make(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
                copy(name, output)
                if gradients:
                    output.register_hook(lambda gradient: copy(f"{name} gradient", gradient))

            return hook

        with _hooks(job, make):
            yield Attached()

    return watch


def ours(steer: bool = False, **options: object) -> Watch:
    @contextlib.contextmanager
    def watch(job: Job, directory: Path) -> Iterator[Attached]:
        with attach(job.model, job.optimizer, run=directory, layers=CAPTURED, steer=steer, **options) as monitor:
            job.step()
            if steer:
                run = open_run(directory)
                request = CommandRequest(phase="compress", weight=0.03, reason="benchmark", issued_by="benchmark")
                issue_command(run.objects, run.run_id, request)
                time.sleep(0.2)
                while monitor.phase != "compress" or (monitor.stats().step - 1) % monitor.options.every:
                    job.step()
            session = monitor._session
            yield Attached(
                drain=lambda: session.writer.flush(60),
                dropped=lambda: monitor.stats().frames_dropped,
                sampling=lambda: monitor.stats().step % monitor.options.every == 0,
            )
            faults = dict(monitor.stats().faults)
            if faults:
                print(f"faults: {faults}")

    return watch


@contextlib.contextmanager
def naive(job: Job, directory: Path) -> Iterator[Attached]:
    """What is written in an afternoon: every activation to the host and to a file."""
    step = 0

    def count(loss: torch.Tensor) -> None:
        nonlocal step
        step += 1

    def make(name: str) -> Callable[..., None]:
        return lambda module, args, output: np.save(directory / f"{step}-{name}.npy", output.detach().cpu().numpy())

    with _hooks(job, make):
        yield Attached(count)


def tensorboard(every: int) -> Watch:
    @contextlib.contextmanager
    def watch(job: Job, directory: Path) -> Iterator[Attached]:
        from torch.utils.tensorboard import SummaryWriter

        step = 0

        def count(loss: torch.Tensor) -> None:
            nonlocal step
            step += 1

        def make(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
                if step % every == 0:
                    writer.add_histogram(name, output.detach(), step)

            return hook

        with contextlib.closing(SummaryWriter(str(directory))) as writer, _hooks(job, make):
            yield Attached(count, writer.flush)

    return watch


def wandb_watch(every: int) -> Watch:
    @contextlib.contextmanager
    def watch(job: Job, directory: Path) -> Iterator[Attached]:
        os.environ.update(WANDB_SILENT="true", WANDB_CONSOLE="off")
        import wandb

        settings = wandb.Settings(x_disable_stats=True)
        with wandb.init(project="overhead", mode="offline", dir=str(directory), settings=settings) as run:
            run.watch(job.model, log="all", log_freq=every)
            try:
                # Its service is another process; a second is enough for it to have written what it was sent.
                yield Attached(lambda loss: run.log({"loss": loss}), lambda: time.sleep(1))
            finally:
                run.unwatch(job.model)

    return watch


@contextlib.contextmanager
def delve(job: Job, directory: Path) -> Iterator[Attached]:
    """Its defaults, on the linear layers of the blocks; the saturation of an epoch is not computed, only its sums."""
    from delve import SaturationTracker

    logging.getLogger("delve").setLevel(logging.WARNING)  # behind the import, which sets it to tell of each layer
    before = {module: dict(module._forward_hooks) for module in job.model.modules()}
    tracker = SaturationTracker(str(directory), "csv", job.model.blocks, stats=["lsat"], device="cpu")
    try:
        yield Attached()
    finally:
        tracker.stop()
        for module, hooks in before.items():
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


CONTENDERS = [
    Contender(name="nothing (the noise)", watch=nothing, kind="floor"),
    Contender(name="nothing, blocks of 10", watch=nothing, every=10, kind="floor"),
    Contender(name="empty hooks", watch=empty_hooks, kind="floor"),
    Contender(name="bare copy, activations, every 1", watch=bare_copy(gradients=False), kind="floor"),
    Contender(name="bare copy, with gradients, every 1", watch=bare_copy(gradients=True), kind="floor"),
    *(
        contender
        for every in (10, 1)
        for contender in (
            Contender(
                name=f"ours, activations, every {every}",
                watch=ours(every=every, gradients=False),
                every=every,
                kind="ours",
            ),
            Contender(
                name=f"ours, with gradients, every {every}",
                watch=ours(every=every, weight_alignment=False),
                every=every,
                kind="ours",
            ),
            Contender(
                name=f"ours, with weight-space alignment, every {every}",
                watch=ours(every=every),
                every=every,
                kind="ours",
            ),
            Contender(
                name=f"ours, the same and steering, every {every}",
                watch=ours(every=every, steer=True),
                every=every,
                kind="ours",
            ),
        )
    ),
    Contender(name="naive .cpu() + np.save, every 1", watch=naive),
    Contender(name="TensorBoard add_histogram, every 10", watch=tensorboard(10), every=10, needs="tensorboard"),
    Contender(name="TensorBoard add_histogram, every 1", watch=tensorboard(1), needs="tensorboard"),
    Contender(name='wandb.watch(log="all"), every 10', watch=wandb_watch(10), every=10, needs="wandb"),
    Contender(name='wandb.watch(log="all"), every 1', watch=wandb_watch(1), needs="wandb"),
    Contender(name="Delve saturation, every 1", watch=delve, needs="delve"),
]
