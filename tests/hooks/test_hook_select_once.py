"""Gathering the sampled tokens: one tensor once, and never another tensor's copy."""

from __future__ import annotations

import torch

from entropy_hooks.tokens import PatchSample, PatchSampler


def draw() -> PatchSample:
    sample = PatchSampler(6, seed=0).draw(4, 32, torch.device("cpu"))
    assert sample is not None
    return sample


def gathered(sample: PatchSample, sequences: torch.Tensor) -> torch.Tensor:
    return torch.stack([sequences[b, t] for b, t in zip(sample.sequence, sample.position, strict=True)])


def test_a_tensor_met_again_is_not_copied_again() -> None:
    sample, z = draw(), torch.randn(4, 32, 5)
    first = sample.select(z)
    assert torch.equal(first, gathered(sample, z))
    assert sample.select(z.detach()) is first


def test_a_tensor_written_into_is_copied_anew() -> None:
    sample, z = draw(), torch.randn(4, 32, 5)
    first, before = sample.select(z), gathered(sample, z)
    z += 1
    assert torch.equal(sample.select(z), gathered(sample, z))
    assert torch.equal(first, before)


def test_another_view_of_the_same_memory_is_another_tensor() -> None:
    sample, z = draw(), torch.randn(32, 4, 5)
    straight, turned = z.view(4, 32, 5), z.transpose(0, 1)
    assert torch.equal(sample.select(straight), gathered(sample, straight))
    assert torch.equal(sample.select(turned), gathered(sample, turned))


def test_a_tensor_that_took_a_freed_ones_place_is_copied() -> None:
    sample, addresses = draw(), list[int]()
    for value in range(50):
        z = torch.full((4, 32, 5), float(value))
        addresses.append(z.data_ptr())
        assert (sample.select(z) == value).all()
        del z
    assert len(set(addresses)) < 50, "no address was used twice: nothing was proved"


def test_inference_tensors_which_count_no_changes_are_copied_each_time() -> None:
    sample = draw()
    with torch.inference_mode():
        z = torch.randn(4, 32, 5)
        first = sample.select(z).clone()
        z += 1
        assert torch.equal(sample.select(z), first + 1)
