import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.estimators import (
    SoftEntropyAccumulator,
    mutual_information,
    reference_points,
    soft_entropy,
    soft_entropy_estimate,
)
from entropy_monitor.estimators.reservoir import NUM_ROWS, patch_priorities

FIGURES = ("value", "std_error", "plug_in", "bias")


def stream(num_tokens, num_features=8, num_labels=40, seed=0):
    source = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, num_labels + 1.0)
    labels = torch.multinomial(weights, num_tokens, replacement=True, generator=source)
    centres = torch.randn(num_labels, num_features, generator=source)
    z = 0.5 * centres[labels] + torch.randn(num_tokens, num_features, generator=source)
    return z, {"x": labels, "y": labels // 3 - 5}


def rows_of(z, labels, rows):
    return z[rows], {name: label[rows] for name, label in labels.items()}


def accumulated(parts, num_features=8, **options):
    accumulator = SoftEntropyAccumulator(num_features, **options)
    for z, labels in parts:
        accumulator.update(z, labels)
    return accumulator


def assert_same(found, expected):
    assert found.num_samples == expected.num_samples
    assert found.entropy().item() == pytest.approx(expected.entropy().item(), abs=1e-6)
    for name in ("x", "y"):
        ours, theirs = found.mutual_information(name), expected.mutual_information(name)
        for figure in FIGURES:
            assert getattr(ours, figure).item() == pytest.approx(getattr(theirs, figure).item(), abs=1e-6), figure
        assert ours[4:] == theirs[4:]


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([1, 8]))
def test_any_partition_merged_in_any_order_is_one_shot(data, patch):
    z, labels = stream(320 * patch + 5)
    cuts = sorted(data.draw(st.sets(st.integers(1, 39), max_size=8)))
    edges = [0, *(8 * patch * cut for cut in cuts), len(z)]
    parts = [rows_of(z, labels, slice(*edge)) for edge in pairwise(edges)]
    owners = data.draw(st.lists(st.integers(0, 2), min_size=len(parts), max_size=len(parts)))
    order = data.draw(st.permutations(range(len(parts))))
    ranks = [accumulated([parts[i] for i in order if owners[i] == rank], patch=patch) for rank in range(3)]
    merged = ranks[0]
    merged.merge(ranks[2])
    merged.merge(ranks[1])
    assert_same(merged, accumulated([(z, labels)], patch=patch))


def test_a_stream_longer_than_the_reservoir_is_still_the_same_on_any_path():
    z, labels = stream(2 * NUM_ROWS + 64, num_features=4)
    whole = accumulated([(z, labels)], 4, patch=8)
    parts = [rows_of(z, labels, slice(i, i + 4096)) for i in range(0, len(z), 4096)]
    assert_same(accumulated(reversed(parts), 4, patch=8), whole)
    held = whole.state_dict()
    assert held["reservoir_rows"].shape == (NUM_ROWS, 100)
    expected = mutual_information(z, labels["x"], patch=8)
    found = whole.mutual_information("x")
    assert found.plug_in.item() == pytest.approx(expected.plug_in.item(), abs=1e-5)
    assert abs(found.value - expected.value) < 3 * expected.std_error
    assert found.std_error.item() == pytest.approx(expected.std_error.item(), rel=0.3)


def test_a_patch_is_known_by_its_rows_in_order_and_their_labels():
    z, labels = torch.arange(32.0).reshape(16, 2), {"x": torch.arange(16)}
    whole = patch_priorities(z, labels, 8)
    assert whole.unique().numel() == 2
    assert torch.equal(patch_priorities(z[8:], {"x": labels["x"][8:]}, 8), whole[8:])
    for other in (
        patch_priorities(z, {"x": labels["x"] + 1}, 8),
        patch_priorities(z.flip(0), {"x": labels["x"].flip(0)}, 8),
        patch_priorities(z.nextafter(torch.tensor(99.0)), labels, 8),
    ):
        assert not set(other.tolist()) & set(whole.tolist())


