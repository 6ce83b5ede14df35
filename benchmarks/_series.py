"""Made-up series for the detectors' benchmark, and their period bank over many series at once."""

from __future__ import annotations

import numpy as np
from scipy.signal import lfilter

from entropy_monitor.watcher.detectors.bank import NUM_PERIODS, bank_periods
from entropy_monitor.watcher.detectors.period import PeriodOptions


def ar1(rng, num_series, num_samples, coefficient):
    """AR(1) noise of variance 1, shape ``(num_series, num_samples)``."""
    shocks = rng.standard_normal((num_series, num_samples + 200)) * np.sqrt(1 - coefficient**2)
    return lfilter([1.0], [1.0, -coefficient], shocks, axis=1)[:, 200:]


def moving_average(rng, num_series, num_samples, window):
    """Means over a sliding window of white noise, of variance 1."""
    shocks = rng.standard_normal((num_series, num_samples + window - 1)) / np.sqrt(window)
    return lfilter(np.ones(window), [1.0], shocks, axis=1)[:, window - 1 :]


def square_wave(num_samples, period):
    """1 and -1 in turns of half a period."""
    return np.where(np.arange(num_samples) // (period // 2) % 2 == 0, 1.0, -1.0)


def claims(series_RT, every, options=None):
    """Where `update_period` would claim a cycle, for R series at once: an independent, vectorised writing of it.

    Returns:
        Claims, shape ``(R, T)``, and the period of the highest power in samples at the end, shape ``(R,)``.
    """
    o = options or PeriodOptions()
    num_series, num_samples = series_RT.shape
    periods, rows = bank_periods(), np.arange(num_series)
    pole = np.exp((2j * np.pi - 0.25) / periods)
    mean = series_RT[:, 0].copy()
    variance, covariance, before = (np.zeros(num_series) for _ in range(3))
    bank = np.zeros((num_series, NUM_PERIODS), complex)
    candidate, standing = np.full(num_series, -1), np.zeros(num_series, int)
    is_cycle, period = np.zeros(num_series, bool), np.zeros(num_series)
    found_RT = np.zeros((num_series, num_samples), bool)
    for index in range(1, num_samples):
        deviation, count = series_RT[:, index] - mean, index + 1
        mean += deviation * max(1 / o.noise_samples, 1 / count)
        weight = max(1 / o.noise_samples, 1 / index)
        variance += weight * (deviation**2 - variance)
        covariance += weight * (deviation * before - covariance)
        correlation = covariance / variance
        correlation = np.clip(correlation + (1 + 4 * correlation) / min(count, 2 * o.noise_samples), -0.98, 0.98)
        innovation = (deviation - correlation * before) / np.sqrt(variance * (1 - correlation**2))
        before = deviation
        if count <= o.warmup_samples:
            continue
        bank = pole * bank + np.clip(innovation, -4, 4)[:, None]
        leak = np.abs(pole) ** 2
        power = np.abs(bank) ** 2 * (1 - leak) / (1 - leak ** (count - o.warmup_samples))
        eligible = (periods * o.min_periods <= count) & (periods * every >= o.min_period_steps)
        place = np.argmax(np.where(eligible, power, -1), axis=1)
        height = power[rows, place]
        longer, shorter = power[rows, np.maximum(place - 1, 0)], power[rows, np.minimum(place + 1, NUM_PERIODS - 1)]
        is_peak = eligible[place] & (place > 0) & (place < NUM_PERIODS - 1) & (height > longer) & (height > shorter)
        log_alarm = np.where(is_peak, 2 * np.log(count) - height, np.inf)
        is_significant = (log_alarm < np.log(o.false_alarm)) & (count >= o.min_samples)
        is_same = is_significant & (candidate >= 0) & (abs(place - candidate) <= 2)
        standing = np.where(is_same, standing + 1, 0)
        candidate = np.where(is_significant, np.where(is_same, candidate, place), -1)
        rise, fall = np.log(height / longer), np.log(height / shorter)
        with np.errstate(invalid="ignore", divide="ignore"):  # where there is no peak
            offset = np.where(is_peak, (rise - fall) / (rise + fall) / 2, 0)
        period = periods[place] * (periods[1] / periods[0]) ** offset
        is_cycle = (is_cycle & (log_alarm < 0)) | (is_same & (standing >= o.standing_periods * period))
        found_RT[:, index] = is_cycle
    return found_RT, period
