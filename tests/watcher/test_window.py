"""The sliding window: what it holds, when it speaks, and that what it says is the information of those tokens."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.estimators import backoff_labels, information_plane, mutual_information, soft_assign
from entropy_monitor.store import (
    FrameData,
    FrameLayout,
    FrameWriter,
    GroupLayout,
    claim_attempt,
    create_run,
    read_cursor,
)
from entropy_monitor.types import Frame, LayerGroup
from entropy_monitor.watcher import window as window_module
from entropy_monitor.watcher.measure import measure_frames
from entropy_monitor.watcher.refill import refill
from entropy_monitor.watcher.window import InformationWindow, WindowExtent

METRICS = [f"mi_{side}_{order}" for side in ("input", "output") for order in (1, 2, 3)] + ["optimality"]
PATCHES = 16
ROWS = 8 * PATCHES


@pytest.fixture(autouse=True)
def small_window(monkeypatch):
    """Four frames of 128 tokens."""
    monkeypatch.setattr(window_module, "MIN_TOKENS", 4 * ROWS)


def contents(step, rank=0, num_patches=PATCHES):
    """Token windows of a small language, and two layers that know the token, the second one a little of the next."""
    rng = np.random.default_rng((step, rank))
    stream = rng.integers(0, 6, 8 * num_patches + 5).astype(np.int32)
    tokens = np.lib.stride_tricks.sliding_window_view(stream, 6).copy()
    codes = np.random.default_rng(9).standard_normal((2, 6, 12)).astype(np.float32)
    z = np.stack([codes[0][tokens[:, 2]], codes[0][tokens[:, 2]] + 0.7 * codes[1][tokens[:, 3]]])
    return tokens, z + 0.3 * rng.standard_normal(z.shape).astype(np.float32)


def frame(content, rank=0, attempt=1, **changes):
    """A frame; of another step than its content's number if `step` says so."""
    step = changes.pop("step", content)
    tokens, z = contents(content, rank, changes.pop("num_patches", PATCHES))
    fields = {
        "run_id": "run",
        "attempt": attempt,
        "rank": rank,
        "seq": step,
        "step": step,
        "phase": "memorize",
        "wall_time_s": 0.0,
        "groups": (LayerGroup(("a", "b"), z, None),),
        "token_windows": tokens,
        "num_patches": len(tokens) // 8,
    }
    return Frame(**{**fields, **changes})


def told(window, *frames):
    return window.advance(frames, measure_frames(frames).assignments)


def advance(window, *frames):
    return list(told(window, *frames).measurements)


def held(window):
    """The tokens of a window and how they are assigned, whatever their order."""
    (ring,) = window.rings
    rows = zip(ring.step_N.tolist(), ring.tokens_NW.tolist(), ring.p_NLM.tolist(), strict=True)
    return sorted(list(rows)[: ring.num_tokens])


def by_metric(measurements):
    return {(m.layer, m.metric): (m.value, m.std_error) for m in measurements}


def test_it_is_silent_until_it_holds_enough_and_then_tells_every_layer():
    window = InformationWindow()
    for step in range(3):
        assert advance(window, frame(step)) == []
        assert window.extent is None
    found = advance(window, frame(3))
    assert [(m.layer, m.metric) for m in found] == [(layer, name) for name in METRICS for layer in "ab"]
    assert {m.num_samples for m in found} == {4 * ROWS}
    assert {m.unit for m in found} == {"nats", "ratio"}
    assert window.extent == WindowExtent(0, 4 * ROWS, 4)
    figures = by_metric(found)
    assert figures["b", "mi_output_1"][0] > 0.2 > figures["a", "mi_output_1"][0] + 0.1
    assert all(math.isfinite(value) and error > 0 for value, error in figures.values() if not math.isnan(value))
    assert math.isfinite(figures["b", "optimality"][0])
    advance(window, frame(4))
    assert window.extent == WindowExtent(1, 4 * ROWS, 4)


