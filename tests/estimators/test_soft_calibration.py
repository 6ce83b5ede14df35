import math

import numpy as np
import pytest
import torch

from entropy_monitor.estimators import reference_points, soft_temperature


def divergence_by_quadrature(temperature, num_features):
    """KL of vMF from uniform, integrating over the angle from the pole: no Bessel functions."""
    angle = np.linspace(0, math.pi, 400_001)[1:-1]
    log_area = (num_features - 2) * np.log(np.sin(angle))
    tilt = (np.cos(angle) - 1) / temperature
    uniform = np.exp(log_area - log_area.max())
    weight = uniform * np.exp(tilt)
    mean_tilt = (weight * tilt).sum() / weight.sum()
    return mean_tilt - math.log(weight.sum() / uniform.sum())


@pytest.mark.parametrize(("num_features", "num_bins"), [(2, 10), (3, 100), (8, 100), (50, 1000), (99, 100), (300, 100)])
def test_exact_temperature_gives_each_bin_its_share_of_the_sphere(num_features, num_bins):
    temperature = soft_temperature(num_features, num_bins, "exact")
    found = divergence_by_quadrature(temperature, num_features)
    assert found == pytest.approx(math.log(num_bins), abs=1e-4)


@pytest.mark.parametrize("num_features", [3, 16, 100, 768])
def test_bounds_err_towards_narrow_bins_and_approach_the_exact_solution(num_features):
    bounds, exact = (soft_temperature(num_features, 100, mode) for mode in ("bounds", "exact"))
    assert bounds < exact
    assert divergence_by_quadrature(bounds, num_features) > math.log(100)
    assert num_features < 100 or bounds > 0.98 * exact


def test_the_closed_form_is_the_limit_of_many_features():
    errors = [
        soft_temperature(d, 100, "leading-order") / soft_temperature(d, 100, "bounds") - 1 for d in (256, 4096, 65536)
    ]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < 1e-3


def test_auto_is_exact_below_a_hundred_features_and_bounds_above():
    assert soft_temperature(99) == soft_temperature(99, mode="exact")
    assert soft_temperature(100) == soft_temperature(100, mode="bounds")
    assert soft_temperature(2) == soft_temperature(2, mode="exact")
    assert soft_temperature(1) == soft_temperature(1, mode="leading-order")


def test_temperatures_are_computed_once():
    soft_temperature.cache_clear()
    for _ in range(3):
        soft_temperature(77, 50)
    assert (soft_temperature.cache_info().misses, soft_temperature.cache_info().hits) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "at least 1 feature and 2 bins; found num_features=0"),
        ((4, 1), "at least 1 feature and 2 bins.*num_bins=1"),
        ((4, 10, "amos"), "mode: expected auto, exact, bounds or leading-order; found 'amos'"),
        ((2, 10, "bounds"), "bounds needs at least 3 features, found 2: use exact"),
        ((1, 10, "exact"), "exact needs at least 2 features, found 1: use leading-order"),
        ((5000, 100, "exact"), "exact has no digits left at 5000 features.*use bounds"),
        ((2, 10**6), "exact has no digits left at 2 features.*ask for fewer bins"),
        ((3, 10**12), "exact has no digits left at 3 features.*ask for fewer bins"),
    ],
)
def test_what_has_no_solution_is_refused_with_a_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_temperature(*arguments)


def test_the_remedies_work():
    assert soft_temperature(5000, 100, "bounds") == pytest.approx(1 / math.sqrt(2 * 5000 * math.log(100)), rel=0.01)
    assert divergence_by_quadrature(soft_temperature(2, 10**3), 2) == pytest.approx(math.log(10**3), rel=1e-3)
    assert 0 < soft_temperature(3, 10**6) < soft_temperature(3, 10**3)


def test_reference_points_are_unit_vectors_that_fill_the_sphere():
    points = reference_points(3, num_bins=20_000)
    assert torch.allclose(points.norm(dim=1), torch.ones(20_000))
    assert points.mean(0).abs().max() < 4 / math.sqrt(3 * 20_000)
    assert torch.allclose(points.mT @ points / 20_000, torch.eye(3) / 3, atol=0.01)


def test_reference_points_depend_on_the_seed_alone_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = reference_points(8)
    torch.manual_seed(6)
    assert torch.equal(first, reference_points(8))
    assert not torch.equal(first, reference_points(8, seed=1))
    torch.manual_seed(5)
    reference_points(9, num_bins=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_changing_the_points_received_does_not_change_those_of_the_next_caller():
    reference_points(6).zero_()
    assert reference_points(6).norm(dim=1).min() > 0.99


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40])
def test_points_do_not_repeat_what_the_user_drew_with_the_same_seed(seed):
    torch.manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.nn.Embedding(100, 16).weight.detach(), dim=1)
    assert (reference_points(16, seed=seed) * rows).sum(1).max() < 0.95
    assert (reference_points(16, seed=seed) @ rows.mT).max() < 0.97
