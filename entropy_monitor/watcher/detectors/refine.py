"""Period of a claimed cycle with its standard error, from the stored series. Offline: not part of the online state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_SEARCHED = 0.15
"""Fraction of the frequency searched on either side: twice the spacing of the bank's periods."""
_OVERSAMPLING = 20
"""Frequencies tried in one resolution width, the inverse of the time observed."""
_MIN_VALUES = 8


def refine_period(steps: ArrayLike, values: ArrayLike, near: float) -> tuple[float, float]:
    """Find the period of a cycle and its error by the Lomb-Scargle periodogram (J. D. Scargle, ApJ 263, 1982).

    The standard error is that of a sine in noise, ``sqrt(6 S / n) / (pi T A)`` for the frequency (D. C. Rife and R. R.
    Boorstyn, IEEE Trans. IT 20, 1974): n values over a time T, amplitude A, and S the noise's power at that frequency,
    by the AR(1) model of what remains without the sine. A cycle whose period drifts is less well known than that.

    Args:
        steps: optimizer steps of the samples, shape ``(n,)``, rising; they may be unevenly spaced.
        values: the series, shape ``(n,)``; values that are not finite are left out.
        near: about which period to search, in steps, such as `PeriodConclusion.period_steps`; 15 % on either side.

    Returns:
        The period and its standard error, in steps; both NaN when fewer than 8 values are finite, these span less than
        one such period, they are constant, or the power has no maximum within the search.

    Raises:
        ValueError: the shapes differ, or ``near`` is not a positive number.
    """
    steps_N, values_N = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if steps_N.shape != values_N.shape or steps_N.ndim != 1:
        raise ValueError(
            f"steps, values: expected one dimension and equal lengths, found {steps_N.shape} and {values_N.shape}: "
            "pass one value a step"
        )
    if not 0 < near < math.inf:
        raise ValueError(f"near: expected a positive number, found {near}: pass the period that the bank found")
    is_finite_N = np.isfinite(values_N)
    steps_N, values_N = steps_N[is_finite_N], values_N[is_finite_N]
    if len(steps_N) < _MIN_VALUES or np.ptp(steps_N) < near or np.ptp(values_N) == 0:
        return math.nan, math.nan
    frequency = _strongest_frequency(steps_N, values_N - values_N.mean(), near)
    if math.isnan(frequency):
        return math.nan, math.nan
    amplitude, residuals_N = _fit_sine(steps_N, values_N, frequency)
    noise_power = _ar1_power(residuals_N, frequency * float(np.median(np.diff(steps_N))))
    time = float(np.ptp(steps_N))
    frequency_error = math.sqrt(6 * noise_power / len(steps_N)) / (math.pi * time * amplitude)
    return 1 / frequency, frequency_error / frequency**2


def _strongest_frequency(steps_N: NDArray[np.float64], values_N: NDArray[np.float64], near: float) -> float:
    from scipy.signal import lombscargle

    low, high = (1 - _SEARCHED) / near, (1 + _SEARCHED) / near
    num_frequencies = max(int(_OVERSAMPLING * (high - low) * float(np.ptp(steps_N))), 3)
    frequencies = np.linspace(low, high, num_frequencies)
    power = np.asarray(lombscargle(steps_N, values_N, 2 * math.pi * frequencies))
    top = int(np.argmax(power))
    if not 0 < top < num_frequencies - 1:
        return math.nan
    below, at, above = (float(power[place]) for place in (top - 1, top, top + 1))
    offset = (below - above) / (2 * (below - 2 * at + above))
    return float(frequencies[top] + offset * (frequencies[1] - frequencies[0]))


def _fit_sine(
    steps_N: NDArray[np.float64], values_N: NDArray[np.float64], frequency: float
) -> tuple[float, NDArray[np.float64]]:
    angles_N = 2 * math.pi * frequency * steps_N
    waves_N3 = np.stack([np.sin(angles_N), np.cos(angles_N), np.ones_like(angles_N)], axis=1)
    weights_3 = np.linalg.lstsq(waves_N3, values_N, rcond=None)[0]
    return float(np.hypot(weights_3[0], weights_3[1])), values_N - waves_N3 @ weights_3


def _ar1_power(residuals_N: NDArray[np.float64], cycles_per_sample: float) -> float:
    variance = float(np.mean(residuals_N**2))
    if variance == 0:
        return 0.0
    correlation = float(np.mean(residuals_N[1:] * residuals_N[:-1])) / variance
    turn = 1 + correlation**2 - 2 * correlation * math.cos(2 * math.pi * cycles_per_sample)
    return variance * (1 - correlation**2) / turn
