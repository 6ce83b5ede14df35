"""What counts as compiled, and what the thread that compiles is: never more than what is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from entropy_hooks.compiled import compiled_original, is_compiled_in_place
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
