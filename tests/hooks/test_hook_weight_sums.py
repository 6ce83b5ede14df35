"""The weight-space sums: made by the writer from what stood before the optimizer's step, or at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from entropy_hooks import weight_space
from entropy_hooks.capture import Capture, LinearSample
from entropy_hooks.weight_space import Sums, reduce_layers
from entropy_monitor.estimators import patch_matrix_entropy_gradient, weight_alignment_parts

from .training import Job, frames, observe

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

TOKENS, WIDTH, HIDDEN = 64, 12, 20


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_taps_of_one_linear() -> tuple[Capture, nn.Parameter]:
    """An MLP's output and its block's: one linear layer writes into both, and both have the same gradient."""
    weight, inputs, gradient = (
        nn.Parameter(draw(WIDTH, HIDDEN, seed=0)),
        draw(TOKENS, HIDDEN, seed=1),
        draw(TOKENS, WIDTH, seed=2),
    )
    weight.grad = draw(WIDTH, HIDDEN, seed=3)
    capture = Capture()
    for index, layer in enumerate(("mlp", "block")):
        capture.activations[layer] = draw(TOKENS, WIDTH, seed=4 + index)
        capture.gradients[layer] = gradient
        linear = LinearSample(nn.Identity(), weight, False, inputs, torch.Size(()))
        linear.output_gradient = gradient
        capture.linears[layer] = linear
    capture.activations["norm"], capture.gradients["norm"] = draw(TOKENS, WIDTH, seed=6), gradient
    return capture, weight


def check(capture: Capture, weight_gradient: torch.Tensor, sums: Sums) -> None:
    for index, layer in enumerate(("mlp", "block")):
        h = patch_matrix_entropy_gradient(capture.activations[layer])
        expected = weight_alignment_parts(capture.linears[layer].inputs, h, weight_gradient)
        assert torch.allclose(sums.parts_LG3[index], expected, rtol=1e-4, atol=1e-6)
        expected_info = torch.tensor([float(weight_gradient.norm()), 8.0, 99.0, 0.0])
        assert torch.allclose(sums.info_L4[index], expected_info)
    assert sums.parts_LG3[2].isnan().all()
    assert sums.info_L4[2, 3] == weight_space.STATUS_NO_LINEAR


def test_the_writer_sees_the_gradients_of_before_the_step() -> None:
    capture, weight = two_taps_of_one_linear()
    assert weight.grad is not None
    before = weight.grad.clone()
    found = reduce_layers(capture, frozenset(), 99)
    assert found.sums is None
    weight.grad.zero_()
    check(capture, before, found.make_sums())


def test_of_a_large_model_they_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_space, "_MAX_COPIED", WIDTH * HIDDEN - 1)
    capture, weight = two_taps_of_one_linear()
    assert weight.grad is not None
    found = reduce_layers(capture, frozenset(), 99)
    assert found.sums is not None
    check(capture, weight.grad, found.sums)


def test_one_gradient_that_is_not_finite_or_zero_fails_the_check() -> None:
    for value in (float("nan"), float("inf"), 0.0):
        capture, _ = two_taps_of_one_linear()
        for layer in ("mlp", "block"):
            capture.gradients[layer].fill_(value)
        found = reduce_layers(capture, frozenset(), 99).make_sums()
        assert found.info_L4[:2, 3].tolist() == [weight_space.STATUS_CHECK_FAILED] * 2


def test_sums_that_cannot_be_made_cost_no_frame(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Sums:
        raise RuntimeError("no memory")

    monkeypatch.setattr(weight_space, "_reduce", fail)
    job = Job()
    with observe(job, run=run, every=1) as monitor:
        job.run(2)
    assert monitor.stats().faults == {"hook_error": 2}
    for frame in frames(run):
        assert frame.alignment is not None
        assert (frame.alignment.info[:, 3] == weight_space.STATUS_CHECK_FAILED).all()
        assert torch.isfinite(torch.from_numpy(frame.activations)).all()
