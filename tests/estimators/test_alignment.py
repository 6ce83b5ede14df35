import math

import pytest
import torch

from entropy_monitor.estimators import gradient_alignment, layer_estimates, patch_matrix_entropy


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def entropy_gradient(z, patch=8):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(patch_matrix_entropy(z, patch).sum(), z)[0]


def slow_jackknife(z, g, num_groups):
    """Leave out group by group, each time by autograd over the patches that are left."""
    num_patches = len(z) // 8
    num_groups = min(num_groups, num_patches)
    left_out = []
    for group in range(num_groups):
        kept = [token for token in range(num_patches * 8) if token // 8 % num_groups != group]
        h = entropy_gradient(z[kept])
        left_out.append(torch.nn.functional.cosine_similarity(g[kept].flatten(), h.flatten(), dim=0))
    spread = torch.stack(left_out)
    return math.sqrt((num_groups - 1) / num_groups * (spread - spread.mean()).square().sum().item())


@pytest.mark.parametrize("shape", [(64, 5), (2, 3, 40, 12)])
def test_cosine_equals_autograd(shape):
    z = 3 * draw(*shape)
    g = draw(*shape, seed=1)
    h = entropy_gradient(z)
    expected = torch.nn.functional.cosine_similarity(g.flatten(-2), h.flatten(-2), dim=-1)
    assert (gradient_alignment(z, g).cosine - expected).abs().max() < 1e-10


@pytest.mark.parametrize("num_tokens", [40, 16 * 8, 21 * 8])
def test_standard_error_equals_the_slow_jackknife_also_with_few_patches(num_tokens):
    z, g = draw(num_tokens, 6), draw(num_tokens, 6, seed=1)
    found = gradient_alignment(z, g).std_error.item()
    assert found == pytest.approx(slow_jackknife(z, g, 16), rel=1e-8)


def test_standard_error_matches_the_spread_of_draws():
    z = draw(300, 256, 6)
    g = 0.3 * entropy_gradient(z) * 32 + draw(300, 256, 6, seed=1)
    alignment = gradient_alignment(z, g)
    ratio = (alignment.std_error.square().mean().sqrt() / alignment.cosine.std()).item()
    assert 0.7 < ratio < 1.4


def test_a_gradient_along_the_entropy_gradient_is_aligned_and_the_opposite_opposed():
    z = draw(64, 5)
    h = entropy_gradient(z)
    for sign in (1, -1):
        alignment = gradient_alignment(z, sign * h)
        assert alignment.cosine.item() == pytest.approx(sign, abs=1e-12)
        assert alignment.std_error.item() == pytest.approx(0, abs=1e-12)


def test_radial_gradients_are_orthogonal_to_the_entropy_gradient():
    z = draw(64, 5)
    assert gradient_alignment(z, z).cosine.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1e8, 1e25])
def test_fp32_holds_at_any_scale_of_either_argument(scale):
    z, g = draw(64, 32, dtype=torch.float32), draw(64, 32, seed=1, dtype=torch.float32)
    expected = gradient_alignment(z.double(), g.double())
    for found in (gradient_alignment(z * scale, g), gradient_alignment(z, g * scale)):
        assert found.cosine.dtype == torch.float32
        assert found.cosine.item() == pytest.approx(expected.cosine.item(), abs=1e-5)
        assert found.std_error.item() == pytest.approx(expected.std_error.item(), rel=1e-3)


def test_an_incomplete_last_patch_is_dropped():
    z, g = draw(69, 5), draw(69, 5, seed=1)
    assert gradient_alignment(z, g).cosine.item() == pytest.approx(gradient_alignment(z[:64], g[:64]).cosine.item())


def test_half_precision_and_numpy_are_taken():
    z, g = draw(64, 16).bfloat16(), draw(64, 16, seed=1).bfloat16()
    expected = gradient_alignment(z.double(), g.double()).cosine.item()
    assert gradient_alignment(z, g).cosine.item() == pytest.approx(expected, abs=1e-5)
    assert gradient_alignment(z.double().numpy(), g.double().numpy()).cosine.item() == pytest.approx(expected)


def undetermined_cases():
    z, g = draw(64, 5), draw(64, 5, seed=1)
    zero_patch, bad_z, bad_g = z.clone(), z.clone(), g.clone()
    zero_patch[8:16] = 0
    bad_z[3, 2] = math.nan
    bad_g[3, 2] = math.inf
    flat = torch.eye(8, dtype=torch.float64).repeat(8, 1)
    return {
        "zero gradient": (z, 0 * g),
        "zero patch": (zero_patch, g),
        "non-finite activation": (bad_z, g),
        "non-finite gradient": (z, bad_g),
        "maximal entropy": (flat, draw(64, 8, seed=1)),
    }


@pytest.mark.parametrize("case", undetermined_cases())
def test_what_has_no_direction_is_undetermined(case):
    alignment = gradient_alignment(*undetermined_cases()[case])
    assert alignment.cosine.isnan()
    assert alignment.std_error.isnan()


def test_a_single_patch_has_a_cosine_but_no_standard_error():
    alignment = gradient_alignment(draw(8, 5), draw(8, 5, seed=1))
    assert alignment.cosine.isfinite()
    assert alignment.std_error.isnan()


@pytest.mark.parametrize("align", [gradient_alignment, lambda z, g: layer_estimates(z, g).alignment])
@pytest.mark.parametrize("scale", [1.0, 1e-60])
def test_precisions_may_differ(align, scale):
    z, g = draw(64, 6), draw(64, 6, seed=1)
    expected = gradient_alignment(z, g)
    for found in (align(z.float(), scale * g), align(z, g.float()), align(z.float(), (scale * g).numpy())):
        assert found.cosine.item() == pytest.approx(expected.cosine.item(), abs=1e-5)
        assert found.std_error.item() == pytest.approx(expected.std_error.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_estimates(torch.ones(16, 3), torch.ones(8, 3)), r"g: expected the shape of z, \(16, 3\)"),
        (lambda: gradient_alignment(torch.ones(16, 3), torch.ones(16, 2)), r"g: expected the shape of z, \(16, 3\)"),
        (lambda: gradient_alignment(torch.ones(7, 3), torch.ones(7, 3)), "patch: expected 1 to 7.*found 8"),
        (lambda: gradient_alignment(torch.ones(16, 3), torch.ones(16, 3), num_groups=1), "num_groups: .* found 1"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