def test_sampled_patches_are_spread_evenly_over_the_stream():
    priority = patch_priorities(stream(4096)[0], {}, 1)
    lowest = priority.argsort()[:1024]
    assert abs(lowest.double().mean() - 2048) < 4 * 4096 / math.sqrt(12 * 1024)
    assert abs((priority > 0).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(4096)


def test_plug_in_figures_are_those_of_the_one_shot_functions():
    z, labels = stream(2000)
    parts = [rows_of(z, labels, slice(i, i + 256)) for i in range(0, 2000, 256)]
    accumulator = accumulated(parts, seed=4, num_bins=30)
    for normalize in (False, True):
        expected = soft_entropy(z, seed=4, num_bins=30, normalize=normalize).item()
        assert accumulator.entropy(normalize).item() == pytest.approx(expected, abs=1e-6)
        for name, label in labels.items():
            alone = mutual_information(z, label, seed=4, num_bins=30, normalize=normalize)
            found = accumulator.mutual_information(name, normalize=normalize)
            assert found.plug_in.item() == pytest.approx(alone.plug_in.item(), abs=1e-6)
            assert abs(found.value - alone.value) < 3 * alone.std_error
            plain = accumulator.mutual_information(name, correction="none", normalize=normalize)
            expected = mutual_information(z, label, seed=4, num_bins=30, normalize=normalize, correction="none")
            assert plain.value.item() == pytest.approx(expected.value.item(), abs=1e-6)
            assert plain.std_error.item() == pytest.approx(expected.std_error.item(), rel=1e-4)


def test_counts_stay_exact_where_half_precision_would_stop_counting():
    accumulator = SoftEntropyAccumulator(2, num_bins=3)
    z, labels = torch.ones(50_000, 2, dtype=torch.bfloat16), torch.zeros(50_000, dtype=torch.int64)
    for _ in range(4):
        accumulator.update(z, {"x": labels})
    state = accumulator.state_dict()
    assert accumulator.num_samples == int(state["tables"]["x"][1]) == 200_000
    assert state["tables"]["x"][2].sum().item() == pytest.approx(200_000, rel=1e-6)
    assert accumulator.entropy().item() == pytest.approx(soft_entropy(z[:1].float(), num_bins=3).item(), abs=1e-6)


def test_rows_without_direction_are_left_out_and_counted():
    z, labels = stream(512)
    bad = z.clone()
    bad[7], bad[100, 2] = 0, math.nan
    sound = torch.ones(512, dtype=torch.bool)
    sound[[7, 100]] = False
    found = accumulated([(bad, labels)])
    assert (found.num_samples, found.num_undetermined) == (510, 2)
    assert_same(found, accumulated([rows_of(z, labels, sound)]))
    found.merge(accumulated([(torch.zeros(3, 8), {name: label[:3] for name, label in labels.items()})]))
    assert (found.num_samples, found.num_undetermined) == (510, 5)


def test_state_travels_between_ranks(tmp_path):
    z, labels = stream(600)
    first = accumulated([rows_of(z, labels, slice(0, 320))])
    torch.save(first.state_dict(), tmp_path / "rank1.pt")
    gathered = SoftEntropyAccumulator(8)
    gathered.load_state_dict(torch.load(tmp_path / "rank1.pt", weights_only=True))
    assert_same(gathered, first)
    gathered.update(*rows_of(z, labels, slice(320, 600)))
    assert_same(gathered, accumulated([(z, labels)]))
    assert first.num_samples == 320


def test_an_empty_accumulator_knows_nothing_and_adds_nothing():
    empty, full = SoftEntropyAccumulator(8), accumulated([stream(64)])
    assert empty.entropy().isnan()
    full.merge(empty)
    empty.merge(full)
    assert_same(empty, full)


def test_a_stream_without_any_direction_is_undetermined():
    z, labels = stream(64)
    nothing = accumulated([(torch.zeros_like(z), labels), (z * math.nan, labels)])
    assert (nothing.num_samples, nothing.num_undetermined) == (0, 128)
    for correction in ("rarefied", "none"):
        found = nothing.mutual_information("x", correction)
        assert all(getattr(found, figure).isnan() for figure in FIGURES)
        assert found[4:] == (0, 0, "none")
    assert all(figure.isnan() for figure in nothing.entropy_estimate())
    nothing.update(z, labels)
    assert_same(nothing, accumulated([(z, labels)]))


def test_a_patch_longer_than_what_is_held_is_refused():
    assert SoftEntropyAccumulator(8, patch=NUM_ROWS).num_samples == 0
    with pytest.raises(ValueError, match="patch: expected at most 16384 tokens, those held; found 16385"):
        SoftEntropyAccumulator(8, patch=NUM_ROWS + 1)


@pytest.mark.parametrize("patch", [1, 8])
@pytest.mark.parametrize("normalize", [False, True])
def test_entropy_has_the_error_and_the_correction_of_one_shot(patch, normalize):
    z, labels = stream(320 * patch + 5)
    cut = 160 * patch
    found = accumulated([rows_of(z, labels, slice(0, cut)), rows_of(z, labels, slice(cut, None))], patch=patch)
    expected = soft_entropy_estimate(z.double(), patch=patch, normalize=normalize)
    for ours, theirs in zip(found.entropy_estimate(normalize), expected, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    alone = accumulated([rows_of(z, labels, slice(0, patch))], patch=patch).entropy_estimate()
    assert alone.plug_in.isfinite()
    assert alone.std_error.isnan()


def test_the_error_of_a_long_streams_entropy_is_scaled_from_the_rows_held():
    z, labels = stream(4 * NUM_ROWS, num_features=4)
    found = accumulated([(z, labels)], 4, patch=8).entropy_estimate()
    expected = soft_entropy_estimate(z, patch=8)
    assert found.plug_in.item() == pytest.approx(expected.plug_in.item(), abs=1e-6)
    assert found.std_error.item() == pytest.approx(expected.std_error.item(), rel=0.1)
    assert found.bias.item() == pytest.approx(expected.bias.item(), rel=0.1)


def test_labels_are_optional():
    z, _ = stream(64)
    accumulator = SoftEntropyAccumulator(8)
    accumulator.update(z)
    assert accumulator.entropy().item() == pytest.approx(soft_entropy(z).item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "reference_points: expected those of this accumulator"),
        ({"num_bins": 50}, "reference_points: expected those of this accumulator"),
        ({"reference_points": reference_points(8, seed=2)}, "reference_points: expected those of this accumulator"),
        ({"temperature": 1.0}, "expected temperature .* and patch 1, found 1.0 and 1"),
        ({"patch": 8}, "and patch 1, found .* and 8"),
    ],
)
def test_other_bins_cannot_be_merged_or_loaded(options, message):
    accumulator, other = SoftEntropyAccumulator(8), SoftEntropyAccumulator(8, **options)
    with pytest.raises(ValueError, match=message):
        accumulator.merge(other)
    with pytest.raises(ValueError, match=message):
        accumulator.load_state_dict(other.state_dict())


def test_bad_batches_are_refused_and_leave_the_counts_alone():
    z, labels = stream(64)
    accumulator = accumulated([(z, labels)])
    for arguments, message in (
        ((z[None], labels), r"z: expected \[n, 8\], found \(1, 64, 8\)"),
        ((z[:, :4], labels), r"z: expected \[n, 8\], found \(64, 4\)"),
        ((z, labels["x"]), "labels: expected sets by name, found a Tensor: pass"),
        ((z, {"x": labels["x"]}), r"labels: expected the sets \['x', 'y'\], found \['x'\]"),
        ((z, {**labels, "y": labels["y"][:5]}), r"labels: expected 64 integers.*found \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            accumulator.update(*arguments)
    assert_same(accumulator, accumulated([(z, labels)]))
    with pytest.raises(ValueError, match=r"name: expected one of \['x', 'y'\], found 'z'"):
        accumulator.mutual_information("z")
    with pytest.raises(ValueError, match="correction: expected rarefied or none"):
        accumulator.mutual_information("x", correction="jackknife")
