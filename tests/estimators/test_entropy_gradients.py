import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.estimators import (
    matrix_entropy,
    matrix_entropy_gradient,
    patch_matrix_entropy,
    patch_matrix_entropy_gradient,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def autograd(function, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(function(z).sum(), z)[0]


@pytest.mark.parametrize("order", [0.5, 1, 2, 2.5, 4])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (2, 6, 6)])
def test_closed_form_equals_autograd(order, shape):
    z = 3 * draw(*shape)
    expected = autograd(lambda z: matrix_entropy(z, order), z)
    assert (matrix_entropy_gradient(z, order) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [(16, 5), (24, 40), (2, 3, 21, 6)])
def test_patch_gradient_equals_autograd_and_is_zero_behind_the_last_patch(normalize, shape):
    z = 3 * draw(*shape)
    gradient = patch_matrix_entropy_gradient(z, normalize=normalize)
    expected = autograd(lambda z: patch_matrix_entropy(z, normalize=normalize), z)
    assert (gradient - expected).abs().max() < 1e-10
    assert (gradient[..., shape[-2] // 8 * 8 :, :] == 0).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_patch_gradient_equals_finite_differences(normalize):
    z, step = draw(16, 3), 1e-5
    gradient = patch_matrix_entropy_gradient(z, normalize=normalize)
    for token in range(16):
        for feature in range(3):
            shift = torch.zeros_like(z)
            shift[token, feature] = step
            rise = patch_matrix_entropy(z + shift, normalize=normalize) - patch_matrix_entropy(
                z - shift, normalize=normalize
            )
            assert gradient[token, feature].item() == pytest.approx(rise.item() / (2 * step), abs=1e-8)


def test_normalised_gradient_is_the_gradient_of_unit_rows_chained_through_the_norm():
    z = draw(8, 5)
    norm = z.norm(dim=-1, keepdim=True)
    unit = z / norm
    h = matrix_entropy_gradient(unit)
    expected = (h - unit * (unit * h).sum(-1, keepdim=True)) / norm
    assert torch.allclose(patch_matrix_entropy_gradient(z, normalize=True), expected, atol=1e-14)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.5, 1.0, 2.0, 3.0]))
@settings(deadline=None)
def test_gradient_is_orthogonal_to_z_and_its_product_with_z_symmetric(seed, n, d, order):
    z = draw(n, d, seed=seed)
    h = matrix_entropy_gradient(z, order)
    size = h.norm() * z.norm() + 1e-3
    assert abs((h * z).sum()) < 1e-8 * size
    assert (z.mT @ h - h.mT @ z).abs().max() < 1e-8 * size


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_gradient_shrinks_as_the_scale_grows(seed, scale):
    z = draw(16, 5, seed=seed)
    for normalize in (False, True):
        scaled = patch_matrix_entropy_gradient(z * scale, normalize=normalize) * scale
        assert torch.allclose(scaled, patch_matrix_entropy_gradient(z, normalize=normalize), atol=1e-12)


@given(st.integers(0, 10**6))
@settings(deadline=None)
def test_a_small_step_along_the_negative_gradient_lowers_the_entropy(seed):
    z = draw(16, 5, seed=seed)
    for normalize in (False, True):
        step = 1e-3 * patch_matrix_entropy_gradient(z, normalize=normalize)
        assert patch_matrix_entropy(z - step, normalize=normalize) < patch_matrix_entropy(z, normalize=normalize)


@pytest.mark.parametrize("order", [0.5, 1, 2, 3])
def test_gradient_is_finite_where_eigenvalues_coincide_and_zero_at_the_maximum(order):
    assert matrix_entropy_gradient(torch.eye(4, 6, dtype=torch.float64), order).abs().max() < 1e-12
    duplicates = draw(1, 5).repeat(8, 1)
    assert matrix_entropy_gradient(duplicates, order).isfinite().all()


def with_zeros():
    z = draw(24, 5, dtype=torch.float32)
    z[3] = 0
    z[8:16] = 0
    return z


@pytest.mark.parametrize("normalize", [False, True])
def test_zero_rows_and_zero_patches_get_zero_gradients(normalize):
    z = with_zeros()
    gradient = patch_matrix_entropy_gradient(z, normalize=normalize)
    assert gradient.isfinite().all()
    assert (gradient[3] == 0).all()
    assert (gradient[8:16] == 0).all()
    alone = torch.cat([z[:3], z[4:8]])
    expected = autograd(lambda z: matrix_entropy(z, normalize=normalize), alone) / 3
    assert torch.allclose(gradient[[0, 1, 2, 4, 5, 6, 7]], expected, atol=1e-6)


def test_an_all_zero_matrix_gets_a_zero_gradient_of_any_order():
    for order in (0.5, 1, 2):
        assert (matrix_entropy_gradient(torch.zeros(3, 4), order) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_entry_makes_its_own_patch_nan_and_no_other(bad):
    z = draw(24, 5, dtype=torch.float32)
    z[9, 2] = bad
    for normalize in (False, True):
        gradient = patch_matrix_entropy_gradient(z, normalize=normalize)
        assert gradient[8:16].isnan().any()
        assert gradient[:8].isfinite().all()
        assert gradient[16:].isfinite().all()
    assert matrix_entropy_gradient(z, 1).isnan().all()
    assert matrix_entropy_gradient(z, 2).isnan().all()


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e3, 1e15])
def test_fp32_gradient_holds_over_the_stated_range(scale):
    z = draw(16, 64, dtype=torch.float32)
    for normalize in (False, True):
        expected = patch_matrix_entropy_gradient(z.double(), normalize=normalize)
        found = patch_matrix_entropy_gradient(z * scale, normalize=normalize).double() * scale
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_a_single_precision_gradient_under_autocast_too(dtype):
    z = draw(16, 64, dtype=torch.float32).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradient = patch_matrix_entropy_gradient(z, normalize=True)
    assert gradient.dtype == torch.float32
    expected = patch_matrix_entropy_gradient(z.double(), normalize=True)
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


def test_gradients_are_detached_and_leave_the_input_alone():
    z = draw(16, 5).requires_grad_()
    before = z.detach().clone()
    assert not patch_matrix_entropy_gradient(z, normalize=True).requires_grad
    assert not matrix_entropy_gradient(z, 1).requires_grad
    assert torch.equal(z, before)


def test_patch_gradient_reads_nothing_back_from_the_device():
    # Fake tensors have no values: anything that asks for one raises.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for normalize in (False, True):
            assert patch_matrix_entropy_gradient(torch.ones(20, 5), normalize=normalize).shape == (20, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: matrix_entropy_gradient(torch.ones(3, 2), order=0),
            "order: expected a positive finite number, found 0",
        ),
        (lambda: matrix_entropy_gradient(torch.ones(3, 2), order=math.inf), "found inf"),
        (lambda: patch_matrix_entropy_gradient(torch.ones(3, 2)), "patch: expected 1 to 3.*found 8"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