def test_it_says_the_information_of_the_tokens_it_holds():
    window = InformationWindow()
    for step in range(4):
        found = by_metric(advance(window, frame(step)))
    held = [contents(step) for step in range(4)]
    tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in held])).long()
    z = torch.from_numpy(np.concatenate([z for _, z in held], axis=1))
    plane = information_plane(
        soft_assign(z).transpose(0, 1).contiguous(),
        backoff_labels(tokens[:, [2, 1, 0]]),
        backoff_labels(tokens[:, [3, 4, 5]]),
        influence=slice(3 * ROWS, None),
    )
    for index, layer in enumerate("ab"):
        for side, informations in (("input", plane.input), ("output", plane.output)):
            for order, expected in enumerate(informations, 1):
                figures = (expected.value[index].item(), expected.std_error[index].item())
                assert found[layer, f"mi_{side}_{order}"] == pytest.approx(figures, abs=1e-6)
        single = mutual_information(z[index], backoff_labels(tokens[:, [2]])[0], patch=8)
        assert found[layer, "mi_input_1"][0] == pytest.approx(float(single), abs=0.01)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_it_holds_the_newest_tokens_and_no_old_ones(counts):
    least, window = 4 * ROWS, InformationWindow()
    window_module.MIN_TOKENS = least
    taken = []
    for step, num_patches in enumerate(counts):
        single = frame(step, num_patches=num_patches)
        window.add([single], measure_frames([single]).assignments)
        taken += [step] * (8 * num_patches)
        (ring,) = window.rings
        held = sorted(ring.step_N[: ring.num_tokens].tolist())
        most = 8 * max(counts[: step + 1])
        assert set(held) >= set(taken[-min(len(taken), least) :]) or len(held) >= least
        assert held[-8 * num_patches :] == [step] * (8 * num_patches)
        assert len(held) <= least + most
        if len(held) >= least:
            # What is held is among the newest tokens, give or take the frame that is being written over.
            assert held[0] >= taken[-min(len(taken), least + 2 * most)]


def test_a_late_rank_adds_its_own_tokens_once():
    window = InformationWindow()
    both = [(frame(step), frame(step, rank=1)) for step in range(2)]
    advance(window, *both[0])
    assert advance(window, both[1][0]) == []
    assert len(advance(window, *both[1])) == 14  # the late one alone is new, and completes the window
    assert window.extent.num_tokens == 4 * ROWS
    assert advance(window, *both[1]) == []


def test_a_layer_that_is_not_finite_is_undetermined_alone_until_the_step_has_left_the_window():
    window = InformationWindow()
    for step in range(4):
        advance(window, frame(step))
    bad = frame(4)
    bad.groups[0].activations[1, 3, 2] = math.nan
    for step in range(4, 8):
        result = told(window, bad if step == 4 else frame(step))
        assert {m.layer for m in result.measurements} == {"a"}
        assert result.faults == {"layers_vary": 1}
    assert {m.layer for m in advance(window, frame(8))} == {"a", "b"}


def test_patches_with_a_token_of_no_direction_are_left_out():
    window = InformationWindow()
    for step in range(5):
        masked = frame(step)
        masked.groups[0].activations[0, 8 * step + 3] = 0.0  # a padded position
        measured = measure_frames([masked])
        assert measured.faults == {"no_direction": 1}
        soft = {m.layer: m for m in measured.measurements if m.metric == "soft_entropy"}
        assert math.isfinite(soft["a"].value)
        assert soft["a"].num_samples == ROWS - 8
        found = window.advance([masked], measured.assignments)
        assert window.rings[0].num_tokens == min(5, step + 1) * (ROWS - 8)
    assert {m.layer for m in found.measurements} == {"a", "b"}
    assert all(math.isfinite(m.value) for m in found.measurements if m.metric == "mi_input_1")


def test_a_model_that_skips_layers_is_undetermined_there_and_takes_no_more_memory():
    window = InformationWindow()
    for step in range(12):
        single = frame(step)
        z = single.groups[0].activations
        if step % 3 == 1:
            single = replace(single, groups=(LayerGroup(("a",), z[:1], None),))
        result = told(window, single)
    assert len(window.rings) == 1
    assert window.rings[0].layers == ["a", "b"]
    assert {m.layer for m in result.measurements} == {"a"}
    assert result.faults == {"layers_vary": 1}


