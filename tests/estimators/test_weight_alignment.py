import math

import pytest
import torch
from scipy import stats
from torch import nn

from entropy_monitor.estimators import (
    gradient_alignment_from_parts,
    patch_matrix_entropy,
    patch_matrix_entropy_gradient,
    projected_weight_alignment_parts,
    weight_alignment_parts,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_parts(x, h, weight_gradient, num_groups):
    """The three sums by loops over tokens and pairs of tokens."""
    num_tokens = len(x) // 8 * 8
    parts = torch.zeros(num_groups, 3, dtype=torch.float64)
    for i in range(num_tokens):
        group = i // 8 % num_groups
        parts[group, 0] += h[i] @ (weight_gradient @ x[i])
        for j in range(num_tokens):
            if i // 8 != j // 8:
                pair = (h[i] @ h[j]) * (x[i] @ x[j])
                parts[group, 1] += pair
                parts[group, 2] += pair if j // 8 % num_groups == group else 0
    return parts


def slow_estimate(x, h, weight_gradient):
    """The cosine of one sample of whole patches from the norms it stands for."""
    num_patches = len(x) // 8
    patches = [h[first : first + 8].mT @ x[first : first + 8] for first in range(0, len(x), 8)]
    square = sum(patches).square().sum() - sum(patch.square().sum() for patch in patches)
    norm = weight_gradient.norm() * (square * num_patches / (num_patches - 1)).sqrt()
    return ((sum(patches) * weight_gradient).sum() / norm).item()


@pytest.mark.parametrize("num_tokens", [24, 43, 64])
def test_parts_equal_the_loops_over_pairs(num_tokens):
    x, h, weight_gradient = draw(num_tokens, 3), draw(num_tokens, 4, seed=1), draw(4, 3, seed=2)
    found = weight_alignment_parts(x, h, weight_gradient, num_groups=5)
    assert torch.allclose(found, slow_parts(x, h, weight_gradient, 5), atol=1e-10)
    assert weight_alignment_parts(x, h, weight_gradient).shape == (16, 3)


def test_parts_of_a_batch_of_layers_are_those_of_each():
    x, h, weight_gradient = draw(3, 40, 4), draw(3, 40, 5, seed=1), draw(3, 5, 4, seed=2)
    found = weight_alignment_parts(x, h, weight_gradient)
    for layer in range(3):
        single = weight_alignment_parts(x[layer], h[layer], weight_gradient[layer])
        assert torch.allclose(found[layer], single, atol=1e-12)


@pytest.mark.parametrize("num_patches", [3, 5, 16, 21])
def test_estimate_and_jackknife_equal_the_sample_with_each_group_left_out(num_patches):
    x = draw(num_patches * 8, 3) + 0.4
    h = draw(num_patches * 8, 4, seed=1) + 0.5
    weight_gradient = draw(4, 3, seed=2)
    parts = weight_alignment_parts(x, h, weight_gradient)
    found = gradient_alignment_from_parts(parts, weight_gradient.norm(), num_patches)
    num_groups = min(16, num_patches)
    estimate, left_out = slow_estimate(x, h, weight_gradient), []
    corrected = num_groups * estimate
    for group in range(num_groups):
        kept = [token for token in range(len(x)) if token // 8 % num_groups != group]
        left_out.append(slow_estimate(x[kept], h[kept], weight_gradient))
        corrected -= len(kept) / len(x) * left_out[-1]
    assert found.cosine.item() == pytest.approx(corrected, rel=1e-8)
    assert corrected != pytest.approx(estimate, rel=1e-4)
    spread = torch.tensor(left_out, dtype=torch.float64)
    expected = math.sqrt((num_groups - 1) / num_groups * (spread - spread.mean()).square().sum().item())
    widened = expected * stats.t.ppf(stats.norm.cdf(2), num_groups - 1) / 2
    assert found.std_error.item() == pytest.approx(widened, rel=2e-4 if num_groups > 7 else 0.04)


class TinyMlp(nn.Module):
    """A hidden layer, the linear layer under test, and a head that makes a loss of its output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(6, 12), nn.Linear(12, 5), nn.Linear(5, 4)
        self.double()

    def hidden(self, tokens):
        return torch.tanh(self.up(tokens))


def full_batch(num_patches):
    """Give a linear layer's inputs, loss gradient and autograd MBE gradient over the full batch."""
    model = TinyMlp()
    shared = draw(num_patches, 6, seed=4).repeat_interleave(8, dim=0)
    tokens = draw(num_patches * 8, 6, seed=3) + 0.7 * shared + 0.3
    x = model.hidden(tokens).detach()
    z = model.down(x)
    labels = torch.arange(len(z)) % 4
    loss = nn.functional.cross_entropy(model.head(z), labels)
    (weight_gradient,) = torch.autograd.grad(loss, model.down.weight, retain_graph=True)
    (entropy_gradient,) = torch.autograd.grad(patch_matrix_entropy(z), model.down.weight)
    return x, z.detach(), weight_gradient, entropy_gradient


def test_full_sample_is_autograd_up_to_the_pairs_within_patches():
    x, z, weight_gradient, entropy_gradient = full_batch(40)
    h = patch_matrix_entropy_gradient(z)
    parts = weight_alignment_parts(x, h, weight_gradient)
    along, square = parts[:, 0].sum(), parts[:, 1].sum()
    assert along.item() == pytest.approx((weight_gradient * entropy_gradient).sum().item(), abs=1e-10)
    within = sum((h[i : i + 8].mT @ x[i : i + 8]).square().sum() for i in range(0, len(x), 8))
    assert (square + within).item() == pytest.approx(entropy_gradient.square().sum().item(), abs=1e-10)


def test_samples_of_patches_centre_on_the_full_batch_with_the_stated_error():
    num_patches, num_sampled, num_draws = 4000, 64, 300
    x, z, weight_gradient, entropy_gradient = full_batch(num_patches)
    exact = nn.functional.cosine_similarity(weight_gradient.flatten(), entropy_gradient.flatten(), dim=0).item()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(num_patches, generator=generator)[:num_sampled] for _ in range(num_draws)])
    sampled_x = x.reshape(num_patches, 8, -1)[chosen].flatten(1, 2)
    h = patch_matrix_entropy_gradient(z.reshape(num_patches, 8, -1)[chosen].flatten(1, 2))
    parts = weight_alignment_parts(sampled_x, h, weight_gradient.expand(num_draws, -1, -1))
    found = gradient_alignment_from_parts(parts, weight_gradient.norm().expand(num_draws), num_sampled)
    assert found.cosine.isfinite().all()
    assert 0.7 < (found.std_error.square().mean().sqrt() / found.cosine.std()).item() < 1.4
    assert abs(found.cosine.median().item() - exact) < 0.2 * found.cosine.std().item() + 0.02


