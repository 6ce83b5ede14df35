import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter

from entropy_monitor.errors import ConfigError
from entropy_monitor.rows import state_from_row, state_to_row
from entropy_monitor.watcher.detectors.ladder import Ladder, climb, first_above
from entropy_monitor.watcher.detectors.plateau import (
    PlateauOptions,
    PlateauState,
    describe_plateau,
    update_plateau,
)

OPTIONS = PlateauOptions()
WINDOW = OPTIONS.correlation_samples
NERVOUS = PlateauOptions(correlation_samples=2, patience=4, errors=1.0)
SAMPLES = st.lists(st.floats(-1, 1) | st.just(math.nan), min_size=1, max_size=60)
TIME = np.arange(1500)


def conclusions(values, std_error=1.0, options=OPTIONS, every=1):
    state, found = PlateauState(), []
    for index, value in enumerate(values):
        state, conclusion = update_plateau(state, every * index, float(value), std_error, options)
        found.append(conclusion)
    return found


def window_noise(seed, num_samples=1500):
    """Means of variance 1 over a sliding window."""
    shocks = np.random.default_rng(seed).standard_normal(num_samples + WINDOW) / math.sqrt(WINDOW)
    return lfilter(np.ones(WINDOW), [1.0], shocks)[WINDOW:]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=60), st.floats(0.5, 3), st.floats(0, 1))
def test_the_ladder_knows_when_the_series_was_first_so_high(values, spacing, part):
    ladder = Ladder()
    for index, value in enumerate(values):
        ladder = climb(ladder, value, 10 * index, index, spacing)
    best = max(values)
    # Sixteen records reach down by fifteen spacings, unless the series never was so low.
    bar = max(best - 15 * spacing, best - spacing - part * 10)
    step, sample = first_above(ladder, bar)
    assert values[sample] >= bar
    assert step == 10 * sample
    # Nothing before it was higher than the bar by more than the records' distance.
    assert all(value <= bar + spacing for value in values[:sample])
    assert first_above(ladder, best + 1) is None


def test_a_series_that_stays_is_stopped_where_it_reached_its_level():
    stopped = []
    for seed in range(10):
        found = conclusions(20 * np.minimum(TIME / 600, 1) + window_noise(seed), every=10)
        assert not any(sample.is_stopped for sample in found[:600])
        end = found[-1]
        assert end.is_stopped
        assert end.earliest <= end.stopped_at <= end.best_step <= end.latest
        assert end.latest > 10 * 1000
        stopped.append(end.stopped_at)
    # The level trails by a window; on the plateau noise sets new records.
    assert 10 * 550 < np.median(stopped) < 10 * 800


def test_a_series_that_falls_again_is_stopped_at_its_top():
    tent = 20 * np.minimum(TIME / 600, 1) - 15 * np.maximum(0, (TIME - 600) / 900)
    ends = [conclusions(tent + window_noise(seed))[-1] for seed in range(10)]
    assert all(end.is_stopped for end in ends)
    assert sum(end.earliest <= 600 + WINDOW <= end.latest for end in ends) >= 9
    assert all(end.latest < 900 for end in ends)
    assert np.median([end.stopped_at for end in ends]) == pytest.approx(600, abs=80)


def test_a_series_that_improves_is_not_stopped():
    for seed in range(5):
        assert not any(sample.is_stopped for sample in conclusions(0.04 * TIME + window_noise(seed)))


def test_a_constant_series_is_stopped_after_the_patience():
    for seed in range(5):
        found = [sample.is_stopped for sample in conclusions(window_noise(seed))]
        assert WINDOW + OPTIONS.patience - 1 <= found.index(True) <= 3 * OPTIONS.patience
        assert found[-1]


def test_a_later_improvement_takes_the_advice_back():
    found = conclusions(10.0 * (TIME > 1000) + window_noise(0))
    assert found[1000].is_stopped
    assert not found[1100].is_stopped
    assert found[1100].earliest > 1000


def test_without_a_stated_error_it_is_learned():
    for std_error in (None, math.nan):
        found = conclusions(20 * np.minimum(TIME / 600, 1) + window_noise(0), std_error)
        assert found[-1].is_stopped
        assert 0.4 < found[-1].best_error < 0.9


def test_the_advice_is_put_into_words():
    found = conclusions(20 * np.minimum(TIME / 600, 1) + window_noise(0))
    assert describe_plateau(found[0]) == "optimality: undetermined, not measured"
    assert describe_plateau(found[500]).startswith("optimality may still improve: best ")
    end = found[-1]
    words = describe_plateau(end, "score")
    assert words.startswith(f"score stopped improving at step {end.stopped_at}: steps {end.earliest} to {end.latest}")
    assert words.endswith("consider stopping, or keep a checkpoint from there")


@settings(deadline=None)
@given(SAMPLES, st.sampled_from([0.1, None, math.nan]), st.data())
def test_a_detector_restarted_from_its_row_goes_on_exactly(values, std_error, data):
    cut = data.draw(st.integers(0, len(values)))
    whole = parted = PlateauState()
    for step, value in enumerate(values):
        if step == cut:
            parted = state_from_row(PlateauState, {**state_to_row(parted, "plateau_"), "ce": 1.0}, "plateau_")
        whole, expected = update_plateau(whole, step, value, std_error, NERVOUS)
        parted, found = update_plateau(parted, step, value, std_error, NERVOUS)
        assert repr(found) == repr(expected)
    assert repr(parted) == repr(whole)


@settings(deadline=None)
@given(SAMPLES, st.integers(-20, 20))
def test_another_unit_changes_no_step(values, power):
    def steps(found):
        return [(sample.is_stopped, sample.stopped_at, sample.earliest, sample.latest) for sample in found]

    scaled = conclusions([2.0**power * value for value in values], 2.0**power * 0.1, NERVOUS)
    assert steps(scaled) == steps(conclusions(values, 0.1, NERVOUS))


@settings(deadline=None)
@given(SAMPLES, st.integers(0, 60))
def test_a_step_not_after_the_last_changes_nothing(values, back):
    state = PlateauState()
    for step, value in enumerate(values):
        state, expected = update_plateau(state, step, value, 0.1, NERVOUS)
    again, found = update_plateau(state, len(values) - 1 - back, 5.0, 0.1, NERVOUS)
    assert again is state
    assert repr(found) == repr(expected)


@settings(deadline=None)
@given(SAMPLES)
def test_missing_values_change_nothing_but_the_step(values):
    finite = [value for value in values if math.isfinite(value)]
    with_gaps, without = PlateauState(), PlateauState()
    kept = 0
    for step, value in enumerate(values):
        with_gaps, found = update_plateau(with_gaps, step, value, 0.1, NERVOUS)
        kept += math.isfinite(value)
    for value, step in zip(finite, [i for i, value in enumerate(values) if math.isfinite(value)], strict=True):
        without, expected = update_plateau(without, step, value, 0.1, NERVOUS)
    if finite:
        assert repr(found) == repr(expected)
    assert with_gaps.last_step == len(values) - 1
    assert with_gaps.level.num_samples == kept


@pytest.mark.parametrize(
    ("name", "value"), [("correlation_samples", 0), ("patience", 31), ("errors", 0.5), ("errors", 4)]
)
def test_a_wrong_option_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected .*found {value}"):
        PlateauOptions(**{name: value})
