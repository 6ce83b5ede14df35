import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.estimators import (
    MutualInformation,
    backoff_labels,
    information_bottleneck_bound,
    information_plane,
    mutual_information,
    optimality,
    soft_assign,
)

NUM_DRAWS = 200


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def text(num_tokens, vocabulary, source):
    """Tokens of Zipf frequency; half of them follow from the one before."""
    tokens = torch.multinomial(1 / torch.arange(1, vocabulary + 1.0), num_tokens, replacement=True, generator=source)
    follows = torch.rand(num_tokens, generator=source) < 0.5
    for i in range(1, num_tokens):
        if follows[i]:
            tokens[i] = (tokens[i - 1] * 7 + 3) % vocabulary
    return tokens


def layers(num_tokens, source, vocabulary=60, num_features=16, num_layers=3):
    """Activations that hold the token read, ever more of it, and the next one; with both sides' labels."""
    tokens = text(num_tokens + 5, vocabulary, source)
    windows = tokens.unfold(0, 6, 1)
    centres = torch.randn(vocabulary, num_features, generator=generator(9))
    z = [
        layer / 2 * centres[windows[:, 2]]
        + 0.3 * centres[windows[:, 3]].flip(1)
        + torch.randn(num_tokens, num_features, generator=source)
        for layer in range(num_layers)
    ]
    return torch.stack(z), backoff_labels(windows[:, [2, 1, 0]]), backoff_labels(windows[:, [3, 4, 5]])


def as_plane(z, inputs, outputs, **options):
    return information_plane(soft_assign(z).transpose(0, 1).contiguous(), inputs, outputs, **options)


@pytest.mark.parametrize("correction", ["none", "rarefied"])
def test_every_layer_and_order_agrees_with_mutual_information(correction):
    z, inputs, outputs = layers(2048, generator())
    assert len(inputs[2].unique()) > len(inputs[1].unique()) > len(inputs[0].unique())
    plane = as_plane(z, inputs, outputs, correction=correction)
    for found, labels in zip((*plane.input, *plane.output), (*inputs, *outputs), strict=True):
        for layer in range(3):
            alone = mutual_information(z[layer], labels, correction=correction, patch=8)
            assert found.plug_in[layer].item() == pytest.approx(alone.plug_in.item(), abs=1e-5)
            # What the bias is learned from is drawn anew for each order.
            assert abs(found.value[layer] - alone.value) < 4 * alone.std_error
            assert found.std_error[layer].item() == pytest.approx(alone.std_error.item(), rel=0.5)
        assert (found.num_samples, found.num_labels) == (alone.num_samples, alone.num_labels)
        assert found.learned_from == alone.learned_from
    first = mutual_information(z, inputs[0], correction=correction, patch=8)
    for name in ("value", "std_error", "plug_in", "bias"):
        assert torch.allclose(getattr(plane.input[0], name), getattr(first, name), atol=1e-5), name


@settings(deadline=None, max_examples=30)
@given(st.integers(8, 80), st.integers(1, 4), st.integers(1, 6), st.integers(0, 5))
def test_coarser_sums_built_from_finer_ones_are_exact(num_tokens, vocabulary, min_count, seed):
    tokens = torch.randint(vocabulary, (num_tokens, 3), generator=generator(seed))
    labels = backoff_labels(tokens, min_count)
    z = torch.randn(2, num_tokens, 4, generator=generator(seed), dtype=torch.float64)
    plane = as_plane(z, labels, labels, correction="none", patch=1)
    for found, label in zip(plane.input, labels, strict=True):
        expected = mutual_information(z, label, correction="none")
        assert torch.allclose(found.plug_in, expected.plug_in, atol=1e-12)
        assert torch.allclose(found.std_error, expected.std_error, atol=1e-12)


def test_plug_in_information_grows_with_the_order():
    z, inputs, outputs = layers(2048, generator())
    plane = as_plane(z, inputs, outputs, correction="none")
    for side in (plane.input, plane.output):
        assert (side[1].value > side[0].value).all()
        assert (side[2].value >= side[1].value - 1e-6).all()


def test_layers_that_hold_more_of_the_input_are_less_optimal():
    z, inputs, outputs = layers(4096, generator())
    plane = as_plane(z, inputs, outputs)
    assert (plane.input[0].value.diff() > 4 * plane.input[0].std_error[1:]).all()
    assert plane.optimality[0].value[2] < plane.optimality[0].value[1]


def test_an_undetermined_row_undoes_its_own_layer_alone():
    z, inputs, outputs = layers(1024, generator())
    z[1, 3] = 0
    plane = as_plane(z, inputs, outputs)
    for found in (*plane.input, *plane.output, *plane.optimality):
        assert found.value.isnan()[1]
        assert found.std_error.isnan()[1]
    assert plane.input[2].value.isnan().tolist() == [False, True, False]


