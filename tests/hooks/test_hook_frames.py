"""A frame holds what the model computed: compared with our own plain hooks and with autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from entropy_monitor.store import open_run

from .training import Job, Truth, byte_loss, frames, observe, positions, rounded, tiny_gpt, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from entropy_monitor.types import Frame

LAYERS = ["blocks.0", "blocks.1", "blocks.2"]


class Recorder:
    """Steps a job, keeping each step's truth."""

    def __init__(self, job: Job, layers: list[str] = LAYERS) -> None:
        self.job, self.truth, self.layers = job, Truth(job.model, layers), layers
        self.activations: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.tokens: list[torch.Tensor] = []
        self.grad_norms: list[float] = []
        job.optimizer.register_step_pre_hook(lambda *_: self._keep())

    def _keep(self) -> None:
        self.activations.append({name: self.truth.activation(name).clone() for name in self.layers})
        self.gradients.append({name: self.truth.gradient(name).clone() for name in self.layers})
        self.tokens.append(self.job.batches[-1])
        norms = [p.grad.norm() for p in self.job.model.parameters() if p.grad is not None]
        self.grad_norms.append(float(torch.stack(norms).norm()))

    def check(self, frame: Frame, step: int, *, gradient_scale: float = 1.0) -> list[tuple[int, int]]:
        """Every stored value of one frame; the sampled places."""
        group = frame.groups[0]
        assert list(group.layers) == self.layers
        assert group.gradients is not None
        where = positions(frame, self.tokens[step])
        for index, layer in enumerate(self.layers):
            for stored, truth in (
                (group.activations[index], self.activations[step][layer]),
                (group.gradients[index], self.gradients[step][layer] / gradient_scale),
            ):
                expected = torch.stack([rounded(truth)[place] for place in where])
                assert torch.equal(torch.from_numpy(stored[: len(where)].copy()), expected)
        assert frame.scalars["grad_norm"] == pytest.approx(self.grad_norms[step], rel=1e-5)
        return where


def check_patches(where: list[tuple[int, int]], num_sequences: int) -> None:
    """Whole patches at multiples of 8, none twice, from different sequences as far as there are enough."""
    patches = [where[start : start + 8] for start in range(0, len(where), 8)]
    for patch in patches:
        sequence, first = patch[0]
        assert first % 8 == 0
        assert patch == [(sequence, first + offset) for offset in range(8)]
    firsts = [patch[0] for patch in patches]
    assert len(set(firsts)) == len(firsts)
    per_sequence = [sum(sequence == one for sequence, _ in firsts) for one in range(num_sequences)]
    assert max(per_sequence) - min(per_sequence) <= 1


def test_frames_hold_activations_gradients_and_scalars(run: Path) -> None:
    job = Job()
    with observe(job, run=run, every=2, patches=6, start_step=4, total_steps=9) as monitor:
        recorder = Recorder(job)
        for step in range(5):
            job.optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            job.step()
        assert monitor.stats().step == 9
    found = frames(run)
    assert [frame.step for frame in found] == [4, 6, 8]
    drawn = []
    for frame in found:
        index = frame.step - 4
        where = recorder.check(frame, index)
        check_patches(where, num_sequences=4)
        assert len(where) == 48
        assert frame.num_patches == 6
        drawn.append(where)
        assert frame.scalars["loss"] == job.losses[index]
        assert frame.scalars["lr"] == pytest.approx(1e-3 * (index + 1))
        assert frame.num_tokens_seen == (index + 1) * 4 * 32
        assert (frame.phase, frame.attempt, frame.rank) == ("memorize", 1, 0)
    assert drawn[0] != drawn[1], "each frame draws its own patches"
    scalars = open_run(run).scalars()
    assert scalars["step"].values.tolist() == [4, 5, 6, 7, 8]
    assert scalars["loss"].values.tolist() == job.losses
    assert scalars["num_tokens_seen"].values.tolist() == [128 * (index + 1) for index in range(5)]
    assert open_run(run).attempts()[0]["total_steps"] == 9


def test_a_batch_of_fewer_patches_is_taken_whole_and_padded(run: Path) -> None:
    job = Job(batch=2, tokens=19)
    with observe(job, run=run, every=1, patches=64):
        recorder = Recorder(job)
        job.step()
    (frame,) = frames(run)
    where = recorder.check(frame, 0)
    assert sorted(where) == [(sequence, place) for sequence in range(2) for place in range(16)]
    assert frame.num_patches == 4
    assert frame.activations.shape[1] == 512
    assert not frame.activations[:, 32:].any()
    assert frame.token_windows is not None
    assert (frame.token_windows[32:] == -1).all()


