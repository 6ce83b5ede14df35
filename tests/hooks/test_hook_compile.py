"""Compiled models: training stays bit-identical, nothing is compiled anew, and frames hold what the graph computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from entropy_hooks import attach

from .training import (
    Job,
    Truth,
    apply_now,
    assert_same_training,
    explicit_entropy,
    flushed,
    frames,
    observe,
    positions,
    rounded,
    tiny_gpt,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from entropy_hooks import Monitor

# Torch's own: dynamo asks every tensor for its gradient, inductor imports what is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
STEPS = 6
HOW = ("wrapped", "in place", "each block")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(job: Job, how: str, backend: str) -> None:
    """Compile the job's model, as users do."""
    if how == "wrapped":
        job.model = torch.compile(job.model, backend=backend)  # type: ignore[assignment]
    elif how == "in place":
        job.model.compile(backend=backend)
    else:
        for block in job.model.blocks:  # type: ignore[union-attr]
            block.compile(backend=backend)


def make_job() -> Job:
    return Job(lambda: tiny_gpt(dropout=0.0), batch=8)


def train(job: Job, monitor: Monitor | None, steps: int = STEPS) -> Job:
    job.monitor = monitor
    return job.run(steps)


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("order", ["compile, then attach", "attach, then compile"])
def test_training_is_bit_identical_and_observed(run: Path, how: str, order: str, backend: str) -> None:
    plain = make_job()
    compiled(plain, how, backend)
    plain.run(STEPS)
    expected_graphs = num_graphs()
    torch._dynamo.reset()
    counters.clear()

    job = make_job()
    if order.startswith("attach"):
        monitor = attach(job.model, job.optimizer, run=run, every=2)
        compiled(job, how, backend)
    else:
        compiled(job, how, backend)
        monitor = attach(job.model, job.optimizer, run=run, every=2)
    train(job, monitor)
    assert num_graphs() == expected_graphs, "our hooks made it compile again"
    monitor.detach()
    train(job, None, 2)
    plain.run(2)
    assert_same_training(job, plain)
    # What was compiled with hooks in place is compiled anew without them.
    assert num_graphs() - expected_graphs == (1 if order.startswith("attach") else 0)
    assert monitor.stats().faults == {}
    found = frames(run)
    # What is compiled after attaching is noticed in the first step that it hides.
    assert [frame.step for frame in found] == ([2, 4] if order.startswith("attach") else [0, 2, 4])
    for frame in found:
        assert frame.groups[0].layers == ("blocks.0", "blocks.1", "blocks.2")
        assert frame.gradients is not None
        assert np.isfinite(frame.gradients).all()
        assert frame.scalars["loss"] == pytest.approx(plain.losses[frame.step], rel=1e-6)
        assert frame.alignment is not None
        assert (frame.alignment.info[:, 3] == 0).all()
        assert (frame.alignment.info[:, 2] == 8 * 4).all(), "patches in the whole batch"


@pytest.mark.parametrize("how", HOW)
def test_activations_and_gradients_are_those_of_the_compiled_step(run: Path, how: str) -> None:
    """Against a twin that is not compiled and has plain hooks; the loss is the user's own, weighted by position."""
    truth_job, job = make_job(), make_job()
    truth = Truth(truth_job.model, ["blocks.0", "blocks.1", "blocks.2"])
    compiled(job, how, "aot_eager")
    with observe(job, run=run, every=1) as monitor:
        for each in (truth_job, job):
            tokens = each.next_batch()
            each.optimizer.zero_grad()
            losses = F.cross_entropy(each.model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="none")
            (losses * torch.linspace(0.1, 2.0, len(losses))).sum().backward()
            each.optimizer.step()
        flushed(monitor)
    assert monitor.stats().faults == {}
    (frame,) = frames(run)
    where = positions(frame, job.batches[0])
    assert len({sequence for sequence, _ in where}) == 8, "64 patches of 8 x 4: all of them"
    assert frame.gradients is not None
    for index, name in enumerate(frame.groups[0].layers):
        expected = torch.stack([truth.activation(name)[place] for place in where])
        gradient = torch.stack([truth.gradient(name)[place] for place in where])
        found = torch.from_numpy(frame.activations[index, : len(where)].copy())
        assert torch.allclose(found, rounded(expected), rtol=2e-2, atol=1e-3)
        found = torch.from_numpy(frame.gradients[index, : len(where)].copy())
        assert float((found - gradient).norm() / gradient.norm()) < 5e-3, "bfloat16"


def test_a_part_of_a_large_batch_is_run_again(run: Path) -> None:
    job = Job(lambda: tiny_gpt(dropout=0.0), batch=64)
    compiled(job, "wrapped", "aot_eager")
    with observe(job, run=run, every=1) as monitor:
        job.run(3)
    assert monitor.stats().faults == {}
    for frame in frames(run):
        sequences = {sequence for sequence, _ in positions(frame, job.batches[frame.step])}
        assert len(sequences) == 16, "64 patches, 4 in each sequence"
        assert frame.alignment is not None
        assert (frame.alignment.info[:, 2] == 64 * 4).all()


def test_dropout_leaves_gradients_undetermined_and_is_counted(run: Path) -> None:
    """The replay draws another mask: what it says of gradients is not the step's."""
    plain, job = (Job(lambda: tiny_gpt(dropout=0.3), batch=8) for _ in range(2))
    for each in (plain, job):
        torch.manual_seed(7)
        compiled(each, "wrapped", "aot_eager")
        if each is job:
            monitor = observe(each, run=run, every=2)
        each.run(4)
    monitor.detach()
    assert_same_training(job, plain)
    assert monitor.stats().faults == {"replay_differs": 2}
    for frame in frames(run):
        assert np.isfinite(frame.activations[:, : 8 * frame.num_patches]).all()
        assert frame.gradients is not None
        assert np.isnan(frame.gradients[:, : 8 * frame.num_patches]).all()
        assert frame.alignment is not None
        assert (frame.alignment.info[:, 3] == 2).all()


@pytest.mark.parametrize("how", HOW)
def test_steering_a_compiled_model_equals_adding_to_its_loss(run: Path, how: str) -> None:
    job, twin = make_job(), make_job()
    layers = ["blocks.0", "blocks.1", "blocks.2"]
    truth = Truth(twin.model, layers)
    compiled(job, how, "aot_eager")
    with observe(job, run=run, every=3, steer=True, weight_alignment=False) as monitor:
        job.step()
        twin.step()
        graphs = num_graphs()
        apply_now(job, run, monitor, "compress", weight=0.5)
        twin.step()
        assert_same_training(job, twin)
        job.optimizer.zero_grad()
        job.forward_loss().backward()
        twin.optimizer.zero_grad()
        (twin.forward_loss() + 0.5 * explicit_entropy([truth.outputs[name] for name in layers])).backward()
        found = torch.cat([parameter.grad.flatten() for parameter in job.model.parameters()])
        expected = torch.cat([parameter.grad.flatten() for parameter in twin.model.parameters()])
        assert float((found - expected).norm() / expected.norm()) < 1e-5
        assert num_graphs() == graphs
    assert monitor.stats().faults == {}
