import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor import estimators
from entropy_monitor.estimators import effective_rank, matrix_entropy, patch_entropies, patch_matrix_entropy

ORDERS = (0, 0.5, 1, 1.5, 2, 3, math.inf)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_entropy(z, order):
    """The definition, read aloud: eigenvalues of the n x n density matrix, one power at a time."""
    z = np.asarray(z, dtype=np.float64)
    gram = np.array([[sum(a * b for a, b in zip(row, other, strict=True)) for other in z] for row in z])
    density = [max(value, 0.0) for value in np.linalg.eigvalsh(gram / np.trace(gram))]
    if order == 1:
        return -sum(p * math.log(p) for p in density if p > 1e-14)
    return math.log(sum(p**order for p in density if p > 1e-14)) / (1 - order)


@st.composite
def matrices(draw_from):
    n, d = draw_from(st.integers(1, 12)), draw_from(st.integers(1, 12))
    return draw(n, d, seed=draw_from(st.integers(0, 10**6)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_orthogonal_rows_or_columns_of_equal_norm_give_the_log_of_their_number(order, shape):
    orthonormal = torch.linalg.qr(draw(9, 4))[0]
    z = orthonormal.mT if shape == (4, 9) else orthonormal
    assert matrix_entropy(7 * z, order).item() == pytest.approx(math.log(4), abs=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_rank_one_has_no_entropy(order):
    z = draw(6, 1) * draw(1, 5, seed=1)
    assert matrix_entropy(z, order).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("order", [0.5, 1, 1.7, 2, 3])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_equals_the_slow_definition(order, shape):
    z = draw(*shape)
    assert matrix_entropy(z, order).item() == pytest.approx(slow_entropy(z, order), abs=1e-9)


def test_two_rows_at_an_angle_have_the_closed_form():
    cosine = 0.6
    z = torch.tensor([[1.0, 0.0], [cosine, 0.8]], dtype=torch.float64)
    larger, smaller = (1 + cosine) / 2, (1 - cosine) / 2
    assert matrix_entropy(z).item() == pytest.approx(-math.log(larger**2 + smaller**2), abs=1e-12)
    von_neumann = -larger * math.log(larger) - smaller * math.log(smaller)
    assert matrix_entropy(z, 1).item() == pytest.approx(von_neumann, abs=1e-12)
    assert effective_rank(z).item() == pytest.approx(math.exp(von_neumann), abs=1e-12)


@given(matrices())
@settings(deadline=None)
def test_lies_between_zero_and_the_log_of_the_smaller_side_and_falls_with_the_order(z):
    entropies = [matrix_entropy(z, order).item() for order in ORDERS]
    assert entropies[-1] >= -1e-9
    assert entropies[0] <= math.log(min(z.shape)) + 1e-9
    assert all(low <= high + 1e-9 for high, low in itertools.pairwise(entropies))


@given(matrices(), st.floats(1e-12, 1e12), st.sampled_from(ORDERS), st.booleans(), st.booleans())
@settings(deadline=None)
def test_knows_neither_scale_nor_rotation_on_either_side(z, scale, order, normalize, center):
    value = matrix_entropy(z, order, normalize, center)
    turn_features = torch.linalg.qr(draw(z.shape[1], z.shape[1], seed=3))[0]
    # At order 0 and after exact cancellation a rotation decides, by rounding, what counts as zero.
    if not (center and len(z) <= 2):
        assert torch.allclose(matrix_entropy(scale * (z @ turn_features), order, normalize, center), value, atol=1e-6)
    if not normalize and not center:
        turn_tokens = torch.linalg.qr(draw(z.shape[0], z.shape[0], seed=4))[0]
        assert torch.allclose(matrix_entropy(turn_tokens @ z, order), value, atol=1e-6)


@given(matrices(), st.sampled_from(ORDERS))
@settings(deadline=None)
def test_transposing_changes_nothing(z, order):
    assert matrix_entropy(z.mT, order).item() == pytest.approx(matrix_entropy(z, order).item(), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e-3, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("order", [1, 2])
def test_scale_is_no_matter_in_fp32(scale, order):
    z = draw(16, 5, dtype=torch.float32)
    assert torch.allclose(matrix_entropy(z * scale, order), matrix_entropy(z, order), atol=1e-6)
    assert torch.allclose(
        matrix_entropy(z * scale, order, normalize=True), matrix_entropy(z, order, normalize=True), atol=1e-6
    )


@given(matrices(), st.integers(0, 100))
@settings(deadline=None)
def test_normalised_entropy_ignores_the_norm_of_each_row(z, seed):
    norms = draw(len(z), 1, seed=seed).exp()
    assert torch.allclose(matrix_entropy(z * norms, normalize=True), matrix_entropy(z, normalize=True), atol=1e-9)


def test_centred_entropy_ignores_a_shared_offset():
    z, offset = draw(16, 5), 10 * draw(1, 5, seed=1)
    assert matrix_entropy(z + offset, center=True).item() == pytest.approx(matrix_entropy(z, center=True).item())
    assert matrix_entropy(z + offset) < matrix_entropy(z) - 0.5


@pytest.mark.parametrize("order", [1, 2])
def test_repeating_every_token_changes_nothing(order):
    z = draw(5, 7)
    assert matrix_entropy(z.repeat(4, 1), order).item() == pytest.approx(matrix_entropy(z, order).item(), abs=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_a_zero_row_adds_nothing(order):
    z = draw(5, 7)
    padded = torch.cat([z, torch.zeros(3, 7)])
    for normalize in (False, True):
        without = matrix_entropy(z, order, normalize)
        assert matrix_entropy(padded, order, normalize).item() == pytest.approx(without.item(), abs=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_an_all_zero_matrix_is_undetermined(order):
    assert matrix_entropy(torch.zeros(3, 4), order).isnan()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_entry_makes_its_own_matrix_nan_and_no_other(order, bad):
    z = draw(3, 6, 4)
    z[1, 2, 3] = bad
    assert matrix_entropy(z, order).isnan().tolist() == [False, True, False]
    assert torch.equal(matrix_entropy(z, order)[[0, 2]], matrix_entropy(z[[0, 2]], order))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_a_single_token_or_feature_has_no_entropy(order, shape):
    assert matrix_entropy(draw(*shape), order).item() == pytest.approx(0, abs=1e-12)


def test_batches_are_measured_one_by_one():
    z = draw(2, 3, 8, 5)
    for order in (1, 2):
        batched = matrix_entropy(z, order)
        assert batched.shape == (2, 3)
        singly = [[matrix_entropy(z[i, j], order).item() for j in range(3)] for i in range(2)]
        assert np.allclose(batched, singly, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(order, dtype):
    z = draw(64, 32).to(dtype)
    value = matrix_entropy(z, order)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(matrix_entropy(z.double(), order).item(), abs=1e-5)


def test_autocast_does_not_lower_the_precision():
    z = draw(64, 32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = matrix_entropy(z)
    assert inside.dtype == torch.float32
    assert inside.item() == matrix_entropy(z).item()


def test_numpy_arrays_are_taken_read_only_reversed_or_integer():
    z = draw(16, 5).numpy()
    z.flags.writeable = False
    assert matrix_entropy(z).item() == matrix_entropy(torch.tensor(z)).item()
    assert matrix_entropy(z[::-1]).item() == pytest.approx(matrix_entropy(z).item())
    assert matrix_entropy(np.eye(3, dtype=np.int64)).dtype == torch.float32


def test_fp64_stays_fp64():
    assert matrix_entropy(draw(4, 3)).dtype == torch.float64


@pytest.mark.parametrize("order", [0.5, 1, 2, 3])
@pytest.mark.parametrize(
    "z",
    [draw(6, 4), torch.eye(4, 6, dtype=torch.float64), draw(3, 4).repeat(2, 1)],
    ids=["random", "degenerate", "duplicates"],
)
def test_autograd_is_finite_also_on_degenerate_spectra(order, z):
    z = z.clone().requires_grad_()
    for normalize in (False, True):
        (gradient,) = torch.autograd.grad(matrix_entropy(z, order, normalize), z)
        assert gradient.isfinite().all()


def test_patches_are_cut_from_consecutive_tokens_and_the_incomplete_one_is_dropped():
    z = draw(21, 5)
    expected = [matrix_entropy(z[first : first + 8]).item() for first in (0, 8)]
    assert patch_entropies(z).tolist() == pytest.approx(expected, abs=1e-12)
    assert patch_matrix_entropy(z).item() == pytest.approx(np.mean(expected), abs=1e-12)
    assert patch_entropies(z, patch=4).shape == (5,)


def test_patches_are_centred_by_the_mean_of_all_tokens_given():
    z = draw(21, 5) + 3
    expected = matrix_entropy((z - z.mean(0))[:8], normalize=True)
    assert patch_entropies(z, normalize=True, center=True)[0].item() == pytest.approx(expected.item(), abs=1e-12)


def test_a_zero_patch_is_undetermined_and_so_is_the_mean():
    z = draw(24, 5)
    z[8:16] = 0
    assert patch_entropies(z).isnan().tolist() == [False, True, False]
    assert patch_matrix_entropy(z).isnan()


def test_one_large_norm_lowers_raw_but_not_normalised_entropy():
    z = draw(8, 64)
    loud = z.clone()
    loud[3] *= 10
    assert patch_matrix_entropy(loud) < 0.25 * patch_matrix_entropy(z)
    assert patch_matrix_entropy(loud, normalize=True).item() == pytest.approx(
        patch_matrix_entropy(z, normalize=True).item()
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matrix_entropy(torch.ones(3)), r"z: expected .*\[\.\.\., tokens, features\].*found \(3,\)"),
        (lambda: matrix_entropy(torch.ones(0, 3)), r"found \(0, 3\)"),
        (lambda: matrix_entropy(torch.ones(2, 2, dtype=torch.complex64)), "complex"),
        (lambda: matrix_entropy(torch.ones(2, 2), order=-1), "order: expected .* found -1"),
        (lambda: matrix_entropy(torch.ones(2, 2), order=math.nan), "order: expected .* found nan"),
        (lambda: patch_entropies(torch.ones(7, 3)), r"patch: expected 1 to 7.*found 8: pass more tokens"),
        (lambda: patch_entropies(torch.ones(7, 3), patch=0), "found 0"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_all_is_sorted_and_complete():
    assert estimators.__all__ == sorted(estimators.__all__)
    assert all(getattr(estimators, name).__doc__ for name in estimators.__all__)
