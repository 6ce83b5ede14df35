"""All figures of a layer at once are those of the functions that define them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.estimators import (
    gradient_alignment,
    layer_estimates,
    matrix_entropy,
    matrix_entropy_standard_error,
    patch_entropies,
    sample_entropies,
)


def tokens(*shape: int, seed: int = 0, decay: float = 0.0, common: float = 0.0) -> torch.Tensor:
    """Patches whose tokens have much in common, a power-law spectrum, and an offset shared by all tokens."""
    generator = torch.Generator().manual_seed(seed)
    *batch, n, d = shape
    scale = torch.arange(1.0, d + 1) ** -decay
    of_patch = torch.randn(*batch, n // 8, 1, d, generator=generator).expand(*batch, n // 8, 8, d).flatten(-3, -2)
    offset = common * torch.randn(*batch, 1, d, generator=generator)
    return (torch.randn(shape, generator=generator) + 0.7 * of_patch) * scale + offset


@settings(max_examples=40, deadline=None)
@given(
    num_patches=st.integers(2, 20),
    width=st.integers(1, 40),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 99),
)
def test_they_agree_with_the_single_functions(num_patches: int, width: int, scale: float, seed: int) -> None:
    z = scale * tokens(2, 8 * num_patches, width, seed=seed).double()
    g = tokens(2, 8 * num_patches, width, seed=seed + 100).double()
    found = layer_estimates(z, g)
    close = {"atol": 1e-9, "rtol": 1e-7, "equal_nan": True}
    assert torch.allclose(found.raw, patch_entropies(z), **close)
    assert torch.allclose(found.normalized, patch_entropies(z, normalize=True), **close)
    assert torch.allclose(found.centered, patch_entropies(z, center=True), atol=1e-7)
    single = sample_entropies(z, normalize=True)
    assert torch.allclose(found.sample.s1, single.s1, **close)
    assert torch.allclose(found.sample.s2, single.s2, **close)
    assert torch.allclose(found.sample.s2_std_error, single.s2_std_error, **close)
    for ours, theirs in zip(found.alignment, gradient_alignment(z, g), strict=True):
        assert torch.allclose(ours, theirs, **close)


@pytest.mark.parametrize(("n", "d"), [(512, 768), (512, 96), (2048, 256), (64, 64)])
@pytest.mark.parametrize(("decay", "common"), [(0, 0), (0.5, 0), (1, 0), (2, 0), (0, 1), (0.5, 3), (0, 30)])
def test_the_fitted_error_of_s1_is_near_the_exact_one(n: int, d: int, decay: float, common: float) -> None:
    z = tokens(n, d, decay=decay, common=common)
    found = layer_estimates(z).sample
    exact = matrix_entropy_standard_error(z.double(), 1, normalize=True)
    assert found.s1_std_error.item() == pytest.approx(exact.item(), rel=0.15)
    assert found.s1.item() == pytest.approx(matrix_entropy(z.double(), 1, normalize=True).item(), abs=1e-4)


def test_the_fitted_error_of_s1_is_its_spread_over_draws() -> None:
    """200 draws of 64 patches each: SE over standard deviation within the bounds that every error must keep."""
    population = tokens(8 * 4096, 48, decay=0.5).view(-1, 8, 48)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([population[torch.randperm(4096, generator=generator)[:64]].flatten(0, 1) for _ in range(200)])
    sample = layer_estimates(draws).sample
    assert 0.7 < (sample.s1_std_error.mean() / sample.s1.std()).item() < 1.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    z = tokens(64, 16).to(dtype)
    found, expected = layer_estimates(z), layer_estimates(z.float())
    assert found.raw.dtype == torch.float32
    assert torch.equal(found.raw, expected.raw)


def test_numpy_is_accepted_and_a_single_patch_has_no_whole_sample() -> None:
    found = layer_estimates(np.eye(8, dtype=np.float32))
    assert found.raw.item() == pytest.approx(math.log(8))
    assert found.sample is None
    assert found.alignment is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_entry_spoils_its_own_layer_alone(bad: float) -> None:
    z = tokens(3, 64, 16)
    z[1, 5, 3] = bad
    found, clean = layer_estimates(z, z + 1), layer_estimates(tokens(3, 64, 16), tokens(3, 64, 16) + 1)
    for figure, expected in zip(
        (found.raw, found.normalized, found.centered, *found.sample, *found.alignment),
        (clean.raw, clean.normalized, clean.centered, *clean.sample, *clean.alignment),
        strict=True,
    ):
        assert figure[1].isnan().any()
        assert torch.allclose(figure[[0, 2]], expected[[0, 2]])


def test_zero_rows_zero_patches_and_duplicates() -> None:
    z = tokens(64, 16)
    z[3] = 0
    assert torch.allclose(layer_estimates(z).normalized, patch_entropies(z, normalize=True), atol=1e-5)
    z[8:16] = 0
    found = layer_estimates(z)
    assert found.raw[1].isnan()
    assert found.raw[[0, *range(2, 8)]].isfinite().all()
    assert found.sample.s1.isfinite()
    same = layer_estimates(torch.ones(64, 16))
    assert same.normalized.abs().max() < 1e-5
    assert abs(same.sample.s1.item()) < 1e-4
    assert same.sample.s1_std_error.item() < 1e-3


def test_patches_of_a_subsample() -> None:
    z = tokens(64, 16)
    found = layer_estimates(z, subsample=torch.tensor([1, 4, 6]))
    kept = torch.cat([z[8:16], z[32:40], z[48:56]])
    assert torch.allclose(found.sample.s1, matrix_entropy(kept, 1, normalize=True), atol=1e-5)
    assert found.raw.shape == (8,)
