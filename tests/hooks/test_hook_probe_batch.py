"""The probe's batch is fixed, in whatever object it came; one that cannot be kept costs the audit and nothing else."""

from __future__ import annotations

import collections
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from entropy_hooks import MonitorStats, attach
from entropy_hooks.copies import detached_copy

from .training import Job, assert_same_training, byte_loss, flushed, frames, tiny_gpt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Pair(list):
    """Cannot be made from an iterable, as a list can."""

    def __init__(self, tokens: torch.Tensor, number: int) -> None:
        super().__init__([tokens, number])


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor


class Plain:
    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens


class Stubborn(list):
    def __deepcopy__(self, memo: object) -> Any:
        raise RuntimeError("no copies\nof me")


def tokens_of(batch: Any) -> torch.Tensor:
    if hasattr(batch, "tokens"):
        return batch.tokens
    return batch["tokens"] if isinstance(batch, collections.abc.Mapping) else batch[0]


class Unpacking(nn.Module):
    """Takes its tokens out of whatever it is given, and writes into them afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_gpt(dropout=0.0)

    def forward(self, batch: Any) -> torch.Tensor:
        tokens = tokens_of(batch)
        logits = self.inner(tokens.clone())
        tokens.fill_(0)
        return logits


HOLDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "dict": lambda tokens: {"tokens": tokens},
    "OrderedDict": lambda tokens: collections.OrderedDict(tokens=tokens),
    "UserDict": lambda tokens: collections.UserDict(tokens=tokens),
    "defaultdict": lambda tokens: collections.defaultdict(list, tokens=tokens),
    "namedtuple": collections.namedtuple("Named", "tokens"),
    "list subclass": lambda tokens: Pair(tokens, 1),
    "dataclass": Batch,
    "plain object": Plain,
    "nested": lambda tokens: collections.UserDict(tokens=tokens, also=[Batch(tokens)]),
}


def train(run: Path, hold: Callable[[torch.Tensor], Any], **options: Any) -> tuple[Job, MonitorStats]:
    """Three steps at a learning rate of 0, on a buffer that the loader reuses."""
    job = Job(Unpacking, make_optimizer=lambda parameters, lr: torch.optim.SGD(parameters, lr=0.0))
    buffer = torch.empty(4, 32, dtype=torch.long)
    with attach(job.model, job.optimizer, run=run, every=1, **options) as monitor:
        for _ in range(3):
            tokens = job.next_batch()
            job.optimizer.zero_grad()
            loss = byte_loss(job.model(hold(buffer.copy_(tokens))), tokens.roll(-1, 1))
            loss.backward()
            job.optimizer.step()
            job.losses.append(loss.item())
            flushed(monitor)
    return job, monitor.stats()


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_probe_stays_the_first_batch(run: Path, holder: str) -> None:
    """The parameters do not change, so neither may the loss on the probe, nor any activation."""
    probe = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    job, stats = train(run, HOLDERS[holder], observe="probe", exact_alignment_every=1)
    assert stats.faults == {}
    assert torch.equal(job.batches[0], probe)
    with torch.no_grad():
        expected = byte_loss(job.model(Batch(probe.clone()))[:, :-1], probe[:, 1:]).item()
    found = frames(run)
    assert [frame.scalars["loss"] for frame in found] == pytest.approx([expected] * 3, rel=1e-6)
    for frame in found[1:]:
        assert (frame.activations == found[0].activations).all()
        assert frame.exact_alignment is not None
        assert found[0].exact_alignment is not None
        assert (frame.exact_alignment.cosines == found[0].exact_alignment.cosines).all()


@pytest.mark.parametrize("hold", [lambda tokens: Stubborn([tokens]), lambda tokens: (tokens, (i for i in range(2)))])
def test_a_batch_that_cannot_be_copied_costs_the_audit_alone(
    run: Path, tmp_path: Path, hold: Callable[[torch.Tensor], Any], caplog: pytest.LogCaptureFixture
) -> None:
    twin, stats = train(tmp_path / "twin", hold)
    assert stats.faults == {}
    with caplog.at_level(logging.WARNING):
        job, stats = train(run, hold, exact_alignment_every=1)
    assert_same_training(job, twin)
    assert stats.faults == {"probe_batch_not_kept": 1}
    assert [frame.step for frame in frames(run)] == [0, 1, 2]
    for frame, plain in zip(frames(run), frames(tmp_path / "twin"), strict=True):
        assert frame.scalars == plain.scalars
        assert frame.gradients is not None
        assert bool((frame.gradients != 0).any())
    (message,) = [message for message in caplog.messages if message.startswith("probe_batch_not_kept: ")]
    assert "give attach(probe=...)" in message
    assert "\n" not in message


def test_a_copy_is_deep_detached_and_shares_what_was_shared() -> None:
    leaf = torch.ones(3, requires_grad=True)
    result = leaf * 2
    kept = detached_copy({"one": [result], "other": Batch(result), "leaf": leaf, "name": "x"})
    assert kept["one"][0] is kept["other"].tokens
    assert not kept["one"][0].requires_grad
    assert kept["leaf"].requires_grad, "a model may differentiate by what it is given"
    assert kept["leaf"].grad_fn is None
    assert type(kept["other"]) is Batch
    with torch.no_grad():
        result.zero_()
        leaf.zero_()
    assert kept["one"][0].tolist() == [2.0, 2.0, 2.0]
    assert kept["leaf"].tolist() == [1.0, 1.0, 1.0]
    assert kept["name"] == "x"
