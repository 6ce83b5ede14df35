import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from entropy_monitor.catalog import METRICS
from entropy_monitor.estimators import (
    gradient_alignment,
    gradient_alignment_from_parts,
    matrix_entropy,
    matrix_entropy_unbiased,
    patch_entropies,
    patch_matrix_entropy,
    weight_alignment_parts,
)
from entropy_monitor.types import AlignmentParts, ExactAlignment, Frame, LayerGroup
from entropy_monitor.watcher.measure import measure_frames

FROM_ONE_STEP = [metric for metric in METRICS if metric.samples != "window_tokens"]
NAMES = [metric.name for metric in FROM_ONE_STEP]
ALIGNMENTS = ["alignment_weight", "alignment_exact", "alignment_exact_all"]
OF_ACTIVATIONS = [name for name in NAMES if name not in ALIGNMENTS]


def array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def alignment_parts(layers, num_patches, seed=0, status=0):
    parts, info = [], []
    for index in range(len(layers)):
        x = torch.from_numpy(array(num_patches * 8, 6, seed=seed + 10 * index) + 0.5)
        h = torch.from_numpy(array(num_patches * 8, 5, seed=seed + 10 * index + 1) + 0.5)
        weight_gradient = torch.from_numpy(array(5, 6, seed=seed + 10 * index + 2))
        parts.append(weight_alignment_parts(x, h, weight_gradient).numpy())
        info.append([weight_gradient.norm().item(), num_patches, 4 * num_patches, status])
    return AlignmentParts(layers, np.stack(parts), np.array(info, dtype=np.float32))


def frame(layers=("a", "b"), num_patches=6, seed=0, padded_to=None, rank=0, **changes):
    num_tokens = num_patches * 8
    activations, gradients = (
        array(len(layers), num_tokens, 5, seed=seed),
        array(len(layers), num_tokens, 5, seed=seed + 1),
    )
    if padded_to is not None:
        padding = ((0, 0), (0, padded_to - num_tokens), (0, 0))
        activations, gradients = np.pad(activations, padding), np.pad(gradients, padding)
    fields = {
        "run_id": "run",
        "attempt": 1,
        "rank": rank,
        "seq": 7,
        "step": 30,
        "phase": "memorize",
        "wall_time_s": 0.0,
        "groups": (LayerGroup(layers, activations, gradients),),
        "alignment": alignment_parts(layers, num_patches, seed),
        "num_patches": num_patches,
    }
    return Frame(**{**fields, **changes})


def table(*frames):
    """Measurements by (layer, metric), and the faults."""
    result = measure_frames(frames)
    return {(m.layer, m.metric): m for m in result.measurements}, result.faults


