import math

import numpy as np
import pytest
import torch

from entropy_monitor.estimators import (
    matrix_entropy,
    matrix_entropy_gradient,
    matrix_entropy_standard_error,
    matrix_entropy_unbiased,
    patch_entropies,
    patch_matrix_entropy,
    patch_standard_error,
    sample_entropies,
)

NUM_DRAWS = 300
SPECTRUM = torch.linspace(1, 0.05, 24, dtype=torch.float64)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens(num_draws, n, seed=0, spread=0.0):
    """Gaussian tokens of a decaying spectrum; ``spread`` shares noise, and so correlation, within patches of 8."""
    own, shared = draw(num_draws, n, 24, seed=seed), draw(num_draws, n // 8, 24, seed=seed + 1)
    mixed = math.sqrt(1 - spread) * own + math.sqrt(spread) * shared.repeat_interleave(8, dim=1)
    return mixed * SPECTRUM


def population_s2():
    """Second-moment matrix of `tokens`: diag(SPECTRUM^2), whatever the spread."""
    return (2 * SPECTRUM.square().sum().log() - SPECTRUM.pow(4).sum().log()).item()


def slow_unbiased(z, block):
    """The U-statistics by a loop over all pairs of tokens in different blocks."""
    traces = masses = 0.0
    for i, a in enumerate(z):
        for j, b in enumerate(z):
            if i // block != j // block:
                traces += float(a @ a) * float(b @ b)
                masses += float(a @ b) ** 2
    return math.log(traces) - math.log(masses)


@pytest.mark.parametrize("shape", [(20, 6), (19, 30)])
@pytest.mark.parametrize("block", [1, 3, 8])
def test_unbiased_equals_the_loop_over_pairs_on_either_side(shape, block):
    z = draw(*shape) + 0.5
    for normalize, center in ((False, False), (True, False), (True, True)):
        prepared = z - z.mean(0) if center else z
        prepared = prepared / prepared.norm(dim=1, keepdim=True) if normalize else prepared
        found = matrix_entropy_unbiased(z, block, normalize, center).item()
        assert found == pytest.approx(slow_unbiased(prepared, block), abs=1e-10)


def test_unbiased_with_single_tokens_has_the_textbook_form():
    z = draw(32, 5)
    k = z @ z.mT
    n, own = 32, k.diagonal().square().sum()
    second = (k.square().sum() - own) / (n * (n - 1))
    first = (k.trace() ** 2 - own) / (n * (n - 1))
    assert matrix_entropy_unbiased(z, block=1).item() == pytest.approx((first.log() - second.log()).item(), abs=1e-12)


def test_unbiased_centres_on_the_population_where_the_plug_in_is_low():
    z = tokens(NUM_DRAWS, 64)
    estimates = matrix_entropy_unbiased(z, block=1)
    noise = (estimates.std() / math.sqrt(NUM_DRAWS)).item()
    # The logarithm of two unbiased figures keeps a bias of its own, of half their relative variance.
    own_bias = estimates.var().item()
    assert abs(estimates.mean().item() - population_s2()) < 4 * noise + own_bias
    assert matrix_entropy(z).mean().item() < population_s2() - 0.15


def test_blocks_keep_it_unbiased_where_tokens_of_a_patch_are_alike():
    z = tokens(NUM_DRAWS, 256, spread=0.7)
    estimates = matrix_entropy_unbiased(z, block=8)
    noise = (estimates.std() / math.sqrt(NUM_DRAWS)).item()
    assert abs(estimates.mean().item() - population_s2()) < 4 * noise + estimates.var().item()
    assert matrix_entropy_unbiased(z, block=1).mean().item() < population_s2() - 0.1


def test_pair_sums_are_unbiased_one_by_one():
    z = tokens(NUM_DRAWS, 32, spread=0.5)
    k = z @ z.mT
    blocks = torch.arange(32) // 8
    apart = blocks[:, None] != blocks[None, :]
    masses = (k.square() * apart).sum((-2, -1)) / apart.sum()
    expected = SPECTRUM.pow(4).sum()
    assert abs(masses.mean() - expected) < 4 * masses.std() / math.sqrt(NUM_DRAWS)
    diagonal = k.diagonal(dim1=-2, dim2=-1)
    traces = (diagonal[..., :, None] * diagonal[..., None, :] * apart).sum((-2, -1)) / apart.sum()
    assert abs(traces.mean() - SPECTRUM.square().sum() ** 2) < 4 * traces.std() / math.sqrt(NUM_DRAWS)
    assert torch.allclose(matrix_entropy_unbiased(z), traces.log() - masses.log())


def test_unbiased_approaches_the_population_as_tokens_are_added():
    errors = [
        (matrix_entropy_unbiased(tokens(20, n, seed=5)) - population_s2()).square().mean().sqrt().item()
        for n in (64, 256, 1024, 4096)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


def error_ratios(z, normalize=False):
    """Stated standard error over the standard deviation of the draws, for every whole-sample figure."""
    estimates = sample_entropies(z, normalize=normalize)
    figures = {
        "s1": (estimates.s1, estimates.s1_std_error),
        "s2": (estimates.s2, estimates.s2_std_error),
        "plug-in s2": (matrix_entropy(z, 2, normalize), matrix_entropy_standard_error(z, 2, normalize=normalize)),
    }
    return {
        name: (std_errors.square().mean().sqrt() / values.std()).item()
        for name, (values, std_errors) in figures.items()
    }


@pytest.mark.parametrize(("num_tokens", "spread"), [(128, 0.0), (256, 0.0), (512, 0.6)])
@pytest.mark.parametrize("normalize", [False, True])
def test_whole_sample_standard_errors_match_the_spread_of_draws(num_tokens, spread, normalize):
    for name, ratio in error_ratios(tokens(NUM_DRAWS, num_tokens, seed=7, spread=spread), normalize).items():
        assert 0.7 < ratio < 1.4, name


def test_standard_errors_err_high_on_flat_spectra_as_documented():
    for name, ratio in error_ratios(draw(NUM_DRAWS, 256, 24)).items():
        assert 1.0 < ratio < 1.6, name


def test_patch_standard_error_matches_the_spread_of_draws():
    z = tokens(NUM_DRAWS, 128, seed=9, spread=0.3)
    std_errors = patch_standard_error(patch_entropies(z))
    ratio = (std_errors.square().mean().sqrt() / patch_matrix_entropy(z).std()).item()
    assert 0.9 < ratio < 1.1


def test_standard_error_falls_with_the_root_of_the_sample():
    small, large = (sample_entropies(tokens(50, n, seed=3)) for n in (256, 4096))
    for name in ("s1_std_error", "s2_std_error"):
        ratio = (getattr(small, name).mean() / getattr(large, name).mean()).item()
        assert 3 < ratio < 6, name


def test_patch_standard_error_is_the_sample_standard_deviation_over_the_root_of_the_count():
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    assert patch_standard_error(values).item() == pytest.approx(np.std([1, 2, 4, 8], ddof=1) / 2)
    assert patch_standard_error(values[:, :1]).isnan().all()
    assert patch_standard_error(values[:, :1]).shape == (1,)


@pytest.mark.parametrize("shape", [(40, 6), (20, 30)])
@pytest.mark.parametrize("order", [1, 2])
def test_standard_error_is_the_formula_read_aloud(shape, order):
    z = draw(*shape)
    h = matrix_entropy_gradient(z, order)
    total = 0.0
    for first in range(0, len(z), 8):
        total += sum(float(z[i] @ h[i]) / 2 for i in range(first, min(first + 8, len(z)))) ** 2
    assert matrix_entropy_standard_error(z, order).item() == pytest.approx(math.sqrt(total), abs=1e-12)


@pytest.mark.parametrize("shape", [(40, 6), (20, 30)])
@pytest.mark.parametrize("normalize", [False, True])
def test_sample_entropies_agree_with_the_single_functions(shape, normalize):
    z = draw(2, *shape)
    found = sample_entropies(z, normalize=normalize)
    assert torch.allclose(found.s1, matrix_entropy(z, 1, normalize), atol=1e-10)
    assert torch.allclose(found.s1_std_error, matrix_entropy_standard_error(z, 1, normalize=normalize), atol=1e-10)
    assert torch.allclose(found.s2, matrix_entropy_unbiased(z, normalize=normalize), atol=1e-10)


def test_unbiased_standard_error_is_that_of_its_own_gradient():
    z = draw(40, 6).requires_grad_()
    (h,) = torch.autograd.grad(matrix_entropy_unbiased(z), z)
    influence = ((z * h).sum(-1) / 2).reshape(5, 8).sum(-1)
    assert sample_entropies(z).s2_std_error.item() == pytest.approx(influence.square().sum().sqrt().item(), abs=1e-10)


@pytest.mark.parametrize("shape", [(512, 96), (256, 300)])
def test_single_precision_is_within_the_documented_distance(shape):
    low_rank = draw(shape[0], 5) @ draw(5, shape[1], seed=1)
    for z in (draw(*shape), low_rank, 0.05 * draw(*shape) + draw(1, shape[1], seed=2)):
        exact, single = sample_entropies(z, normalize=True), sample_entropies(z.float(), normalize=True)
        assert abs(exact.s1 - single.s1) < 1e-4
        assert abs(exact.s2 - single.s2) < 1e-4
        assert single.s1_std_error.item() == pytest.approx(exact.s1_std_error.item(), rel=0.02)


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_matrix_that_cannot_be_judged_is_nan_and_leaves_the_others_alone(bad):
    z = draw(3, 24, 4)
    z[1] = 0
    z[1, 2, 3] = bad
    for figure in sample_entropies(z):
        assert figure.isnan().tolist() == [False, True, False]
    assert matrix_entropy_unbiased(z).isnan().tolist() == [False, True, False]
    assert torch.equal(sample_entropies(z).s1[2], sample_entropies(z[2:]).s1[0])


def test_blocks_that_do_not_overlap_have_no_finite_entropy():
    assert not matrix_entropy_unbiased(torch.eye(16, dtype=torch.float64), block=8).isfinite()


@pytest.mark.parametrize("function", [matrix_entropy_unbiased, sample_entropies])
@pytest.mark.parametrize("block", [0, 8, 9])
def test_fewer_than_two_blocks_are_refused(function, block):
    with pytest.raises(ValueError, match=rf"block: expected 1 to 7.*found {block}: pass more tokens"):
        function(torch.ones(8, 3), block=block)