def test_estimate_ignores_the_scale_of_each_argument():
    x, z, weight_gradient, _ = full_batch(40)
    h = patch_matrix_entropy_gradient(z)
    expected = gradient_alignment_from_parts(weight_alignment_parts(x, h, weight_gradient), weight_gradient.norm(), 40)
    scaled = weight_alignment_parts(3 * x, 5 * h, 7 * weight_gradient)
    found = gradient_alignment_from_parts(scaled, 7 * weight_gradient.norm(), 40)
    assert found.cosine.item() == pytest.approx(expected.cosine.item())
    assert found.std_error.item() == pytest.approx(expected.std_error.item())


def test_a_negative_square_norm_is_undetermined_and_nothing_else_is():
    parts = torch.ones(3, 16, 3)
    parts[1, :, 1] = -1
    found = gradient_alignment_from_parts(parts, torch.ones(3), torch.tensor([32, 32, 32]))
    assert found.cosine.isnan().tolist() == [False, True, False]
    assert found.std_error.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("gradient_norm", "num_patches"),
    [(0.0, 32), (math.nan, 32), (1.0, 1), (1.0, 0)],
)
def test_no_gradient_or_too_few_patches_are_undetermined(gradient_norm, num_patches):
    found = gradient_alignment_from_parts(torch.ones(16, 3), gradient_norm, num_patches)
    assert found.cosine.isnan()
    assert found.std_error.isnan()


def test_two_patches_are_undetermined_and_three_are_not():
    x, h, weight_gradient = draw(1, 3).repeat(24, 1), draw(1, 4, seed=1).repeat(24, 1), draw(4, 3, seed=2)
    for num_patches, finite in ((2, False), (3, True)):
        num_tokens = 8 * num_patches
        parts = weight_alignment_parts(x[:num_tokens], h[:num_tokens], weight_gradient)
        found = gradient_alignment_from_parts(parts, weight_gradient.norm(), num_patches)
        assert found.cosine.isfinite() == finite
        assert found.std_error.isfinite() == finite


def test_nan_in_the_samples_is_nan_in_the_estimate():
    x, h = draw(40, 3), draw(40, 4, seed=1)
    x[2, 1] = math.nan
    parts = weight_alignment_parts(x, h, draw(4, 3, seed=2))
    assert gradient_alignment_from_parts(parts, 1.0, 5).cosine.isnan()


def test_half_precision_is_computed_in_single_under_autocast_too():
    x, h, weight_gradient = draw(64, 8).bfloat16(), draw(64, 6, seed=1).bfloat16(), draw(6, 8, seed=2).bfloat16()
    expected = weight_alignment_parts(x.double(), h.double(), weight_gradient.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weight_alignment_parts(x, h, weight_gradient)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weight_alignment_parts(draw(16, 3), draw(16, 4), draw(3, 4)), r"found .*\(3, 4\): transpose"),
        (lambda: weight_alignment_parts(draw(16, 3), draw(8, 4), draw(4, 3)), r"expected x \[n, d_in\]"),
        (lambda: weight_alignment_parts(draw(7, 3), draw(7, 4), draw(4, 3)), "patch: expected 1 to 7.*found 8"),
        (lambda: gradient_alignment_from_parts(draw(16, 2), 1.0, 32), r"parts: expected \[\.\.\., num_groups, 3\]"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_parts_read_nothing_back_from_the_device():
    # Fake tensors have no values: anything that asks for one raises.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        parts = weight_alignment_parts(torch.ones(2, 43, 3), torch.ones(2, 43, 4), torch.ones(2, 4, 3))
        assert parts.shape == (2, 16, 3)


def test_inputs_shared_by_several_layers_are_given_once():
    x, h, projection = draw(2, 1, 40, 4), draw(2, 3, 40, 5, seed=1), draw(2, 3, 40, 4, seed=2)
    found = projected_weight_alignment_parts(x, h, projection)
    apart = projected_weight_alignment_parts(x.expand_as(projection), h, projection)
    assert torch.allclose(found, apart, atol=1e-12)
    with pytest.raises(ValueError, match="give them for the same tokens"):
        projected_weight_alignment_parts(draw(2, 2, 40, 4), h, projection)
