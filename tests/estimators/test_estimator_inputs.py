"""What callers hand over besides a sound fp32 tensor: taken as meant, or refused in one line with a remedy."""

import numpy as np
import pytest
import torch

from entropy_monitor.estimators import (
    backoff_labels,
    entropy_of_assignments,
    exact_alignment,
    information_plane,
    matrix_entropy,
    matrix_entropy_standard_error,
    mutual_information,
    patch_standard_error,
    reference_points,
    soft_assign,
    soft_entropy,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(64) % 2
Z = draw(64, 8)


@pytest.mark.parametrize(
    "change",
    [
        lambda array: array.astype(">f4"),
        lambda array: array[::-1].copy()[::-1],
        lambda array: array.tolist(),
        lambda array: np.asfortranarray(array),
    ],
)
def test_any_order_of_bytes_and_rows_gives_the_same(change):
    assert float(matrix_entropy(change(Z.numpy()))) == pytest.approx(float(matrix_entropy(Z)), abs=1e-6)


@pytest.mark.parametrize("dtype", [">i4", "<i2", ">u8"])
def test_labels_of_any_order_of_bytes_are_the_same_labels(dtype):
    labels = LABELS.numpy().astype(dtype)
    assert mutual_information(Z, labels) == mutual_information(Z, LABELS)
    assert torch.equal(backoff_labels(labels[:, None])[0], LABELS)


NO_NUMBERS = {
    "ragged": [[1.0, 2.0], [3.0]],
    "objects": np.array([[1, "a"]], dtype=object),
    "words": [["a", "b"]],
    "nothing": None,
    "dates": np.zeros((4, 4), "datetime64[s]"),
}


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_what_holds_no_numbers_is_refused_in_one_line(case):
    calls = {
        "z": lambda values: matrix_entropy(values),
        "labels": lambda values: mutual_information(Z, values),
        "tokens": lambda values: backoff_labels(values),
        "p": lambda values: entropy_of_assignments(values, 1),
        "values": lambda values: patch_standard_error(values),
        "reference_points": lambda values: soft_assign(Z, reference_points=values),
    }
    for name, call in calls.items():
        if (case, name) == ("nothing", "reference_points"):
            continue  # None draws them
        with pytest.raises(ValueError, match=f"^{name}: expected an array of numbers, found .*: pass rows") as raised:
            call(NO_NUMBERS[case])
        assert "\n" not in str(raised.value)


def test_numpy_is_taken_where_tensors_are():
    points = reference_points(8, num_bins=20)
    assert torch.equal(soft_entropy(Z, reference_points=points.numpy()), soft_entropy(Z, reference_points=points))
    p = soft_assign(Z, num_bins=20)
    assert entropy_of_assignments(p.numpy(), 8) == entropy_of_assignments(p, 8)
    assert patch_standard_error(np.array([1, 3])) == 1
    assert patch_standard_error([1.0, 3.0]) == 1
    expected = information_plane(p[:, None], [LABELS], [LABELS])
    found = information_plane(p[:, None].numpy(), [LABELS.numpy()], [LABELS.numpy()])
    for ours, theirs in ((found.input[0], expected.input[0]), (found.output[0], expected.output[0])):
        assert torch.equal(ours.value, theirs.value)
        assert torch.equal(ours.std_error, theirs.std_error)


@pytest.mark.parametrize("patch", [0, -1])
def test_a_patch_without_tokens_is_refused(patch):
    message = f"patch: expected at least 1 token, found {patch}"
    with pytest.raises(ValueError, match=message):
        matrix_entropy_standard_error(Z, patch=patch)
    with pytest.raises(ValueError, match=message):
        entropy_of_assignments(soft_assign(Z), patch)


def test_an_exact_alignment_without_its_gradients_is_refused():
    linear = torch.nn.Linear(8, 4)
    z, parameters = linear(Z), dict(linear.named_parameters())
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    for loss, given, message in (
        (z.sum(), {**parameters, "still": frozen}, "parameters: expected all to require gradients; found still frozen"),
        (z.sum().detach(), parameters, "loss: expected one with its graph, found it detached"),
        (z, parameters, r"loss: expected a single number, found shape \(64, 4\): take its mean"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            exact_alignment(loss, {"z": z}, given)
        assert "\n" not in str(raised.value)