def test_a_layer_that_appears_later_joins_the_window():
    window = InformationWindow()
    for step in range(9):
        single = frame(step)
        if not step:
            single = replace(single, groups=(LayerGroup(("b",), single.groups[0].activations[1:], None),))
        result = told(window, single)
    assert {m.layer for m in result.measurements} == {"a", "b"}
    through = InformationWindow()
    for step in range(9):
        advance(through, frame(step))
    order = [window.rings[0].layers.index(layer) for layer in through.rings[0].layers]
    assert torch.equal(window.rings[0].p_NLM[: 4 * ROWS][:, order], through.rings[0].p_NLM[: 4 * ROWS])


def test_text_that_comes_again_and_again_is_no_sample():
    """A fixed probe batch, or a tiny data set: copies of the same tokens would feign information and its certainty."""
    window = InformationWindow()
    for step in range(6):
        result = told(window, frame(0, step=step))
    assert window.rings[0].num_tokens == 4 * ROWS
    assert result.measurements == ()
    assert result.faults == {"repeated_tokens": 2}


def test_a_new_attempt_empties_it():
    window = InformationWindow()
    for step in range(4):
        advance(window, frame(step))
    assert advance(window, frame(0, attempt=2)) == []
    assert window.extent is None


@pytest.mark.parametrize("windows", [None, np.zeros((ROWS, 3), np.int32), np.full((ROWS, 6), -1, np.int32)])
def test_without_known_tokens_there_is_no_information(windows):
    window = InformationWindow()
    for step in range(5):
        assert advance(window, frame(step, token_windows=windows)) == []


def test_patches_whose_next_tokens_are_unknown_are_left_out_and_starts_are_kept():
    window = InformationWindow()
    tokens, _ = contents(0)
    tokens[:8, :2] = -1  # a sequence begins here
    tokens[8:16, 5] = -1  # and one ends here
    advance(window, frame(0, token_windows=tokens))
    assert window.rings[0].num_tokens == ROWS - 8
    assert (window.rings[0].tokens_NW[:8, :2] == -1).all()


def test_layers_of_other_widths_share_the_window():
    window = InformationWindow()
    for step in range(4):
        single = frame(step)
        wide = LayerGroup(("c",), np.repeat(single.groups[0].activations[:1], 3, axis=2), None)
        found = advance(window, replace(single, groups=(*single.groups, wide)))
    assert {m.layer for m in found} == {"a", "b", "c"}
    assert len(window.rings) == 1


def test_it_is_filled_again_from_the_frames_that_are_still_there(tmp_path: Path):
    run = create_run(tmp_path)
    attempt = claim_attempt(run.objects, {"world_size": 1, "layers": ["a", "b"]})
    writer = FrameWriter(run.objects, 0, attempt)
    group = GroupLayout(layers=("a", "b"), num_tokens=ROWS, num_features=12, dtype="float32")
    layout = FrameLayout(groups=(group,), gradients=False, token_window=6, alignment_layers=())
    through = InformationWindow()
    for step in range(9):
        tokens, z = contents(step)
        seq = writer.write(
            layout,
            FrameData(
                attempt=attempt,
                step=step,
                phase="memorize",
                wall_time_s=0.0,
                num_patches=PATCHES,
                num_tokens_seen=0,
                scalars={},
                groups=(z[None],),
                tokens=tokens,
            ),
        )
        single = frame(step, attempt=attempt)
        if step < 8:
            advance(through, single)
    restarted = InformationWindow()
    refill(restarted, run, attempt, {0: seq - 1})
    assert read_cursor(run.objects) == {}
    assert restarted.extent.num_tokens == through.extent.num_tokens
    expected, found = by_metric(advance(through, frame(8))), by_metric(advance(restarted, frame(8)))
    assert held(restarted) == held(through)
    for key, (value, error) in expected.items():  # of the same tokens: only what the bias is learned from differs
        assert found[key] == pytest.approx((value, error), abs=3 * error), key
    other = InformationWindow()
    refill(other, run, attempt + 1, {0: seq})
    assert other.rings == []


def test_the_learned_bias_is_steady_from_window_to_window():
    """Values move from one window to the next by no more than their tokens make them, as the plug-in does."""
    window, values, plug_ins = InformationWindow(), [], []
    for step in range(60):
        found = by_metric(advance(window, frame(step)))
        if step >= 20:
            ring = window.rings[0]
            bias = ring.bias.known["output", 2, "b"][0]
            values.append(found["b", "mi_output_3"][0])
            plug_ins.append(values[-1] + bias)
    assert np.diff(values).std() < 1.3 * np.diff(plug_ins).std()