def test_accumulation_holds_the_last_micro_batch_unscaled(run: Path) -> None:
    job = Job()
    with observe(job, run=run, every=1, patches=8) as monitor:
        recorder = Recorder(job)
        job.run(3, accumulate=4)
    assert monitor.stats().faults == {}
    found = frames(run)
    assert [frame.step for frame in found] == [0, 1, 2]
    for frame in found:
        recorder.check(frame, frame.step, gradient_scale=0.25)
        assert frame.scalars["loss"] == job.losses[frame.step]
        assert frame.num_tokens_seen == (frame.step + 1) * 4 * 128
        assert frame.alignment is not None
        assert frame.alignment.info[:, 2].tolist() == [4 * 16] * 3  # patches of all four micro-batches


def test_a_scaled_loss_gives_unscaled_frames(run: Path) -> None:
    job = Job()
    with observe(job, run=run, every=1, patches=8):
        recorder = Recorder(job)
        job.run(2, scale=65536.0)
    for frame in frames(run):
        recorder.check(frame, frame.step, gradient_scale=65536.0)
        assert frame.scalars["loss"] == job.losses[frame.step]


def test_accumulation_of_another_length_keeps_one_pass_together(run: Path) -> None:
    """The last micro-batch is the k-th, k from the step before; a pass behind it must not mix into its frame."""
    job = Job(lambda: tiny_gpt(dropout=0.0))
    expected: list[tuple[torch.Tensor, dict[str, torch.Tensor], float]] = []
    with observe(job, run=run, every=1, patches=8) as monitor:
        truth = Truth(job.model, LAYERS)
        for accumulate, observed in ((2, 1), (3, 1), (3, 2)):
            job.optimizer.zero_grad()
            for index in range(accumulate):
                loss = job.forward_loss()
                loss.backward()
                if index == observed:
                    gradients = {name: truth.gradient(name).clone() for name in LAYERS}
                    expected.append((job.batches[-1], gradients, loss.item()))
            job.optimizer.step()
    found = frames(run)
    assert [frame.step for frame in found] == [0, 1, 2]
    for frame, (tokens, gradients, loss) in zip(found, expected, strict=True):
        where = positions(frame, tokens)  # fails if the activations are another pass's
        assert frame.scalars["loss"] == loss
        assert frame.gradients is not None
        for index, name in enumerate(LAYERS):
            rows = torch.stack([rounded(gradients[name])[place] for place in where])
            assert torch.equal(torch.from_numpy(frame.gradients[index, : len(where)].copy()), rows)
    assert monitor.stats().faults == {}


def test_a_skipped_optimizer_step(run: Path) -> None:
    """GradScaler leaves a step out when gradients overflow: the step's number and its frame wait for the next."""
    job = Job()
    with observe(job, run=run, every=1, patches=8) as monitor:
        recorder = Recorder(job)
        job.step(accumulate=2)
        for _ in range(2):
            (job.forward_loss() / 2).backward()
        job.optimizer.zero_grad()
        job.step(accumulate=2)
        assert monitor.stats().step == 2
    found = frames(run)
    assert [frame.step for frame in found] == [0, 1]
    for frame in found:
        recorder.check(frame, frame.step, gradient_scale=0.5)
        assert frame.scalars["loss"] == job.losses[frame.step]


def test_evaluation_between_steps_is_not_sampled(run: Path) -> None:
    job = Job()
    with observe(job, run=run, every=1, patches=8) as monitor:
        recorder = Recorder(job)
        job.step()
        with torch.no_grad():
            for tokens in (7, 32):
                job.model(torch.zeros(1, tokens, dtype=torch.long))
        with torch.inference_mode():
            job.model(torch.zeros(1, 16, dtype=torch.long))
        job.step()
    assert monitor.stats().faults == {}
    found = frames(run)
    assert [frame.num_tokens_seen for frame in found] == [128, 256]
    for frame in found:
        recorder.check(frame, frame.step)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_evaluation_between_forward_and_backward(run: Path, with_gradients: bool) -> None:
    job = Job()
    with observe(job, run=run, every=1, patches=8) as monitor:
        loss = job.forward_loss()
        with torch.set_grad_enabled(with_gradients):
            job.model(torch.zeros(2, 16, dtype=torch.long))
        loss.backward()
        job.optimizer.step()
    assert monitor.stats().faults == {}
    (frame,) = frames(run)
    assert len(positions(frame, job.batches[0])) == 64
    assert frame.scalars["loss"] == loss.item()
    assert frame.gradients is not None
    assert bool((frame.gradients[:, :64] != 0).any(axis=2).all())