def test_errors_from_the_newest_rows_are_scaled_to_the_window():
    z, inputs, outputs = layers(8192, generator())
    whole, newest = (as_plane(z, inputs, outputs, influence=rows) for rows in (None, slice(8192 - 2048, 8192)))
    for found, expected in zip((*newest.input, *newest.optimality), (*whole.input, *whole.optimality), strict=True):
        sound = expected.std_error.isfinite()
        assert torch.allclose(found.value[sound], expected.value[sound], rtol=1e-3, atol=1e-3)
        assert torch.allclose(found.std_error[sound], expected.std_error[sound], rtol=0.3)


@pytest.mark.parametrize("correction", ["none", "rarefied"])
def test_standard_error_of_optimality_matches_the_spread_of_draws(correction):
    source = generator(4)
    draws = []
    for _ in range(NUM_DRAWS):
        ratio = as_plane(*layers(1024, source, vocabulary=12, num_layers=2), correction=correction, patch=1).optimality[
            0
        ]
        draws.append(torch.stack([ratio.value[1], ratio.std_error[1]]))
    values, std_errors = torch.stack(draws).double().mT
    assert 0.7 < std_errors.square().mean().sqrt() / values.std() < 1.4


def test_information_about_the_same_labels_is_kept_in_full_without_error():
    z, inputs, _ = layers(1024, generator())
    for found in as_plane(z[1:], inputs, inputs, correction="none").optimality:
        assert torch.allclose(found.value, torch.ones(2))
        assert found.std_error.max() < 1e-4


def figure(value, std_error=0.0):
    zero = torch.tensor(0.0)
    return MutualInformation(torch.tensor(value), torch.tensor(std_error), zero, zero, 99, 9, "none")


def test_optimality_by_the_delta_method_equals_a_simulation():
    noise = torch.randn(400_000, 2, generator=generator(), dtype=torch.float64)
    x, y = 1 + 0.03 * noise[:, 0], 0.4 + 0.02 * (0.6 * noise[:, 0] + 0.8 * noise[:, 1])
    found = optimality(figure(1.0, 0.03), figure(0.4, 0.02), covariance=0.03 * 0.02 * 0.6)
    assert found.value.item() == pytest.approx(0.4)
    assert found.std_error.item() == pytest.approx((y / x).std().item(), rel=0.02)


@pytest.mark.parametrize("value", [0.0, 0.19, -1.0, math.nan])
def test_optimality_is_undetermined_where_its_denominator_is_not_clear_of_zero(value):
    found = optimality(figure(value, 0.1), figure(0.4, 0.1))
    assert found.value.isnan()
    assert found.std_error.isnan()
    assert optimality(figure(0.21, 0.1), figure(0.4, 0.1)).value.isfinite()


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_optimality_of_an_unknown_error_is_undetermined(unknown):
    for errors in ((unknown, 0.1), (0.1, unknown)):
        found = optimality(figure(1.0, errors[0]), figure(0.4, errors[1]))
        assert found.value.isnan()
        assert found.std_error.isnan()


@pytest.mark.parametrize(("label_information", "bound"), [(None, 1.0), (0.75, 0.75), (3.0, 1.0)])
def test_bound_is_the_lesser_information(label_information, bound):
    found = information_bottleneck_bound(figure(1.0), label_information, output_information=figure(0.5))
    assert found.value.item() == bound
    assert found.distance.item() == bound - 0.5
    assert information_bottleneck_bound(figure(1.0), label_information).distance is None


def labels_of(values):
    return [torch.tensor(values)]


@pytest.mark.parametrize(
    ("p", "inputs", "outputs", "message"),
    [
        (torch.ones(4, 2), labels_of([0] * 4), labels_of([0] * 4), r"p: expected soft assignments \[n, L, m\]"),
        (torch.ones(4, 2, 3).half(), labels_of([0] * 4), labels_of([0] * 4), "p: expected.*float16"),
        (torch.ones(4, 2, 3), [], [], "labels: expected equally many orders, at least one; found 0"),
        (torch.ones(4, 2, 3), labels_of([0] * 4) * 2, labels_of([0] * 4), "found 2 of the input and 1"),
        (torch.ones(4, 2, 3), labels_of([0] * 3), labels_of([0] * 4), r"labels: expected int64 of shape \(4,\)"),
        (torch.ones(4, 2, 3), labels_of([0, 2, 2, 0]), labels_of([0] * 4), "without gaps, found no 1"),
        (torch.ones(4, 2, 3), labels_of([0, -1, 1, 0]), labels_of([0] * 4), "without gaps, found -1 the smallest"),
        (
            torch.ones(4, 2, 3),
            [torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])],
            labels_of([0] * 4) * 2,
            "found labels that cross",
        ),
    ],
)
def test_bad_arguments_are_refused(p, inputs, outputs, message):
    with pytest.raises(ValueError, match=message):
        information_plane(p, inputs, outputs)


def test_no_rows_for_errors_are_refused():
    with pytest.raises(ValueError, match="influence: expected rows of the 4 in p"):
        information_plane(torch.ones(4, 2, 3), labels_of([0] * 4), labels_of([0] * 4), influence=slice(4, 9))
