"""Promises of every matrix-entropy and alignment estimator at the edges: odd shapes, odd numbers, low precision."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from entropy_monitor.estimators import (
    effective_rank,
    gradient_alignment,
    gradient_alignment_from_parts,
    matrix_entropy,
    matrix_entropy_gradient,
    matrix_entropy_standard_error,
    matrix_entropy_unbiased,
    patch_entropies,
    patch_matrix_entropy,
    patch_matrix_entropy_gradient,
    sample_entropies,
    weight_alignment_parts,
)

SEEDS = st.integers(0, 10**6)
SIDES = st.integers(1, 12)
WHOLE_SAMPLE = {
    "S1": lambda z: matrix_entropy(z, 1),
    "S2": matrix_entropy,
    "S2, unbiased": matrix_entropy_unbiased,
    "SE of S1": lambda z: matrix_entropy_standard_error(z, 1),
    "SE of S2": matrix_entropy_standard_error,
    **{
        f"sample {name}": lambda z, name=name: getattr(sample_entropies(z), name)
        for name in ("s1", "s1_std_error", "s2", "s2_std_error")
    },
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def autograd(function, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(function(z).sum(), z)[0]


def rotation(size, seed):
    return torch.linalg.qr(draw(size, size, seed=seed))[0]


def repitl_order_two(gram_nn):
    """The information potential of repitl at order 2, which divides by the square of the number of rows."""
    return -math.log(float((gram_nn * gram_nn).sum()) / len(gram_nn) ** 2)


@given(SEEDS, SIDES, SIDES)
@settings(deadline=None)
def test_on_unit_rows_order_two_is_that_of_repitl(seed, n, d):
    z = draw(n, d, seed=seed)
    unit = z / z.norm(dim=1, keepdim=True)
    assert matrix_entropy(z, normalize=True).item() == pytest.approx(repitl_order_two(unit @ unit.mT), abs=1e-10)


def test_on_rows_of_unequal_norm_repitl_is_not_scale_free():
    z = draw(12, 5)
    by_n = [repitl_order_two((scale * z) @ (scale * z).mT) for scale in (1, 2)]
    assert abs(by_n[0] - by_n[1]) == pytest.approx(4 * math.log(2))
    assert matrix_entropy(2 * z).item() == pytest.approx(matrix_entropy(z).item(), abs=1e-12)


@given(SEEDS, SIDES, SIDES, st.floats(0.3, 4), st.floats(-3, 3))
@settings(deadline=None)
def test_gradient_in_closed_form_is_autograd_for_any_shape_order_and_scale(seed, n, d, order, log_scale):
    z = draw(n, d, seed=seed) * 10**log_scale
    # Powers close to 1 divide a difference of order |1 - order| by itself.
    order = order if abs(order - 1) > 1e-2 else 1
    # The smallest eigenvalues of an ill-conditioned matrix are rounding, which orders below 1 magnify.
    assume(float(torch.linalg.cond(z)) < 1e3)
    expected = autograd(lambda z: matrix_entropy(z, order), z)
    found = matrix_entropy_gradient(z, order)
    assert (found - expected).abs().max() * 10**log_scale < 1e-10


@given(SEEDS, st.integers(1, 4), st.integers(1, 9), SIDES, st.booleans())
@settings(deadline=None)
def test_patch_gradient_in_closed_form_is_autograd_for_any_shape(seed, num_patches, patch, d, normalize):
    z = draw(num_patches * patch + 1, d, seed=seed)
    expected = autograd(lambda z: patch_matrix_entropy(z, patch, normalize=normalize), z)
    # A row next to zero has a large gradient, and rounding of its size.
    size = 1 + expected.abs().max()
    assert (patch_matrix_entropy_gradient(z, patch, normalize=normalize) - expected).abs().max() < 1e-10 * size


@given(SEEDS, st.integers(2, 6), st.integers(2, 8), st.integers(2, 9), st.integers(0, 7))
@settings(deadline=None)
def test_activation_alignment_is_autograd_for_any_shape(seed, num_patches, patch, d, left_over):
    z, g = (draw(num_patches * patch + left_over % patch, d, seed=seed + shift) for shift in (0, 1))
    h = autograd(lambda z: patch_matrix_entropy(z, patch), z)
    used = num_patches * patch
    expected = torch.nn.functional.cosine_similarity(g[:used].flatten(), h[:used].flatten(), dim=0)
    found = gradient_alignment(z, g, patch).cosine
    assert abs(found) <= 1 + 1e-9
    # ||H|| comes from traces that cancel: what is left of them carries the digits.
    assert (found - expected).abs() < 1e-10 / min(1, h.norm().item() * z.norm().item()) ** 2


@given(SEEDS)
@settings(deadline=None)
def test_alignments_know_no_rotation_of_the_features(seed):
    z, g, turn = draw(32, 5, seed=seed), draw(32, 5, seed=seed + 1), rotation(5, seed + 2)
    plain, turned = gradient_alignment(z, g), gradient_alignment(z @ turn, g @ turn)
    assert torch.allclose(torch.stack(plain), torch.stack(turned), atol=1e-9)
    x, weight_gradient, turn_x = draw(32, 4, seed=seed + 3), draw(5, 4, seed=seed + 4), rotation(4, seed + 5)
    parts = weight_alignment_parts(x, g, weight_gradient)
    assert torch.allclose(parts, weight_alignment_parts(x @ turn_x, g @ turn, turn.mT @ weight_gradient @ turn_x))


@given(SEEDS, st.integers(2, 4), st.integers(1, 3))
@settings(deadline=None)
def test_the_order_of_patches_is_no_matter_to_whole_sample_figures(seed, num_patches, d):
    z = draw(num_patches, 8, d, seed=seed)
    moved = z[torch.randperm(num_patches, generator=torch.Generator().manual_seed(seed))]
    for name, figure in WHOLE_SAMPLE.items():
        assert torch.allclose(figure(z.flatten(0, 1)), figure(moved.flatten(0, 1)), atol=1e-9, equal_nan=True), name


@given(SEEDS, SIDES, SIDES)
@settings(deadline=None)
def test_effective_rank_lies_between_one_and_the_smaller_side(seed, n, d):
    assert 1 - 1e-9 <= effective_rank(draw(n, d, seed=seed)).item() <= min(n, d) + 1e-9


@pytest.mark.parametrize("name", WHOLE_SAMPLE)
def test_duplicated_tokens_have_finite_figures(name):
    z = draw(3, 5).repeat(8, 1)
    assert WHOLE_SAMPLE[name](z).isfinite()


@pytest.mark.parametrize("name", WHOLE_SAMPLE)
def test_one_feature_has_no_entropy_and_no_error(name):
    z = draw(32, 1).abs() + 0.1
    assert WHOLE_SAMPLE[name](z).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", WHOLE_SAMPLE)
def test_zero_rows_in_a_patch_leave_whole_sample_figures_finite(name):
    z = draw(24, 5)
    z[[1, 9, 10]] = 0
    assert WHOLE_SAMPLE[name](z).isfinite()


@pytest.mark.parametrize("name", WHOLE_SAMPLE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_entry_makes_whole_sample_figures_undetermined_and_no_others(name, bad):
    z = draw(3, 24, 5)
    z[1, 2, 3] = bad
    assert WHOLE_SAMPLE[name](z).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", WHOLE_SAMPLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_whole_sample_figures_are_those_of_the_same_numbers(name, dtype):
    z = draw(64, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = WHOLE_SAMPLE[name](z)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(WHOLE_SAMPLE[name](z.double()).item(), rel=1e-4, abs=1e-5)


def test_a_single_token_has_no_entropy_and_no_gradient():
    z = draw(1, 7)
    for order in (0.5, 1, 2, 3):
        assert matrix_entropy(z, order).item() == pytest.approx(0, abs=1e-12)
        assert matrix_entropy_gradient(z, order).abs().max() < 1e-12
    assert patch_matrix_entropy(z, patch=1).item() == pytest.approx(0, abs=1e-12)
    assert patch_matrix_entropy_gradient(z, patch=1, normalize=True).abs().max() < 1e-12


def test_an_entropy_gradient_of_zero_has_no_direction_in_weight_space():
    h = torch.zeros(32, 8, dtype=torch.float64)
    parts = weight_alignment_parts(draw(32, 3, seed=1), h, draw(8, 3, seed=2))
    assert gradient_alignment_from_parts(parts, 1.0, 4).cosine.isnan()


# Patches are measured from squares as they come, and again with care where those leave fp32's range.


def odd_patches():
    """Six patches of fp32, one for every way out of the range, and the entropy each should have."""
    z = draw(6, 8, 40, dtype=torch.float32)
    z[1] *= 1e-25
    z[2] *= 1e25
    z[3, 4] = 0
    z[4, 2] *= 1e-22
    z[5, 1] *= 1e-9
    return z


@pytest.mark.parametrize("normalize", [False, True])
def test_patches_out_of_range_equal_their_fp64_entropy_beside_patches_within(normalize):
    z = odd_patches()
    expected = torch.stack([matrix_entropy(patch.double(), normalize=normalize) for patch in z])
    assert torch.allclose(patch_entropies(z.flatten(0, 1), normalize=normalize).double(), expected, atol=2e-6)


@given(SEEDS, st.floats(-30, 30), st.floats(-30, 30), st.booleans())
@settings(deadline=None)
def test_patches_equal_fp64_at_any_scale_of_each(seed, first, second, normalize):
    z = draw(2, 8, 5, seed=seed, dtype=torch.float32)
    scaled = z * torch.tensor([10.0**first, 10.0**second])[:, None, None]
    expected = matrix_entropy(z.double(), normalize=normalize)
    assert torch.allclose(patch_entropies(scaled.flatten(0, 1), normalize=normalize).double(), expected, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_through_patches_out_of_range_are_finite_and_those_of_each_alone(normalize):
    z = odd_patches()[[0, 3, 5]]
    found = autograd(lambda z: patch_entropies(z.flatten(0, 1), normalize=normalize), z)
    assert found.isfinite().all()
    for patch, gradient in zip(z, found, strict=True):
        alone = autograd(lambda z: matrix_entropy(z, normalize=normalize), patch)
        assert (gradient - alone).abs().max() < 1e-4 * alone.abs().max()


def test_undetermined_patches_stay_so_beside_patches_out_of_range():
    z = odd_patches()
    z[0] = 0
    z[2, 3, 3] = math.nan
    for normalize in (False, True):
        assert (
            patch_entropies(z.flatten(0, 1), normalize=normalize).isnan().tolist() == [True, False, True] + [False] * 3
        )
