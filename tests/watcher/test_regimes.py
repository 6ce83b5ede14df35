import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.errors import ConfigError
from entropy_monitor.rows import state_from_row, state_to_row
from entropy_monitor.watcher.regimes import RegimeOptions, RegimeState, slope_std_error, update_regime

OPTIONS = RegimeOptions()
NOISE = 0.01


def regimes(values, std_error=None, options=OPTIONS):
    state, found = RegimeState(), []
    for index, value in enumerate(values):
        state, regime = update_regime(state, 10 * index, float(value), std_error, options)
        found.append(regime)
    return found


def noise(num_samples, seed, correlation=0.0, sd=NOISE):
    rng = np.random.default_rng(seed)
    fresh = rng.standard_normal(num_samples) * sd
    values = [fresh[0]]
    for shock in fresh[1:]:
        values.append(correlation * values[-1] + math.sqrt(1 - correlation**2) * shock)
    return np.array(values)


def entries(found):
    return sum(old == "undetermined" != new for old, new in itertools.pairwise(found))


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.5])
def test_noise_is_hardly_ever_called_a_regime(correlation):
    num_entries = sum(entries(regimes(1.5 + noise(1000, seed, correlation))) for seed in range(10))
    # Under one in a thousand samples, over ten thousand.
    assert num_entries <= 3


@pytest.mark.parametrize(("sign", "regime"), [(1, "memorizing"), (-1, "compressing")])
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_a_ramp_is_named_by_its_direction_within_two_windows(sign, regime, correlation):
    delays = []
    for seed in range(10):
        found = regimes(1.5 + noise(160, seed, correlation) + sign * 0.3 * NOISE * np.maximum(np.arange(160) - 60, 0))
        assert found[:60] == ["undetermined"] * 60
        delays.append(found[60:].index(regime))
        assert set(found[100:]) == {regime}
    assert np.median(delays) <= 2 * OPTIONS.smoothing_samples


def test_a_turn_is_followed():
    ramp = np.concatenate([np.arange(100), 100 - np.arange(100)]) * 0.5 * NOISE
    found = regimes(1.0 + ramp + noise(200, seed=1))
    assert found[99] == "memorizing"
    assert found[-1] == "compressing"
    flips = [new for old, new in itertools.pairwise(found) if old != new]
    assert [flip for flip in flips if flip != "undetermined"] == ["memorizing", "compressing"]


def test_a_ramp_that_stops_is_left():
    values = 1.0 + np.minimum(np.arange(300), 100) * 0.5 * NOISE + noise(300, seed=2)
    found = regimes(values)
    assert found[99] == "memorizing"
    assert set(found[200:]) == {"undetermined"}


def test_hysteresis_keeps_a_regime_that_would_not_be_entered():
    steep, gentle = 0.5 * NOISE, 0.04 * NOISE
    slopes = np.concatenate([np.full(100, steep), np.full(60, gentle)])
    kept, never = 0, 0
    for seed in range(10):
        kept += regimes(1.0 + np.cumsum(slopes) + noise(160, seed))[130:].count("memorizing")
        never += regimes(1.0 + np.cumsum(np.full(160, gentle)) + noise(160, seed))[130:].count("memorizing")
    assert kept > 2 * never


def test_nothing_is_named_before_enough_samples():
    found = regimes(1.0 + 0.1 * np.arange(60))
    assert found[: OPTIONS.min_samples - 1] == ["undetermined"] * (OPTIONS.min_samples - 1)
    assert found[OPTIONS.min_samples - 1] == "memorizing"


def test_a_constant_is_undetermined_also_with_the_rounding_of_fp32():
    assert set(regimes([1.5] * 100)) == {"undetermined"}
    values = np.full(300, 1.5, dtype=np.float32) + np.float32(1e-7) * np.random.default_rng(0).integers(0, 2, 300)
    assert set(regimes(values)) == {"undetermined"}


def test_a_slope_within_the_measurement_error_is_not_named():
    values = 1.0 + 0.002 * np.arange(100)
    assert regimes(values)[-1] == "memorizing"
    assert set(regimes(values, std_error=0.2)) == {"undetermined"}
    assert regimes(values, std_error=math.nan) == regimes(values)


def test_stated_error_of_the_slope_matches_its_spread():
    slopes, stated = [], []
    for seed in range(200):
        state = RegimeState()
        for index, value in enumerate(1.5 + noise(150, seed)):
            state, _ = update_regime(state, index, float(value), None, OPTIONS)
        slopes.append(state.slope)
        stated.append(slope_std_error(state, OPTIONS))
    assert 0.8 < np.mean(stated) / np.std(slopes) < 1.5


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 2) | st.just(math.nan), min_size=1, max_size=80), st.data())
def test_a_detector_restarted_from_its_row_goes_on_exactly(values, data):
    options = RegimeOptions(min_samples=3, smoothing_samples=2, enter=0.5, leave=0.1, max_missing=3)
    cut = data.draw(st.integers(0, len(values)))
    whole = parted = RegimeState()
    for step, value in enumerate(values):
        if step == cut:
            row = {**state_to_row(parted, "regime_"), "ce": 1.0}
            assert all(isinstance(number, float) for number in row.values())
            parted = state_from_row(RegimeState, row, "regime_")
        whole, expected = update_regime(whole, step, value, 0.01, options)
        parted, found = update_regime(parted, step, value, 0.01, options)
        assert found == expected
    last, expected_last = (state_to_row(state, "regime_") for state in (parted, whole))
    assert {k: str(v) for k, v in last.items()} == {k: str(v) for k, v in expected_last.items()}


def ramped_state():
    state = RegimeState()
    for step in range(60):
        state, regime = update_regime(state, step, 1.0 + 0.01 * step, None, OPTIONS)
    assert regime == "memorizing"
    return state


def test_a_missing_sample_keeps_the_regime_and_many_start_afresh():
    state = ramped_state()
    for step in range(60, 60 + OPTIONS.max_missing - 1):
        state, regime = update_regime(state, step, math.nan, None, OPTIONS)
        assert regime == "memorizing"
    state, regime = update_regime(state, 99, math.inf, None, OPTIONS)
    assert regime == "undetermined"
    assert state.num_samples == 0
    state, _ = update_regime(state, 100, 1.0, None, OPTIONS)
    assert (state.num_samples, state.num_missing, state.level) == (1, 0, 1.0)


@pytest.mark.parametrize("step", [59, 0])
def test_a_correction_of_an_old_row_changes_nothing(step):
    state = ramped_state()
    assert update_regime(state, step, -5.0, None, OPTIONS) == (state, "memorizing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("smoothing_samples", 1),
        ("noise_samples", 1),
        ("min_samples", 2),
        ("enter", 0),
        ("leave", 5),
        ("min_slope", -1),
        ("max_missing", 0),
    ],
)
def test_a_wrong_option_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected .*found {value}"):
        RegimeOptions(**{name: value})


def test_a_damaged_row_is_refused():
    with pytest.raises(ValueError, match="regime_last_step: expected a whole number, found None"):
        state_from_row(RegimeState, {}, "regime_")


def test_a_steep_fall_at_the_start_does_not_blind_the_detector():
    fall = [1.5, 1.1, 0.6, 0.3, 0.15]
    ramp = 0.15 + 0.01 * np.arange(40)  # a third of a standard deviation a sample
    values = np.concatenate([fall, np.full(45, 0.15), ramp]) + noise(90, 3) * 0.03 / noise(1000, 3).std()
    named = regimes(values, std_error=0.03)
    assert set(named[40:50]) == {"undetermined"}
    assert "memorizing" in named[50:75]
    assert named[-1] == "memorizing"
