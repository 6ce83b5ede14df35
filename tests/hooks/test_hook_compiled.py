"""What counts as compiled or compiling: a model that is, and the thread that does, and nothing else."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from entropy_hooks.compiled import compiled_original, compiles_here, is_compiled_in_place
from entropy_hooks.taps import unwrap

from .training import Job, assert_same_training, flushed, frames, observe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class AnswersToAnyName(nn.Module):
    """A model that looks up in its configuration what it does not have."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.answer = {"answer": answer}
        self.embed = nn.Embedding(256, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 256)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self.__dict__["answer"]["answer"]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        z = self.embed(tokens)
        for block in self.blocks:
            z = z + block(z)
        return self.head(z)


class AnswersToNothing(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(256, 16), nn.Linear(16, 16), nn.Linear(16, 256))


def dynamo() -> None:
    """From now on something could be compiled."""
    assert torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("answer", [None, "anything"])
def test_a_model_that_answers_to_any_name_is_not_taken_for_compiled(run: Path, answer: Any) -> None:
    dynamo()
    plain = Job(lambda: AnswersToAnyName(answer)).run(3)
    job = Job(lambda: AnswersToAnyName(answer))
    monitor = observe(job, run=run, every=1)
    job.run(3)
    assert flushed(monitor)
    assert [frame.step for frame in frames(run)] == [0, 1, 2]
    assert frames(run)[0].groups[0].gradients is not None
    assert not monitor.stats().faults
    monitor.detach()
    assert_same_training(job, plain)


def test_what_torch_compile_made_is_told_by_its_type() -> None:
    inner = nn.Linear(2, 2)
    compiled: Any = torch.compile(inner, backend="eager")
    assert compiled_original(compiled) is inner
    assert unwrap(compiled) is inner
    delegating = AnswersToAnyName(inner)
    assert delegating._orig_mod is inner
    assert compiled_original(delegating) is None
    assert unwrap(delegating) is delegating
    inner.compile(backend="eager")
    assert is_compiled_in_place(inner)
    assert not is_compiled_in_place(compiled)
    assert not is_compiled_in_place(delegating)


def test_no_frame_is_lost_while_another_thread_compiles(run: Path) -> None:
    """Held in the midst of compiling, so that every step falls into it."""
    compiling, trained = threading.Event(), threading.Event()

    def backend(graph: Any, inputs: Any) -> Any:
        compiling.set()
        assert trained.wait(60)
        return graph

    other = threading.Thread(target=lambda: torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2)))
    job = Job()
    monitor = observe(job, run=run, every=1)
    other.start()
    try:
        assert compiling.wait(60)
        assert torch.compiler.is_compiling(), "what this test is about"
        job.run(3)
    finally:
        trained.set()
        other.join()
    assert [frame.step for frame in frames(run)] == [0, 1, 2]
    assert not monitor.stats().faults
    monitor.detach()


def test_who_exports_is_told_from_who_does_not() -> None:
    answers: list[tuple[bool, bool]] = []

    class Asking(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            answers.append((torch.compiler.is_compiling(), compiles_here()))
            return super().forward(input)

    model = Asking(2, 2)
    model(torch.ones(1, 2))
    torch.export.export(model, (torch.ones(1, 2),), strict=False)
    assert answers[0] == (False, False)
    assert set(answers[1:]) == {(True, True)}


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_between_forward_and_backward_leaves_the_frame_as_it_is(run: Path, strict: bool) -> None:
    def train(job: Job, *, export: bool) -> None:
        for _ in range(2):
            job.optimizer.zero_grad()
            loss = job.forward_loss()
            if export:
                graph = torch.export.export(job.model, (job.batches[-1],), strict=strict).graph
                assert not [node for node in graph.nodes if "randperm" in str(node.target)]
            loss.backward()
            job.optimizer.step()
            job.losses.append(loss.item())
            if job.monitor is not None:
                flushed(job.monitor)

    job, plain = Job(AnswersToNothing), Job(AnswersToNothing)
    train(plain, export=False)
    monitor = observe(job, run=run, every=1)
    train(job, export=True)
    assert_same_training(job, plain)
    assert [float(frame.scalars["loss"]) for frame in frames(run)] == pytest.approx(job.losses)
    assert all(frame.groups[0].gradients is not None for frame in frames(run))
    assert not monitor.stats().faults
    monitor.detach()
