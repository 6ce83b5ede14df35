import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from scipy.stats import binom, norm

from entropy_monitor.errors import ConfigError
from entropy_monitor.rows import state_from_row, state_to_row
from entropy_monitor.watcher.detectors.flips import FlipOptions
from entropy_monitor.watcher.detectors.sign import SignOptions, SignState, accumulate, update_sign

OPTIONS = SignOptions()
NERVOUS = SignOptions(threshold=2.0, min_samples=2, max_missing=3, level_samples=2, noise_samples=3)
SAMPLES = st.lists(st.floats(-1, 1) | st.just(math.nan), min_size=1, max_size=60)


def conclusions(values, std_error=1.0, options=OPTIONS):
    state, found = SignState(), []
    for step, value in enumerate(values):
        state, conclusion = update_sign(state, 5 * step, float(value), std_error, options)
        found.append(conclusion)
    return found


def signs(values, std_error=1.0, options=OPTIONS):
    return np.array([found.sign for found in conclusions(values, std_error, options)])


def ar1(seed, num_samples, coefficient):
    shocks = np.random.default_rng(seed).standard_normal(num_samples + 100) * math.sqrt(1 - coefficient**2)
    return lfilter([1.0], [1.0, -coefficient], shocks)[100:]


def run_length_by_markov_chain(mean, num_states=800):
    """Average run length of the one-sided sum for normal samples (D. Brook and D. A. Evans, Biometrika 59, 1972)."""
    width = OPTIONS.threshold / (num_states - 0.5)
    sums = width * np.arange(num_states)

    def reaches(bound):
        # The clipped sample is at most x: what was clipped stands at the clip.
        shift = bound[None, :] - sums[:, None] + OPTIONS.drift
        below = norm.cdf(shift - mean)
        return np.where(shift >= OPTIONS.clip, 1.0, np.where(shift < -OPTIONS.clip, 0.0, below))

    edges = reaches(sums + width / 2)
    moves = np.diff(edges, axis=1, prepend=0.0)
    return float(np.linalg.solve(np.eye(num_states) - moves, np.ones(num_states))[0])


def siegmund_run_length(mean):
    """D. Siegmund, Sequential Analysis, 1985: the threshold raised by 1.166 for what a sum overshoots it."""
    drift, bound = mean - OPTIONS.drift, OPTIONS.threshold + 1.166
    return (math.exp(-2 * drift * bound) + 2 * drift * bound - 1) / (2 * drift**2)


@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0, 2.0])
def test_run_lengths_are_within_a_fifth_of_both_theories(mean):
    num_runs = 300
    lengths = np.zeros(num_runs)
    rng = np.random.default_rng(0)
    for run in range(num_runs):
        upward = downward = 0.0
        while upward <= OPTIONS.threshold:
            upward, downward = accumulate(upward, downward, mean + rng.standard_normal(), -1, OPTIONS)
            lengths[run] += 1
            assert downward == 0.0
    expected = run_length_by_markov_chain(mean)
    assert siegmund_run_length(mean) == pytest.approx(expected, rel=0.15)
    # A run length in control is nearly exponential: its mean over 300 runs is known to 6 %, at 3 sd 17 %.
    assert np.mean(lengths) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("mean", [0.0, 0.5, -0.5, 1.0, -1.0])
def test_white_noise_raises_less_than_one_false_alarm_in_a_thousand(mean):
    num_false = 0
    for seed in range(20):
        found = signs(mean + ar1(seed, 2000, 0.0))
        changes = np.flatnonzero(np.diff(found)) + 1
        num_false += int(np.sum(found[changes] != np.sign(mean)))
    # 40,000 samples: 1 in 1000 are 40, and more than 59 of them are met in one of a thousand tests.
    assert num_false <= binom.ppf(0.999, 40_000, 0.001)


def test_learned_correlation_takes_most_false_alarms_away():
    learned = stated = 0
    for seed in range(20):
        noise = ar1(seed, 2000, 0.5)
        learned += np.count_nonzero(np.diff(signs(noise)))
        sums, sign = (0.0, 0.0), 0
        for z in noise.tolist():
            sums = accumulate(*sums, z, sign, OPTIONS)
            if max(sums) > OPTIONS.threshold:
                sign, sums, stated = (1 if sums[0] > sums[1] else -1), (0.0, 0.0), stated + 1
    assert 0 < learned < stated / 2


@pytest.mark.parametrize(("amplitude", "longest"), [(0.5, 40), (1.0, 20), (2.0, 12)])
def test_a_turn_is_seen_after_few_samples(amplitude, longest):
    delays = []
    for seed in range(20):
        found = signs(amplitude * np.repeat([1.0, -1.0], 100) + ar1(seed, 200, 0.0))
        if found[99] == 1:
            delays.append(np.argmax(found[100:] == -1) + 1 if -1 in found[100:] else 100)
    assert len(delays) >= 15
    assert np.median(delays) <= longest


@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_errors_stated_too_small_are_learned(scale):
    num_alarms = sum(np.count_nonzero(np.diff(signs(scale * ar1(seed, 2000, 0.0)))) for seed in range(10))
    stated = 20_000 / run_length_by_markov_chain(0.0)
    # The same noise with its errors right raises about `stated` alarms a side.
    assert num_alarms <= binom.ppf(0.999, 20_000, 4 * stated / 20_000)


