"""Steering equals adding ``weight x MBE`` to the loss, from the acknowledged step on, and never otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .training import (
    Job,
    Truth,
    acknowledgement,
    apply_now,
    assert_same_training,
    byte_loss,
    command,
    explicit_entropy,
    frames,
    observe,
    queued,
    tiny_gpt,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from entropy_hooks import Monitor

STEERED = ["blocks.1", "blocks.2"]
"""The middle half of four blocks."""


class Variant(nn.Module):
    """A GPT of four blocks, run in one of several ways that compute the same."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = tiny_gpt(dropout=0.0, num_layers=4)
        self.blocks = self.inner.blocks
        self.how = how
        self.outputs: list[torch.Tensor] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inner = self.inner
        x = inner.bytes(tokens) + inner.positions(torch.arange(tokens.shape[1]))
        self.outputs.clear()
        for block in self.blocks:
            if self.how.startswith("checkpoint"):
                x = checkpoint(block, x, use_reentrant=self.how.endswith(" reentrant"))
                assert isinstance(x, torch.Tensor)
            else:
                x = block(x)
            self.outputs.append(x)
            if self.how == "in place":
                x += 0.1  # overwrites the block's output
            elif self.how == "in place, reference":
                x = x + 0.1
        return inner.head(inner.norm(x))


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def passes(model: Variant, batches: list[torch.Tensor], scale: float, weight: float) -> torch.Tensor:
    """Gradients of the mean over micro-batches of ``CE + weight x MBE``, the second term only where asked for."""
    model.zero_grad()
    for tokens in batches:
        loss = byte_loss(model(tokens), tokens.roll(-1, 1))
        if weight:
            loss = loss + weight * explicit_entropy(model.outputs[1:3])
        (loss / len(batches) * scale).backward()
    return gradients(model) / scale


@pytest.mark.parametrize(
    ("how", "accumulate", "scale", "tokens"),
    [
        ("eager", 1, 1.0, 32),
        ("eager", 4, 1.0, 32),
        ("eager", 1, 65536.0, 32),
        ("eager", 4, 65536.0, 29),  # the last five tokens are no whole patch
        ("checkpoint", 1, 1.0, 32),
        ("checkpoint", 2, 1024.0, 32),
        ("checkpoint reentrant", 1, 1.0, 32),
        ("in place", 2, 65536.0, 32),
    ],
)
@pytest.mark.parametrize("every", [1, 1000], ids=["sampled", "not sampled"])
def test_gradients_equal_those_of_the_explicit_loss(
    run: Path, how: str, accumulate: int, scale: float, tokens: int, every: int
) -> None:
    weight = 0.5
    job = Job(lambda: Variant(how), tokens=tokens)
    with observe(job, run=run, every=every, steer=True) as monitor:
        apply_now(job, run, monitor, "compress", weight=weight)
        if how == "in place":
            job.step()  # the first steered pass finds out that the activations are overwritten
            assert monitor.stats().faults == {"modified_in_place": 2}
        assert (monitor.phase, monitor.stats().weight) == ("compress", weight)
        batches = [job.next_batch() for _ in range(accumulate)]
        steered = passes(job.model, batches, scale, weight=0.0)  # type: ignore[arg-type]
        faults = monitor.stats().faults
    reference = Variant("in place, reference" if how == "in place" else "eager")
    reference.load_state_dict(job.model.state_dict())
    plain = passes(reference, batches, scale, weight=0.0)
    expected = passes(reference, batches, scale, weight)
    assert (expected - plain).norm() > 0.05 * expected.norm(), "the added term must matter"
    assert (steered - expected).norm() < 1e-5 * expected.norm()
    assert (steered - expected).norm() < 1e-4 * (expected - plain).norm()
    assert set(faults) <= {"modified_in_place"}


def test_sequence_first_model_is_steered_along_its_sequences(run: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm, self.head = nn.Embedding(256, 12), nn.LSTM(12, 16), nn.Linear(16, 256)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(self.embed(tokens.T))[0]).transpose(0, 1)

    job = Job(Recurrent)
    with observe(job, run=run, steer=True) as monitor:
        truth = Truth(job.model, ["lstm"])
        apply_now(job, run, monitor, "compress", weight=0.5)
        job.model.zero_grad()
        tokens = job.next_batch()
        byte_loss(job.model(tokens), tokens).backward()
        steered = gradients(job.model)
    job.model.zero_grad()
    loss = byte_loss(job.model(tokens), tokens)
    (loss + 0.5 * explicit_entropy([truth.outputs["lstm"].transpose(0, 1)])).backward()
    assert (steered - gradients(job.model)).norm() < 1e-5 * steered.norm()


def test_steer_layers_by_name(run: Path) -> None:
    job = Job(lambda: Variant("eager"))
    with observe(job, run=run, steer=True, steer_layers=["*.3"]) as monitor:
        apply_now(job, run, monitor, "compress", weight=0.5)
        tokens = job.next_batch()
        steered = passes(job.model, [tokens], 1.0, weight=0.0)  # type: ignore[arg-type]
    job.model.zero_grad()
    loss = byte_loss(job.model(tokens), tokens.roll(-1, 1))
    (loss + 0.5 * explicit_entropy(job.model.outputs[3:])).backward()  # type: ignore[arg-type, index]
    assert (steered - gradients(job.model)).norm() < 1e-5 * steered.norm()