def figures(*frames):
    return {key: (m.value, m.std_error, m.num_samples) for key, m in table(*frames)[0].items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert found[key] == pytest.approx(row, rel=1e-5, abs=1e-6, nan_ok=True), key


def test_every_layer_gets_every_metric_with_its_unit_in_the_order_of_the_catalog():
    measurements = measure_frames([frame()]).measurements
    assert [(m.layer, m.metric) for m in measurements] == [(layer, name) for layer in "ab" for name in NAMES]
    units = {metric.name: metric.unit for metric in METRICS}
    assert all(m.unit == units[m.metric] for m in measurements)
    assert {(m.run_id, m.step) for m in measurements} == {("run", 30)}


def test_catalog_covers_the_contract_in_order():
    expected = "mbe mbe_normalized mbe_centered s1 s2 effective_rank soft_entropy mi_input_1 mi_input_2 mi_input_3"
    expected += " mi_output_1 mi_output_2 mi_output_3 optimality alignment_activation alignment_weight"
    expected += " alignment_exact alignment_exact_all"
    assert [metric.name for metric in METRICS] == expected.split()
    assert all(metric.description.endswith(".") and metric.source for metric in METRICS)


def test_values_are_those_of_the_estimators():
    single = frame()
    found, faults = table(single)
    assert faults == {}
    for index, layer in enumerate("ab"):
        z = torch.from_numpy(single.activations[index]).double()
        g = torch.from_numpy(single.gradients[index]).double()
        alignment = gradient_alignment(z, g)
        expected = {
            "mbe": patch_matrix_entropy(z),
            "mbe_normalized": patch_matrix_entropy(z, normalize=True),
            "mbe_centered": patch_matrix_entropy(z, center=True),
            "s1": matrix_entropy(z, 1, normalize=True),
            "s2": matrix_entropy_unbiased(z, normalize=True),
            "effective_rank": matrix_entropy(z, 1, normalize=True).exp(),
            "alignment_activation": alignment.cosine,
            "alignment_weight": gradient_alignment_from_parts(
                single.alignment.parts[index], float(single.alignment.info[index, 0]), 6
            ).cosine,
        }
        for metric, value in expected.items():
            assert found[layer, metric].value == pytest.approx(value.item(), abs=1e-5), metric
        assert found[layer, "mbe"].std_error == pytest.approx(patch_entropies(z).std().item() / math.sqrt(6), rel=1e-4)
        assert found[layer, "effective_rank"].std_error == pytest.approx(
            found[layer, "s1"].std_error * found[layer, "effective_rank"].value, rel=1e-5
        )
        assert found[layer, "alignment_activation"].std_error == pytest.approx(alignment.std_error.item(), rel=1e-4)


def test_sample_sizes_count_tokens_or_patches_as_the_catalog_says():
    counts = {"tokens": 48, "patches": 6}
    kinds = {metric.name: metric.samples for metric in METRICS}
    for measurement in measure_frames([frame()]).measurements:
        if not measurement.metric.startswith("alignment_exact"):  # there was no audit
            assert measurement.num_samples == counts[kinds[measurement.metric]]


def test_padding_is_dropped():
    same(figures(frame(padded_to=80)), figures(frame()))


def test_read_only_arrays_are_measured_without_a_warning():
    group = frame().groups[0]
    group.activations.flags.writeable = False
    group.gradients.flags.writeable = False
    same(figures(frame(groups=(group,))), figures(frame()))


def test_ranks_are_pooled_token_by_token():
    first, second = frame(seed=0, padded_to=64), frame(seed=50, num_patches=9, rank=1)
    pooled = frame(num_patches=15, seed=0)
    together = replace(
        pooled,
        groups=(
            LayerGroup(
                ("a", "b"),
                np.concatenate([first.activations[:, :48], second.activations], axis=1),
                np.concatenate([first.gradients[:, :48], second.gradients], axis=1),
            ),
        ),
    )
    found, expected = figures(first, second), figures(together)
    for layer in "ab":
        for metric in OF_ACTIVATIONS:
            assert found[layer, metric] == pytest.approx(expected[layer, metric], rel=1e-5), metric


def test_weight_alignments_of_ranks_are_averaged_by_their_patches():
    first, second = frame(seed=0), frame(seed=50, num_patches=18, rank=1)
    one, two, both = (figures(*frames)["a", "alignment_weight"] for frames in ([first], [second], [first, second]))
    assert both[0] == pytest.approx((6 * one[0] + 18 * two[0]) / 24)
    assert both[1] == pytest.approx(math.hypot(6 * one[1], 18 * two[1]) / 24)
    assert both[2] == 24


@pytest.mark.parametrize("status", [1, 2, 3])
def test_a_weight_alignment_that_is_not_valid_is_undetermined_and_no_fault(status):
    invalid = frame(alignment=alignment_parts(("a", "b"), 6, status=status))
    found, faults = table(invalid)
    assert math.isnan(found["a", "alignment_weight"].value)
    assert math.isnan(found["a", "alignment_weight"].std_error)
    assert found["a", "alignment_weight"].num_samples == 0
    assert faults == {}
    valid = frame(seed=50, rank=1)
    assert figures(invalid, valid)["a", "alignment_weight"] == figures(valid)["a", "alignment_weight"]


def test_audits_of_ranks_are_averaged_and_carry_no_error():
    nan = math.nan
    first = replace(frame(), exact_alignment=ExactAlignment(("a", "b"), np.float32([[0.5, -0.25], [nan, 0.75]])))
    second = replace(frame(rank=1), exact_alignment=ExactAlignment(("a", "b"), np.float32([[0.25, nan], [nan, nan]])))
    found = figures(first, second)
    for key, expected in {
        ("a", "alignment_exact"): (0.375, nan, 2),
        ("a", "alignment_exact_all"): (-0.25, nan, 1),
        ("b", "alignment_exact"): (nan, nan, 0),
        ("b", "alignment_exact_all"): (0.75, nan, 1),
    }.items():
        assert found[key] == pytest.approx(expected, nan_ok=True), key


def test_a_square_norm_that_is_not_positive_is_undetermined_and_counted():
    parts = frame().alignment
    parts.parts[1, :, 1] = -1.0
    found, faults = table(frame(alignment=parts))
    assert math.isnan(found["b", "alignment_weight"].value)
    assert math.isfinite(found["a", "alignment_weight"].value)
    assert faults == {"alignment_undetermined": 1}


def test_frames_without_gradients_or_alignment_leave_those_undetermined():
    plain = frame(alignment=None)
    group = plain.groups[0]
    found, faults = table(replace(plain, groups=(LayerGroup(group.layers, group.activations, None),)))
    for metric in ("alignment_activation", "alignment_weight"):
        assert math.isnan(found["a", metric].value)
        assert found["a", metric].num_samples == 0
    assert math.isfinite(found["a", "mbe"].value)
    assert faults == {}
    mixed = measure_frames([plain, replace(plain, groups=(LayerGroup(group.layers, group.activations, None),))])
    assert math.isnan({m.metric: m.value for m in mixed.measurements}["alignment_activation"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_activation_makes_its_own_layer_undetermined_and_is_counted(bad):
    single = frame()
    single.activations[1, 3, 2] = bad
    found, faults = table(single)
    for metric in OF_ACTIVATIONS:
        assert math.isnan(found["b", metric].value), metric
        assert math.isnan(found["b", metric].std_error), metric
        assert found["b", metric].num_samples > 0
    assert faults == {"non_finite": 1}
    clean = figures(frame())
    for metric in NAMES:
        assert figures(single)["a", metric] == pytest.approx(clean["a", metric], rel=1e-6, nan_ok=True)


def test_a_non_finite_gradient_spoils_the_alignment_alone():
    single = frame()
    single.gradients[1, 3, 2] = math.inf
    found, faults = table(single)
    assert math.isnan(found["b", "alignment_activation"].value)
    assert math.isfinite(found["b", "mbe"].value)
    assert faults == {"non_finite_gradient": 1}


def test_a_zero_patch_is_counted_and_leaves_the_whole_sample_measured():
    single = frame()
    single.activations[0, 8:16] = 0
    found, faults = table(single)
    assert math.isnan(found["a", "mbe"].value)
    assert math.isfinite(found["a", "s1"].value)
    assert faults == {"zero_patch": 1, "no_direction": 1}


@pytest.mark.parametrize("num_patches", [0, 1])
def test_too_few_patches_are_undetermined_and_counted(num_patches):
    single = replace(frame(num_patches=2), num_patches=num_patches, alignment=None)
    found, faults = table(single)
    assert faults == {"too_few_patches": 2}
    assert math.isfinite(found["a", "mbe"].value) == (num_patches == 1)
    assert math.isnan(found["a", "mbe"].std_error)
    assert math.isnan(found["a", "s2"].value)
    assert found["a", "mbe"].num_samples == num_patches


def test_layers_of_other_shapes_and_pipeline_stages_are_measured_beside_each_other():
    wide = LayerGroup(("c",), array(1, 64, 9), array(1, 64, 9, seed=1))
    single = frame(padded_to=64)
    found = figures(replace(single, groups=(*single.groups, wide)))
    assert {layer for layer, _ in found} == {"a", "b", "c"}
    assert found["c", "s1"][2] == 48
    stage = frame(layers=("c", "d"), rank=1)
    assert {layer for layer, _ in figures(single, stage)} == {"a", "b", "c", "d"}


def test_many_layers_are_the_same_as_one_by_one(monkeypatch):
    layers = tuple(f"h.{index}" for index in range(7))
    whole = figures(frame(layers=layers))
    monkeypatch.setattr("entropy_monitor.watcher.pool._MAX_ENTRIES", 500)
    same(figures(frame(layers=layers)), whole)


def test_large_spectra_are_taken_of_evenly_spaced_whole_patches(monkeypatch):
    monkeypatch.setattr("entropy_monitor.watcher.measure._MAX_SPECTRUM", 16)
    activations = array(1, 48, 20)
    wide = frame(layers=("a",), groups=(LayerGroup(("a",), activations, None),), alignment=None)
    kept = torch.from_numpy(np.concatenate([activations[0, :8], activations[0, 24:32]]))
    found = figures(wide)
    assert found["a", "s1"][2] == 16
    assert found["a", "s1"][0] == pytest.approx(matrix_entropy(kept, 1, normalize=True).item(), abs=1e-5)
    assert found["a", "mbe"][2] == 6


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "expected the frames of one step, found none"),
        ([frame(), frame(step=31)], r"found \[\('run', 1, 30\), \('run', 1, 31\)\]"),
        ([frame(groups=())], "frame 7 of rank 0 was read without them"),
        ([replace(frame(), num_patches=7)], "expected 7 patches of 8 tokens .* found 48 tokens"),
        ([frame(), frame(layers=("a",), rank=1)], "expected ranks to group their layers alike"),
    ],
)
def test_frames_that_do_not_belong_together_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        measure_frames(frames)
