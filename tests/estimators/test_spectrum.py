"""The spectrum against singular values, and the entropies that it gives."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.estimators import matrix_entropy, spectrum


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 20), d=st.integers(1, 20), seed=st.integers(0, 99), normalize=st.booleans())
def test_it_is_the_squared_singular_values_over_their_sum(n: int, d: int, seed: int, normalize: bool) -> None:
    z = np.random.default_rng(seed).standard_normal((n, d))
    rows = z / np.linalg.norm(z, axis=1, keepdims=True) if normalize else z
    squares = np.linalg.svd(rows, compute_uv=False) ** 2
    found = spectrum(z, normalize=normalize)
    assert found.shape == (min(n, d),)
    np.testing.assert_allclose(found.numpy(), squares / squares.sum(), atol=1e-12)


@pytest.mark.parametrize("order", [0.5, 1, 2, 3])
def test_the_entropies_are_made_of_it(order: float) -> None:
    z = torch.randn(3, 40, 12, generator=torch.Generator().manual_seed(0)).double()
    values = spectrum(z, center=True)
    expected = -(values * values.log()).sum(-1) if order == 1 else (values**order).sum(-1).log() / (1 - order)
    assert torch.allclose(matrix_entropy(z, order, center=True), expected, atol=1e-10)
    assert (values.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bad_matrices_are_undetermined_and_half_precision_is_taken(dtype: torch.dtype) -> None:
    z = torch.eye(4).repeat(3, 1, 1).to(dtype)
    z[0] = 0
    z[1, 2, 2] = math.nan
    found = spectrum(z)
    assert found[:2].isnan().all()
    assert torch.equal(found[2], torch.full((4,), 0.25, dtype=torch.float64))


def test_it_is_differentiable() -> None:
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    assert torch.autograd.gradcheck(spectrum, (z,))
