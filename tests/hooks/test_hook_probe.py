"""Probe mode: frames hold a fixed batch at each step's parameters, and training cannot tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from entropy_hooks import attach
from entropy_monitor.estimators import patch_matrix_entropy_gradient, weight_alignment_parts
from entropy_monitor.store import open_run

from .probing import MODELS, InPlace, Seen, Truth, half_frozen, next_byte_loss, snapshots, tied_gpt
from .training import Job, apply_now, frames, observe, positions, rounded, tiny_gpt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from entropy_monitor.types import Frame

MLP = {"blocks.0": "mlp.2", "blocks.1": "mlp.2", "blocks.2": "mlp.2"}


def check(frame: Frame, truth: Truth, where: list[tuple[int, int]]) -> None:
    """Loss, and each sampled token's activation and gradient, as the truth has them."""
    assert frame.scalars["loss"] == pytest.approx(truth.loss, rel=1e-6)
    assert frame.gradients is not None
    for index, layer in enumerate(frame.groups[0].layers):
        for stored, expected in (
            (frame.activations[index], truth.outputs[layer].detach()),
            (frame.gradients[index], truth.output_gradients[layer]),
        ):
            rows = torch.stack([rounded(expected)[place] for place in where])
            torch.testing.assert_close(torch.from_numpy(stored[: len(where)].copy()), rows, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize(
    ("make_model", "linear"), [(tiny_gpt, "mlp.2"), (tied_gpt, "mlp.2"), (half_frozen, "mlp.2"), (InPlace, "down")]
)
def test_frames_hold_the_first_batch_at_each_steps_parameters(
    run: Path, make_model: Callable[[], nn.Module], linear: str
) -> None:
    job = Job(make_model)
    states = snapshots(job)
    with observe(job, run=run, every=2, patches=6, observe="probe") as monitor:
        job.run(5, accumulate=2)
    assert monitor.stats().faults == {}
    found = frames(run)
    assert [frame.step for frame in found] == [0, 2, 4]
    places = [positions(frame, job.batches[0]) for frame in found]
    assert places[0] == places[1] == places[2], "drawn once"
    assert [place % 8 for _, place in places[0]] == list(range(8)) * 6
    for frame in found:
        truth = Truth(make_model(), states[frame.step], job.batches[0], dict.fromkeys(MLP, linear))
        check(frame, truth, places[0])
        assert frame.num_patches == 6
        assert frame.num_tokens_seen == (frame.step + 1) * 2 * 128  # of training: the probe teaches nothing
    assert len({frame.scalars["loss"] for frame in found}) == 3


def test_weight_space_sums_are_those_of_the_probes_own_weight_gradient(run: Path) -> None:
    job, tokens = Job(), torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(9))
    states = snapshots(job)
    inputs: dict[str, torch.Tensor] = {}
    with observe(job, run=run, every=1, patches=5, observe="probe", probe=next_byte_loss(tokens)) as monitor:
        job.run(3)
    assert monitor.stats().faults == {}
    for frame in frames(run):
        model = tiny_gpt()
        for layer in MLP:
            model.get_submodule(f"{layer}.mlp.2").register_forward_pre_hook(
                lambda module, args, layer=layer: inputs.update({layer: args[0].detach()})
            )
        truth = Truth(model, states[frame.step], tokens, MLP)
        assert frame.alignment is not None
        assert frame.alignment.layers == tuple(MLP)
        where = positions(frame, tokens)
        for layer, parts, info in zip(MLP, frame.alignment.parts, frame.alignment.info, strict=True):
            weight_gradient = truth.loss_gradients[f"{layer}.mlp.2.weight"]
            z, x = (torch.stack([of[layer][place] for place in where]).detach() for of in (truth.outputs, inputs))
            expected = weight_alignment_parts(x, patch_matrix_entropy_gradient(z), weight_gradient)
            torch.testing.assert_close(torch.from_numpy(parts.copy()), expected, rtol=1e-3, atol=1e-7)
            assert info.tolist() == [pytest.approx(weight_gradient.norm().item(), rel=1e-4), 5, 9, 0]