class Checkpointed(nn.Module):
    """A GPT whose blocks are run again in the backward pass."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = tiny_gpt()
        self.use_reentrant = use_reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inner = self.inner
        x = inner.bytes(tokens) + inner.positions(torch.arange(tokens.shape[1]))
        for block in inner.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return inner.head(inner.norm(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_are_observed_once(run: Path, use_reentrant: bool) -> None:
    job, twin = Job(lambda: Checkpointed(use_reentrant=use_reentrant)), Job()
    layers = [f"inner.{name}" for name in LAYERS]
    with observe(job, run=run, every=1, patches=8) as monitor:
        torch.manual_seed(3)
        job.run(2)
    assert monitor.stats().faults == {}
    recorder = Recorder(twin)
    torch.manual_seed(3)
    twin.run(2)
    assert job.losses == twin.losses
    found = frames(run)
    assert [frame.step for frame in found] == [0, 1]
    for frame in found:
        assert list(frame.groups[0].layers) == layers
        where = positions(frame, recorder.tokens[frame.step])
        assert frame.gradients is not None
        for index, name in enumerate(LAYERS):
            for stored, truth in (
                (frame.activations[index], recorder.activations[frame.step][name]),
                (frame.gradients[index], recorder.gradients[frame.step][name]),
            ):
                expected = torch.stack([rounded(truth)[place] for place in where])
                assert torch.equal(torch.from_numpy(stored[: len(where)].copy()), expected)


def test_a_checkpoint_around_the_whole_model(run: Path) -> None:
    job = Job()
    with observe(job, run=run, every=1, patches=8) as monitor:
        tokens = job.next_batch()
        output = checkpoint(job.model, tokens, use_reentrant=False)
        assert isinstance(output, torch.Tensor)
        loss = byte_loss(output, tokens)
        loss.backward()
        job.optimizer.step()
    assert monitor.stats().faults == {}
    (frame,) = frames(run)
    assert frame.num_tokens_seen == 128
    assert frame.scalars["loss"] == loss.item()
    assert len(positions(frame, tokens)) == 64
    assert frame.gradients is not None
    assert bool((frame.gradients[:, :64] != 0).any(axis=2).all())


def test_autocast_to_bfloat16(run: Path) -> None:
    job = Job()
    with observe(job, run=run, every=1, patches=8) as monitor:
        recorder = Recorder(job)
        for _ in range(2):
            job.optimizer.zero_grad()
            tokens = job.next_batch()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = byte_loss(job.model(tokens).float(), tokens)
            loss.backward()
            job.optimizer.step()
            job.losses.append(loss.item())
    assert monitor.stats().faults == {}
    for frame in frames(run):
        recorder.check(frame, frame.step)
        assert frame.scalars["loss"] == job.losses[frame.step]


def test_a_gradient_asked_for_by_itself_is_not_recorded(run: Path) -> None:
    """`torch.autograd.grad` between forward and backward (a penalty, a probe) passes untouched."""
    job = Job()
    with observe(job, run=run, every=1, patches=8):
        truth = Truth(job.model, LAYERS)
        loss = job.forward_loss()
        alone = torch.autograd.grad(loss, [truth.outputs[name] for name in LAYERS], retain_graph=True)
        torch.autograd.grad(1000 * loss, list(job.model.parameters()), retain_graph=True)
        loss.backward()
        job.optimizer.step()
    (frame,) = frames(run)
    where = positions(frame, job.batches[0])
    assert frame.gradients is not None
    for index in range(3):
        rows = torch.stack([rounded(alone[index])[place] for place in where])
        assert torch.equal(torch.from_numpy(frame.gradients[index, : len(where)].copy()), rows)


def test_a_changed_sequence_length_opens_a_fresh_segment(run: Path) -> None:
    job = Job(lambda: tiny_gpt(dropout=0.0))
    with observe(job, run=run, every=1, patches=4) as monitor:
        recorder = Recorder(job)
        for tokens in (32, 24, 8, 32):
            job.shape = (4, tokens)
            job.step()
    assert monitor.stats().faults == {}
    found = frames(run)
    assert [frame.step for frame in found] == [0, 1, 2, 3]
    for frame in found:
        where = recorder.check(frame, frame.step)
        check_patches(where, num_sequences=4)


def test_a_changed_width_opens_a_fresh_segment(run: Path) -> None:
    """A second model of another width behind the same names: (L, n, d) has changed."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(256, 8)
            self.blocks = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)])
            self.head = nn.Linear(8, 256)
            self.both = True

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            return self.head(
                self.blocks[1](self.blocks[0](x)) if self.both else x[..., :8] + self.blocks[0](x)[..., :8]
            )

    job = Job(Wide)
    with observe(job, run=run, every=1, patches=4) as monitor:
        job.step()
        job.model.both = False  # type: ignore[assignment]
        job.step()
        job.model.both = True  # type: ignore[assignment]
        job.step()
    assert monitor.stats().frames_committed == 3
    found = frames(run)
    widths = [
        {layer: group.activations.shape[2] for group in frame.groups for layer in group.layers} for frame in found
    ]
    assert widths == [{"blocks.0": 12, "blocks.1": 8}, {"blocks.0": 12}, {"blocks.0": 12, "blocks.1": 8}]
    assert len({frame.seq // 64 for frame in found}) == 3


def test_every_frame_is_on_disk_after_detach_and_before_a_reader_needs_it(run: Path) -> None:
    job = Job()
    monitor = observe(job, run=run, every=1)
    job.step()
    wait_until(lambda: monitor.stats().frames_committed == 1, "the first frame while training goes on")
    assert [frame.step for frame in frames(run)] == [0]
    monitor.detach()