def four_blocks() -> nn.Module:
    return tiny_gpt(dropout=0.1, num_layers=4)


def test_the_acknowledged_step_is_the_first_that_is_governed(run: Path) -> None:
    twin = Job(four_blocks)
    unsteered = [twin.parameters]
    for _ in range(8):
        twin.step()
        unsteered.append(twin.parameters)

    job = Job(four_blocks)
    seen: list[tuple[str, float, int]] = []
    with observe(job, run=run, every=1, steer=True, start_step=100) as monitor:
        monitor.on_phase(lambda phase, weight: seen.append((phase, weight, monitor.stats().step)))
        job.run(3)
        steered = [job.parameters]
        ack = apply_now(job, run, monitor, "compress", weight=0.25)
        for _ in range(4):
            steered.append(job.parameters)
            job.step()
    assert ack.step == 104
    assert seen == [("compress", 0.25, 104)]
    assert job.losses[:5] == twin.losses[:5], "the loss of the first governed step comes before its update"
    assert job.losses[5] != twin.losses[5]
    for index, (one, other) in enumerate(zip(steered, unsteered[3:], strict=False), start=103):
        same = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert same == (index <= ack.step), f"parameters before step {index}"
    for frame in frames(run):
        governed = frame.step >= ack.step
        assert (frame.phase, frame.scalars["weight"]) == (("compress", 0.25) if governed else ("memorize", 0.0))


def test_steered_layers_and_those_before_them_are_undetermined(run: Path) -> None:
    """Their loss gradient holds injected terms: it must not be shown as the loss's."""
    job = Job(four_blocks)
    with observe(job, run=run, every=1, steer=True) as monitor:
        apply_now(job, run, monitor, "compress")
        job.step()
    before, after = frames(run)
    assert before.alignment is not None
    assert after.alignment is not None
    assert before.alignment.info[:, 3].tolist() == [0, 0, 0, 0]
    assert after.alignment.info[:, 3].tolist() == [4, 4, 4, 0]
    assert after.gradients is not None
    assert torch.from_numpy(after.gradients).isnan().all(2).all(1).tolist() == [True, True, True, False]
    assert torch.from_numpy(after.activations).isfinite().all()


def test_memorize_ends_it(run: Path) -> None:
    job = Job(lambda: Variant("eager"))
    with observe(job, run=run, steer=True) as monitor:
        apply_now(job, run, monitor, "compress", weight=0.5)
        apply_now(job, run, monitor, "memorize")
        assert monitor.phase == "memorize"
        tokens = job.next_batch()
        found = passes(job.model, [tokens], 1.0, weight=0.0)  # type: ignore[arg-type]
    assert torch.equal(found, passes(job.model, [tokens], 1.0, weight=0.0))  # type: ignore[arg-type]


def test_detach_ends_it(run: Path) -> None:
    job = Job(lambda: Variant("eager"))
    with observe(job, run=run, steer=True) as monitor:
        apply_now(job, run, monitor, "compress", weight=0.5)
        tokens = job.next_batch()
        steered = passes(job.model, [tokens], 1.0, weight=0.0)  # type: ignore[arg-type]
    plain = passes(job.model, [tokens], 1.0, weight=0.0)  # type: ignore[arg-type]
    assert not torch.equal(steered, plain)


@pytest.mark.parametrize("in_force", ["memorize", "compress"])
def test_auto_changes_nothing(run: Path, tmp_path: Path, in_force: str) -> None:
    jobs = []
    for place, with_auto in ((run, True), (tmp_path / "twin", False)):
        job = Job(four_blocks)
        with observe(job, run=place, steer=True) as monitor:
            seen: list[str] = []
            monitor.on_phase(lambda phase, weight, seen=seen: seen.append(phase))
            apply_now(job, place, monitor, in_force, weight=0.25)
            if with_auto:
                apply_now(job, place, monitor, "auto", weight=7.0)
            else:
                job.step()
            job.run(3)
            assert (monitor.phase, monitor.stats().weight) == (in_force, 0.25)
            assert seen == [in_force]
        jobs.append(job)
    assert_same_training(*jobs)


def test_a_gradient_asked_for_by_itself_is_not_steered(run: Path) -> None:
    job = Job(lambda: Variant("eager"))
    with observe(job, run=run, steer=True) as monitor:
        apply_now(job, run, monitor, "compress", weight=0.5)
        tokens = job.next_batch()
        parameters = list(job.model.parameters())
        found = torch.autograd.grad(byte_loss(job.model(tokens), tokens), parameters)
    expected = torch.autograd.grad(byte_loss(job.model(tokens), tokens), parameters)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def two_terms(model: Variant, tokens: torch.Tensor, scale: float, weight: float) -> torch.Tensor:
    """Gradients of ``(CE + weight x MBE) / 2 + decay``, run as a user's loss of two terms."""
    model.zero_grad()
    cross_entropy = byte_loss(model(tokens), tokens)
    if weight:
        cross_entropy = cross_entropy + weight * explicit_entropy(model.outputs[1:3])
    decay = 0.01 * model.inner.head.weight.square().sum()
    ((0.5 * cross_entropy + decay) * scale).backward()
    return gradients(model) / scale


