"""What is read off a backward root: the mean loss, and what steering has to be multiplied by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional as F

from entropy_hooks.loss import read_loss

if TYPE_CHECKING:
    from collections.abc import Callable

TARGETS = torch.tensor([0, 1, -100, 2, 3, 4, 1, -100])
KEPT = 6
MASK = (TARGETS != -100).float()


def summed(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, TARGETS, reduction="sum")


def two_dimensional(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(2, 4, 5).transpose(1, 2), TARGETS.view(2, 4), reduction="sum")


def masked(logits: torch.Tensor) -> torch.Tensor:
    return (F.cross_entropy(logits, TARGETS, reduction="none") * MASK).sum() / MASK.sum()


@pytest.mark.parametrize(
    ("root", "scale"),
    [
        (lambda logits: F.cross_entropy(logits, TARGETS) / 4 * 65536, 16384),
        # The Hugging Face Trainer: 40 targets in all micro-batches of all ranks, two ranks.
        (lambda logits: summed(logits) / torch.tensor(40) * 2, KEPT / 40 * 2),
        (lambda logits: two_dimensional(logits) / 40, KEPT / 40),
        (masked, 1),
        (lambda logits: masked(logits) / 4, 0.25),
        (lambda logits: -1 * (-F.cross_entropy(logits, TARGETS)), 1),
        (lambda logits: -F.cross_entropy(logits, TARGETS) / -4, 0.25),
        (lambda logits: (F.cross_entropy(logits, TARGETS, reduction="none") * MASK).sum() * (1 / KEPT) * 64, 64),
    ],
    ids=[
        "scaled mean",
        "sum over targets of all",
        "the same of two dimensions",
        "masked mean",
        "scaled masked mean",
        "an objective that is maximised",
        "and scaled",
        "a sum that is multiplied by one over their number",
    ],
)
def test_the_mean_and_its_scale(root: Callable[[torch.Tensor], torch.Tensor], scale: float) -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mean = F.cross_entropy(logits, TARGETS)
    found = root(logits)
    reading = read_loss((found,), None)
    assert reading.loss is not None
    assert reading.loss.item() == pytest.approx(mean.item(), rel=1e-6)
    assert reading.scale == pytest.approx(scale, rel=1e-6)
    assert not reading.ambiguous
    of_root, of_mean = (torch.autograd.grad(value, logits)[0] for value in (found, mean))
    torch.testing.assert_close(of_root, of_mean * reading.scale)


def test_a_sum_that_nobody_divides_is_the_loss() -> None:
    logits = torch.randn(8, 5, requires_grad=True)
    reading = read_loss((summed(logits),), None)
    assert reading.loss is not None
    assert (reading.loss.item(), reading.scale) == (summed(logits).item(), 1.0)


def test_what_the_user_s_own_hooks_have_packed_is_not_unpacked() -> None:
    """An offloading hook may give each tensor back once; a checkpoint would run the model again."""
    packed: list[torch.Tensor] = []

    def unpack(index: int) -> torch.Tensor:
        raise AssertionError(f"{index} was unpacked")

    logits = torch.randn(8, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (packed.append(tensor), len(packed))[1], unpack):
        roots = [summed(logits) / 40, summed(logits) * torch.tensor(2.0), masked(logits) / 4]
    for root in roots:
        reading = read_loss((root,), None)
        assert reading.loss is not None
        assert torch.isfinite(reading.loss)
    assert packed
