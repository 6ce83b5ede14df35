import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.estimators import (
    reference_points,
    soft_assign,
    soft_entropy,
    soft_entropy_estimate,
    soft_temperature,
)

from . import second_soft_entropy as second

NUM_DRAWS = 300


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("num_features", [1, 2, 3, 40, 150])
@pytest.mark.parametrize("mode", ["auto", "leading-order"])
def test_agrees_with_the_definition_read_aloud(num_features, mode):
    z = 5 * draw(30, num_features) + 1
    p = second.assign(z, reference_points(num_features, 20, seed=3), soft_temperature(num_features, 20, mode))
    options = {"num_bins": 20, "seed": 3, "mode": mode}
    assert np.allclose(soft_assign(z, **options).numpy(), p, atol=1e-9)
    assert soft_entropy(z, **options).item() == pytest.approx(second.entropy(p), abs=1e-9)
    assert soft_entropy(z, normalize=True, **options).item() == pytest.approx(second.entropy(p) / math.log(20))
    assert soft_entropy(z.float(), **options).item() == pytest.approx(second.entropy(p), abs=1e-5)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(2, 20), st.floats(-12, 12))
def test_range_and_invariances(num_tokens, num_features, num_bins, log_scale):
    z = draw(num_tokens, num_features, seed=num_tokens)
    value = soft_entropy(z, num_bins=num_bins)
    assert 0 <= value < math.log(num_bins) + 1e-9
    scales = torch.linspace(1, 3, num_tokens, dtype=torch.float64)[:, None] * 10**log_scale
    assert soft_entropy(z * scales, num_bins=num_bins).item() == pytest.approx(value.item(), abs=1e-9)
    assert soft_entropy(z.flip(0), num_bins=num_bins).item() == pytest.approx(value.item(), abs=1e-12)
    turn, _ = torch.linalg.qr(draw(num_features, num_features, seed=1))
    points = reference_points(num_features, num_bins).double()
    turned = soft_entropy(z @ turn, reference_points=points @ turn)
    assert turned.item() == pytest.approx(value.item(), abs=1e-9)


def test_few_directions_have_less_entropy_than_many():
    z = draw(4096, 64)
    values = [soft_entropy(z[:k].repeat(4096 // k, 1), normalize=True).item() for k in (1, 4, 16, 64, 4096)]
    assert values == sorted(values)
    assert values[0] < 0.6
    assert values[-1] > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_precision_is_accepted_and_computed_in_at_least_single(dtype):
    z = draw(64, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = soft_assign(z)
    assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(p.double(), soft_assign(z.double()), atol=1e-5)
    assert torch.equal(soft_assign(z.float().numpy()), soft_assign(z.float()))


def test_extreme_scales_do_not_overflow_in_single_precision():
    z = draw(6, 8, dtype=torch.float32)
    scales = torch.tensor([1e-38, 1e-25, 1.0, 1e18, 1e25, 1e37])[:, None]
    assert torch.allclose(soft_assign(z * scales), soft_assign(z), atol=1e-4)


@pytest.mark.parametrize("bad", ["zero", math.nan, math.inf])
def test_a_row_without_direction_is_undetermined_and_leaves_the_others_alone(bad):
    z = draw(3, 20, 6, dtype=torch.float32)
    whole = soft_assign(z)
    z[1, 7] = 0 if bad == "zero" else torch.tensor([bad, 1, 2, 3, 4, 5])
    p = soft_assign(z)
    assert p[1, 7].isnan().all()
    others = torch.ones(3, 20, dtype=torch.bool)
    others[1, 7] = False
    assert torch.allclose(p[others], whole[others])
    assert soft_entropy(z).isnan().tolist() == [False, True, False]
    for figure in soft_entropy_estimate(z):
        assert figure.isnan().tolist() == [False, True, False]


def test_gradients_are_those_of_the_definition():
    z = draw(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: soft_entropy(z, num_bins=7), (z,))


@pytest.mark.parametrize("patch", [1, 8])
def test_estimate_is_the_formula_read_aloud(patch):
    z = draw(44, 6)
    p = soft_assign(z, num_bins=9)
    share, entropy = p.mean(0), soft_entropy(z, num_bins=9)
    psi = -(p * share.log()).sum(1) - entropy
    blocks = [slice(i, i + patch) for i in range(0, 44, patch)]
    deviations = torch.stack([(p[block] - share).sum(0) for block in blocks])
    variance = deviations.square().sum(0) * len(blocks) / (len(blocks) - 1) / 44**2
    found = soft_entropy_estimate(z, patch=patch, num_bins=9)
    assert found.std_error.item() == pytest.approx(sum(float(psi[b].sum()) ** 2 for b in blocks) ** 0.5 / 44)
    assert found.bias.item() == pytest.approx(float(-(variance / share).sum() / 2))
    assert found.plug_in.item() == pytest.approx(entropy.item())
    assert found.value.item() == pytest.approx((found.plug_in - found.bias).item())


def tokens(num_draws, n, spread, center=2.0):
    """Tokens around one direction; ``spread`` shares noise, and so correlation, within patches of 8."""
    own, shared = draw(num_draws, n, 16), draw(num_draws, n // 8, 16, seed=1)
    mixed = math.sqrt(1 - spread) * own + math.sqrt(spread) * shared.repeat_interleave(8, dim=1)
    return mixed + center * draw(16, seed=2)


@pytest.mark.parametrize(("patch", "spread"), [(1, 0.0), (8, 0.0), (8, 0.7)])
def test_standard_error_matches_the_spread_of_draws(patch, spread):
    found = soft_entropy_estimate(tokens(NUM_DRAWS, 512, spread), patch=patch)
    ratio = (found.std_error.square().mean().sqrt() / found.value.std()).item()
    assert 0.7 < ratio < 1.4


@pytest.mark.parametrize(("patch", "spread"), [(1, 0.0), (8, 0.7)])
def test_correction_removes_most_of_the_bias_of_a_small_sample(patch, spread):
    truth = soft_entropy(tokens(1, NUM_DRAWS * 512, spread, center=0.0)[0])
    found = soft_entropy_estimate(tokens(NUM_DRAWS, 512, spread, center=0.0), patch=patch)
    noise = found.value.std() / math.sqrt(NUM_DRAWS)
    assert (found.plug_in.mean() - truth).abs() > 6 * noise
    assert (found.value.mean() - truth).abs() < 0.25 * (found.plug_in.mean() - truth).abs() + 3 * noise


def test_a_single_patch_has_no_error():
    found = soft_entropy_estimate(draw(8, 4), patch=8)
    assert found.std_error.isnan()
    assert found.bias.isnan()
    assert found.plug_in.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_points": torch.ones(5, 3)}, r"reference_points: expected \[m, 4\].*found \(5, 3\)"),
        ({"temperature": 0.0}, "temperature: expected a positive number, found 0.0"),
        ({"temperature": math.nan}, "temperature: expected a positive number, found nan"),
        ({"num_bins": 1}, "at least 1 feature and 2 bins"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        soft_assign(torch.ones(2, 4), **options)


def test_bad_samples_and_patches_are_refused():
    with pytest.raises(ValueError, match="one row per token"):
        soft_entropy(torch.ones(4))
    with pytest.raises(ValueError, match="patch: expected at least 1 token, found 0"):
        soft_entropy_estimate(torch.ones(4, 4), patch=0)