@pytest.mark.parametrize("loss_scale", [None, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_loss_of_two_terms(
    run: Path, caplog: pytest.LogCaptureFixture, loss_scale: float | None, scale: float
) -> None:
    job = Job(lambda: Variant("eager"))
    with observe(job, run=run, steer=True, loss_scale=loss_scale) as monitor:
        apply_now(job, run, monitor, "compress", weight=0.5)
        tokens = job.next_batch()
        found = [two_terms(job.model, tokens, scale, 0.0) for _ in range(2)][1]  # type: ignore[arg-type]
        faults = monitor.stats().faults
    plain = two_terms(job.model, tokens, scale, 0.0)  # type: ignore[arg-type]
    if loss_scale is None:
        assert torch.equal(found, plain)
        assert faults["loss_scale_ambiguous"] == 4  # two layers, two passes
        assert len([record for record in caplog.records if "loss_scale_ambiguous" in record.getMessage()]) == 1
    else:
        expected = two_terms(job.model, tokens, scale, 0.5)  # type: ignore[arg-type]
        assert (found - expected).norm() < 1e-5 * expected.norm()
        assert (found - plain).norm() > 0.01 * plain.norm()
        assert faults == {}


def test_callback_that_raises_is_counted(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[str, float]] = []

    def angry(phase: str, weight: float) -> None:
        raise RuntimeError("the user's own mistake")

    jobs = []
    for observed in (True, False):
        job = Job(four_blocks)
        if observed:
            with observe(job, run=run, steer=True) as monitor:
                monitor.on_phase(angry)
                monitor.on_phase(lambda phase, weight: seen.append((phase, weight)))
                apply_now(job, run, monitor, "memorize")
                apply_now(job, run, monitor, "memorize")
                job.step()
                assert monitor.stats().faults == {"callback_failed": 2}
        else:
            job.run(3)
        jobs.append(job)
    assert seen == [("memorize", 0.0), ("memorize", 0.0)]
    assert_same_training(*jobs)
    assert len([record for record in caplog.records if "callback_failed" in record.getMessage()]) == 1


def test_a_command_is_applied_once_although_the_trainer_restarts(run: Path) -> None:
    job, twin = Job(four_blocks), Job(four_blocks)
    with observe(job, run=run, steer=True) as monitor:
        first = apply_now(job, run, monitor, "compress", weight=0.25)

    torch.manual_seed(9)
    with observe(job, run=run, steer=True) as second:
        assert second.stats().attempt == 2
        assert second.phase == "memorize"
        # A later command shows that the trainer has looked at all before it.
        later = command(run, "auto")
        wait_until(lambda: queued(second), "the later command")
        before = job.parameters
        job.step()
        assert second.phase == "memorize"
        assert second.stats().weight == 0.03
    assert acknowledgement(run, 1) == first
    ack = acknowledgement(run, int(later.command_id))
    assert ack is not None
    assert (ack.status, ack.step) == ("applied", 1)

    # The same step without any monitor, from the same state.
    twin.step()
    for mine, theirs in zip(twin.model.parameters(), before, strict=True):
        mine.data.copy_(theirs)
    torch.manual_seed(9)
    twin.step()
    assert twin.losses[1] == job.losses[1]


def test_commands_of_one_boundary_are_applied_in_order(run: Path) -> None:
    job = Job(four_blocks)
    with observe(job, run=run, steer=True) as monitor:
        for phase, weight in (("compress", 0.1), ("memorize", None), ("compress", 0.2)):
            command(run, phase, weight=weight)
        wait_until(lambda: pending(monitor) == 3, "all three commands")
        job.step()
        assert (monitor.phase, monitor.stats().weight) == ("compress", 0.2)
    assert [(ack.command_id[-1], ack.status, ack.step) for ack in run_acks(run)] == [
        ("1", "applied", 1),
        ("2", "applied", 1),
        ("3", "applied", 1),
    ]


def pending(monitor: Monitor) -> int:
    session = monitor._session
    assert session is not None
    return len(session._pulse.delivery._pending)


def run_acks(run: Path) -> list[Any]:
    from entropy_monitor.store import open_run

    return open_run(run).acknowledgements()


@pytest.mark.parametrize("make_model", [four_blocks, lambda: tiny_gpt(num_layers=2)])
def test_default_weight(run: Path, make_model: Callable[[], nn.Module]) -> None:
    job = Job(make_model)
    with observe(job, run=run, steer=True) as monitor:
        apply_now(job, run, monitor, "compress")
        assert monitor.stats().weight == 0.03