def test_nothing_is_named_before_enough_samples():
    found = signs([0.5] * 30, std_error=0.01)
    assert set(found[: OPTIONS.min_samples - 1]) == {0}
    assert found[OPTIONS.min_samples - 1] == 1


def test_a_sample_has_a_sign_beyond_two_standard_errors_only():
    assert [found.sample_sign for found in conclusions([0.19, -0.19, 0.21, -0.21, math.nan], 0.1)] == [0, 0, 1, -1, 0]


def test_flips_of_the_optimizer_warn_and_noise_does_not():
    oscillation = np.sin(2 * np.pi * np.arange(400) / 5.07 + 0.3)
    rng = np.random.default_rng(1)
    found = conclusions(oscillation + 0.1 * rng.standard_normal(400), 0.1)
    flips = np.mean(np.diff(np.sign(oscillation)) != 0)
    assert not any(sample.is_undersampled for sample in found[: OPTIONS.flips.min_samples - 1])
    assert all(sample.is_undersampled for sample in found[100:])
    assert found[-1].flip_fraction == pytest.approx(flips, abs=0.1)
    assert not any(sample.is_undersampled for sample in conclusions(rng.standard_normal(2000)))


def test_the_warning_has_hysteresis():
    options = SignOptions(flips=FlipOptions(smoothing_samples=100))
    alternating = [1.0, -1.0] * 100
    one_in_four = [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0] * 50
    assert not any(sample.is_undersampled for sample in conclusions(one_in_four, 0.1, options))
    warned = conclusions(alternating + one_in_four, 0.1, options)
    assert warned[199].is_undersampled
    assert warned[-1].is_undersampled
    assert not conclusions(alternating + [1.0] * 200, 0.1, options)[-1].is_undersampled


@settings(deadline=None)
@given(SAMPLES, st.data())
def test_a_detector_restarted_from_its_row_goes_on_exactly(values, data):
    cut = data.draw(st.integers(0, len(values)))
    whole = parted = SignState()
    for step, value in enumerate(values):
        if step == cut:
            parted = state_from_row(SignState, {**state_to_row(parted, "sign_"), "ce": 1.0}, "sign_")
        whole, expected = update_sign(whole, step, value, 0.1, NERVOUS)
        parted, found = update_sign(parted, step, value, 0.1, NERVOUS)
        assert found == expected
    assert parted == whole


@settings(deadline=None)
@given(SAMPLES)
def test_values_of_the_other_sign_give_the_other_sign(values):
    for one, other in zip(
        conclusions(values, 0.1, NERVOUS), conclusions([-value for value in values], 0.1, NERVOUS), strict=True
    ):
        assert (one.sign, one.sample_sign) == (-other.sign, -other.sample_sign)
        assert one.flip_fraction == other.flip_fraction


@settings(deadline=None)
@given(SAMPLES, st.integers(-20, 20))
def test_scale_changes_nothing(values, power):
    scale = 2.0**power
    assert conclusions([scale * value for value in values], scale * 0.1, NERVOUS) == conclusions(values, 0.1, NERVOUS)


@settings(deadline=None)
@given(SAMPLES, st.integers(0, 60))
def test_a_step_not_after_the_last_changes_nothing(values, back):
    state = SignState()
    for step, value in enumerate(values):
        state, expected = update_sign(state, step, value, 0.1, NERVOUS)
    assert update_sign(state, len(values) - 1 - back, -5.0, 0.1, NERVOUS) == (state, expected)


@pytest.mark.parametrize(
    ("value", "std_error"), [(math.nan, 1.0), (math.inf, 1.0), (5.0, math.nan), (5.0, None), (5.0, 0.0), (5.0, -1.0)]
)
def test_missing_samples_keep_the_sign_until_there_are_too_many(value, std_error):
    state = SignState()
    for step in range(30):
        state, found = update_sign(state, step, 5.0, 1.0, OPTIONS)
    assert found.sign == 1
    for step in range(30, 30 + OPTIONS.max_missing - 1):
        state, found = update_sign(state, step, value, std_error, OPTIONS)
        assert found.sign == 1
    state, found = update_sign(state, 99, value, std_error, OPTIONS)
    assert found.sign == 0
    assert state.num_samples == 0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=20), st.floats(0, 1e300))
def test_no_value_breaks_the_state(values, std_error):
    found = conclusions([*values, *[1.0] * 60], std_error=0.1)
    assert found[-1].sign == 1
    state = SignState()
    for step, value in enumerate(values):
        state, _ = update_sign(state, step, value, std_error, OPTIONS)
    assert all(math.isfinite(number) for number in state_to_row(state, "sign_").values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("drift", 0),
        ("threshold", math.inf),
        ("clip", 0.1),
        ("noise_samples", 1),
        ("max_missing", 0),
        ("sample_errors", -1),
    ],
)
def test_a_wrong_option_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected .*found {value}"):
        SignOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("smoothing_samples", 1), ("min_samples", 1), ("enter", 1), ("leave", 0.4)]
)
def test_a_wrong_option_of_the_warning_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected .*found {value}"):
        FlipOptions(**{name: value})