def test_scalars_of_every_step_are_those_of_training(run: Path) -> None:
    job = Job()
    norms: list[float] = []
    job.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.nn.utils.get_total_norm([p.grad for p in job.model.parameters()]).item())
    )
    with observe(job, run=run, every=2, observe="probe"):
        job.run(4)
    scalars = open_run(run).scalars()
    assert scalars["loss"].values.tolist() == job.losses
    for frame in frames(run):
        assert frame.scalars["loss"] != job.losses[frame.step]
        assert frame.scalars["grad_norm"] == pytest.approx(norms[frame.step], rel=1e-5)
    assert open_run(run).attempts()[0]["options"]["observe"] == "probe"


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_bit_identical(run: Path, name: str, accumulate: int) -> None:
    expected = Seen(MODELS[name]).run(6, accumulate=accumulate)
    seen = Seen(MODELS[name])
    with observe(seen.job, run=run, every=2, observe="probe", exact_alignment_every=4) as monitor:
        seen.run(6, accumulate=accumulate)
    seen.assert_same(expected)
    assert [frame.step for frame in frames(run)] == [0, 2, 4]
    reentrant = name == "checkpointed, reentrant"  # blocks run without a graph, and `autograd.grad` is refused
    assert monitor.stats().faults == ({"no_gradients": 3, "probe_failed": 2} if reentrant else {})
    for frame in frames(run):
        assert frame.gradients is not None
        assert bool(torch.from_numpy(frame.gradients[-1, :128].copy()).isnan().all()) == reentrant


def test_frames_and_audit_look_at_the_same_probe(run: Path) -> None:
    job = Job()
    states = snapshots(job)
    with observe(job, run=run, every=1, exact_alignment_every=2, observe="probe") as monitor:
        job.run(3)
    assert monitor.stats().faults == {}
    for frame in frames(run):
        truth = Truth(tiny_gpt(), states[frame.step], job.batches[0], MLP)
        check(frame, truth, positions(frame, job.batches[0]))
        assert frame.exact_alignment is not None
        if frame.step == 1:
            assert torch.from_numpy(frame.exact_alignment.cosines.copy()).isnan().all()
        else:
            assert frame.exact_alignment.cosines[2].tolist() == pytest.approx(truth.cosines["blocks.2"], abs=2e-5)


def test_steering_does_not_reach_the_probe(run: Path) -> None:
    """A training frame would have to leave out the gradients below the last steered layer."""
    job = Job()
    states = snapshots(job)
    with observe(job, run=run, every=1, observe="probe", steer=True) as monitor:
        apply_now(job, run, monitor, "compress", weight=0.5)
        job.run(2)
    assert monitor.stats().faults == {}
    for frame in frames(run):
        check(frame, Truth(tiny_gpt(), states[frame.step], job.batches[0], MLP), positions(frame, job.batches[0]))
        assert frame.alignment is not None
        assert frame.alignment.info[:, 3].tolist() == [0, 0, 0]
    assert [frame.phase for frame in frames(run)] == ["memorize", "compress", "compress"]


@pytest.mark.parametrize("options", [{"gradients": False}, {"weight_alignment": False}])
def test_switched_off(run: Path, options: dict[str, bool]) -> None:
    job = Job()
    states = snapshots(job)
    with observe(job, run=run, every=1, observe="probe", **options) as monitor:
        job.run(1)
    assert monitor.stats().faults == {}
    (frame,) = frames(run)
    truth = Truth(tiny_gpt(), states[0], job.batches[0], MLP)
    assert frame.scalars["loss"] == pytest.approx(truth.loss, rel=1e-6)
    assert frame.alignment is None
    assert (frame.gradients is None) == ("gradients" in options)


