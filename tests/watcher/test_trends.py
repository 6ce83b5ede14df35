"""All detectors folded over the steps: what they tell, once each, and that a restart changes nothing."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.types import STAGES
from entropy_monitor.watcher.findings import trend_events
from entropy_monitor.watcher.follow import JoinedStep
from entropy_monitor.watcher.row import RunFigure
from entropy_monitor.watcher.trends import Trends, TrendState, update_trends

FIGURES = ("mbe_normalized", "alignment_weight", "alignment_activation", "mi_input_1", "mi_output_1", "optimality")


def fold(series, every=10, state=None, window_samples=4):
    """Feed figures step by step; returns the last state and conclusions, and all events."""
    state, trends = state or TrendState(), Trends()
    events = []
    for index, figures in enumerate(series):
        joined = JoinedStep(
            attempt=1, step=every * index, frames=(), source={0: index}, missing_ranks=(), is_correction=False
        )
        before = trends
        state, trends = update_trends(state, joined.step, figures, window_samples)
        events += trend_events(joined, before, trends, state)
    return state, trends, events


def noisy(values, error, seed=0):
    noise = np.random.default_rng(seed).standard_normal(len(values)) * error
    return [RunFigure(float(value), error) for value in values + noise]


value = st.one_of(st.floats(-2, 2), st.just(math.nan))
row = st.dictionaries(st.sampled_from(FIGURES), st.builds(RunFigure, value, st.floats(0.001, 0.1)))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row, max_size=60), cut=st.integers(0, 60), repeat=st.booleans())
def test_a_restart_anywhere_changes_nothing(rows, cut, repeat):
    state = restarted = TrendState()
    for step, figures in enumerate(rows):
        if step == cut:
            restarted = TrendState.from_row(restarted.to_row())
        state, expected = update_trends(state, step, figures, 4)
        restarted, found = update_trends(restarted, step, figures, 4)
        if repeat:  # the last row is measured again when a watcher dies before it is committed
            restarted, found = update_trends(restarted, step, figures, 4)
        assert repr(found) == repr(expected)
        assert repr(restarted.to_row()) == repr(state.to_row())


def test_nothing_is_told_of_noise_or_of_nothing():
    count = 400
    levels = {name: 0.0 if "alignment" in name else 0.5 for name in FIGURES}
    still = {name: noisy(np.full(count, levels[name]), 0.02, seed) for seed, name in enumerate(FIGURES)}
    _, trends, events = fold([{name: still[name][index] for name in FIGURES} for index in range(count)])
    assert {event.kind for event in events} <= {"plateau"}  # an optimality that never improves has stopped improving
    assert trends.regime == "undetermined"
    assert trends.plane.stage == "undetermined"
    assert fold([{}] * 50)[2] == []
    assert math.isnan(trends.to_row()["cycle_period_steps"])


def test_a_course_of_training_is_told_in_order():
    rise, fall = np.linspace(0, 1, 120), np.linspace(1, 0, 120)
    inputs = np.concatenate([rise, 1 - 0.6 * rise])
    outputs = np.concatenate([0.6 * rise, np.full(120, 0.6)])
    series = {
        "mbe_normalized": noisy(np.concatenate([1 + rise, 1 + fall]), 0.005, 1),
        "alignment_weight": noisy(np.concatenate([np.full(120, 0.3), np.full(120, -0.3)]), 0.05, 2),
        "mi_input_1": noisy(inputs, 0.005, 3),
        "mi_output_1": noisy(outputs, 0.005, 4),
        "optimality": noisy(np.concatenate([0.2 + 0.5 * rise, np.full(120, 0.7)]), 0.005, 5),
    }
    rows = [{name: figures[index] for name, figures in series.items()} for index in range(240)]
    _, trends, events = fold(rows)
    told = [(event.kind, event.evidence.get("before"), event.step) for event in events]
    regimes = [event.regime for event in events if event.kind == "regime"]
    assert [name for name in regimes if name != "undetermined"] == ["memorizing", "compressing"]
    signs = [event.score for event in events if event.kind == "sign" and event.score]
    assert signs == [1.0, -1.0]
    stages = [event.evidence["stage"] for event in events if event.kind == "stage"]
    assert stages[0] == "fitting"
    assert stages[-1] == "compression"
    (plateau,) = [event for event in events if event.kind == "plateau"]
    assert "stopped improving" in plateau.evidence["reason"]
    assert 900 < trends.plateau.stopped_at < 2400
    assert len({event.event_id for event in events}) == len(events), told
    found = trends.to_row()
    assert STAGES[int(found["stage"])] == "compression"
    assert found["stage_began_earliest"] <= found["stage_began"] <= found["stage_began_latest"]
    assert found["optimality_stopped"] == 1
    assert found["alignment_weight_sign"] == -1


def test_an_oscillation_faster_than_the_sampling_is_alerted_once():
    swing = [{"alignment_weight": RunFigure(0.4 * (-1) ** index, 0.02)} for index in range(200)]
    _, trends, events = fold(swing)
    (alert,) = [event for event in events if event.kind == "alert"]
    assert "undersampled: optimizer-scale oscillation" in alert.evidence["reason"]
    assert trends.to_row()["alignment_weight_undersampled"] == 1


def test_a_cycle_is_claimed_with_its_period_and_chance():
    steps = np.arange(1500)
    wave = noisy(0.3 * np.sin(2 * math.pi * steps / 100), 0.1)
    _, trends, events = fold([{"alignment_weight": figure} for figure in wave])
    (cycle,) = [event for event in events if event.kind == "cycle"]
    assert cycle.score < 0.01
    assert abs(trends.to_row()["cycle_period_steps"] - 1000) < 100


def test_layers_that_are_blanked_for_a_while_do_not_turn_the_sign_of_the_mean():
    """Four layers of constant alignment, mean -0.1; steering leaves two undetermined in every second phase."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(1200):
        layers = (-0.5, -0.2, 0.1, 0.2)
        seen = layers[2:] if index // 200 % 2 else layers
        value = float(np.mean(seen) + 0.05 * rng.standard_normal())
        rows.append({"alignment_weight": RunFigure(value, 0.05, len(seen))})
    _, _, events = fold(rows)
    signs = {event.score for event in events if event.kind == "sign"}
    assert -1.0 in signs
    assert 1.0 not in signs
    assert not [event for event in events if event.kind == "cycle"]


def test_a_plateau_is_told_only_after_eight_windows():
    flat = [{"optimality": RunFigure(0.5, 0.01)} for _ in range(60)]
    told = {windows: fold(flat, window_samples=windows)[2] for windows in (4, 10)}
    assert [event.kind for event in told[4]] == ["plateau"]
    assert 32 * 10 <= told[4][0].step < 48 * 10
    assert told[10] == []


def test_a_figure_that_no_model_has_is_taken_as_missing():
    rows = [{name: RunFigure(1e200, 0.1, 1) for name in FIGURES} for _ in range(80)]
    assert fold(rows)[2] == []