def test_a_layer_that_is_not_reached_by_the_loss_has_no_gradient(run: Path) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(256, 16)
            self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
            self.head = nn.Linear(16, 256)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](self.embed(tokens))
            self.blocks[1](x)
            return self.head(x)

    job = Job(Aside)
    with observe(job, run=run, every=1, observe="probe", exact_alignment_every=1) as monitor:
        job.run(1)
    assert monitor.stats().faults == {}
    (frame,) = frames(run)
    assert frame.gradients is not None
    assert frame.exact_alignment is not None
    assert torch.from_numpy(frame.gradients[:, :128].copy()).isnan().all(-1).all(-1).tolist() == [False, True]
    cosines = torch.from_numpy(frame.exact_alignment.cosines.copy())
    assert cosines.isnan().tolist() == [[False, False], [True, False]]  # its entropy depends on what both share


def test_a_probe_shorter_than_a_patch(run: Path) -> None:
    job, probe = Job(), next_byte_loss(torch.zeros(2, 7, dtype=torch.long))
    with observe(job, run=run, every=1, observe="probe", probe=probe) as monitor:
        job.run(2)
    assert monitor.stats().faults == {"batch_too_short": 6}
    assert frames(run) == []
    assert open_run(run).scalars()["loss"].values.tolist() == job.losses


def test_a_closure_is_probed_once_a_batch_is_known(run: Path) -> None:
    job = Job(lambda: tiny_gpt(dropout=0.0))
    states, norms = snapshots(job), []

    def closure() -> torch.Tensor:
        job.optimizer.zero_grad()
        loss = job.forward_loss()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in job.model.parameters()]).item())
        return loss

    with attach(job.model, job.optimizer, run=run, every=1, observe="probe") as monitor:
        for _ in range(3):
            job.optimizer.step(closure)
    assert monitor.stats().faults == {"no_probe_batch": 1}
    assert [frame.step for frame in frames(run)] == [1, 2]
    for frame in frames(run):
        truth = Truth(tiny_gpt(), states[frame.step], job.batches[0], MLP)
        check(frame, truth, positions(frame, job.batches[0]))
        assert frame.scalars["grad_norm"] == pytest.approx(norms[frame.step], rel=1e-5)


def test_a_loader_that_reuses_its_buffer_and_a_model_that_writes_into_it(run: Path) -> None:
    """The probe stays what the first batch was when the model saw it."""

    class Shifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_gpt(dropout=0.0)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            tokens += 1
            return self.inner(tokens.clamp_max(255))

    job, buffer = Job(Shifting), torch.arange(64).view(2, 32)
    states = snapshots(job)
    with attach(job.model, job.optimizer, run=run, every=1, observe="probe") as monitor:
        for _ in range(3):
            job.optimizer.zero_grad()
            job.model(buffer).square().mean().backward()
            job.optimizer.step()
            buffer.random_(0, 200)
            job.monitor = monitor
            monitor._session.writer.flush(20.0)  # type: ignore[union-attr]
    layers = {f"inner.{layer}": linear for layer, linear in MLP.items()}
    for frame in frames(run):
        state = {name.removeprefix("inner."): value for name, value in states[frame.step].items()}
        truth = Truth(tiny_gpt(), state, torch.arange(1, 65).view(2, 32), MLP)
        assert frame.scalars["loss"] == pytest.approx(truth.loss, rel=1e-6)
        assert frame.groups[0].layers == tuple(layers)
    assert len(frames(run)) == 3


def test_a_probe_lets_go_of_what_it_gathered(run: Path) -> None:
    """Its sample serves every step: what is remembered of a pass must not add up."""
    job = Job(lambda: tiny_gpt(dropout=0.0))
    with observe(job, run=run, every=1, observe="probe") as monitor:
        job.run(5)
        assert monitor._session is not None
        assert monitor._session._observation._probe is not None
        sample = monitor._session._observation._probe._sample
        assert sample is not None
        assert not sample._selected
    assert monitor.stats().frames_committed == 5
