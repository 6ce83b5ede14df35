"""Innovations of a series under its running AR(1) model. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

_MAX_CORRELATION = 0.98
_CLIP = 4.0
"""Standard deviations that an innovation counts for at most: a jump must not ring in what is made of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whitening:
    """What is known of the series' mean, variance and correlation; numbers only."""

    num_values: int = 0
    mean: float = math.nan
    """EMA of the value."""
    deviation: float = 0.0
    """Last value less the mean before it; NaN after a missing one."""
    variance: float = 0.0
    """Smoothed square of ``deviation``."""
    covariance: float = 0.0
    """Smoothed product of ``deviation`` and the one before."""


def whiten(whitening: Whitening, value: float, noise_samples: int) -> tuple[Whitening, float]:
    """Take in one value.

    Args:
        whitening: what the last call returned, or ``Whitening()``.
        value: a finite number.
        noise_samples: samples over which mean, variance and correlation are learned.

    Returns:
        The new state, and the innovation in units of its standard deviation, at most 4; 0 where there is no noise.
    """
    count = whitening.num_values + 1
    if count == 1:
        return replace(whitening, num_values=1, mean=value), 0.0
    deviation = value - whitening.mean
    # Plain means at first: an EMA would keep the first samples' noise for long.
    weight = max(1 / noise_samples, 1 / (count - 1))
    variance = whitening.variance + weight * (deviation**2 - whitening.variance)
    if math.isnan(whitening.deviation):
        # Nothing is learned of the correlation: a 0 in the gap's place would make red noise look white.
        covariance = whitening.covariance * (variance / whitening.variance) if whitening.variance else 0.0
    else:
        covariance = whitening.covariance + weight * (deviation * whitening.deviation - whitening.covariance)
    fitted = replace(
        whitening,
        num_values=count,
        mean=whitening.mean + max(1 / noise_samples, 1 / count) * deviation,
        deviation=deviation,
        variance=variance,
        covariance=covariance,
    )
    correlation = ar1_coefficient(fitted, noise_samples)
    before = whitening.deviation
    if math.isnan(before):
        correlation, before = 0.0, 0.0  # nothing to forecast the value from
    spread = math.sqrt(variance * (1 - correlation**2))
    if spread == 0:
        return fitted, 0.0
    innovation = (deviation - correlation * before) / spread
    return fitted, min(max(innovation, -_CLIP), _CLIP)


def skip(whitening: Whitening) -> Whitening:
    """Pass over a missing value: the next one has nothing to be forecast from.

    Returns:
        The new state.
    """
    return replace(whitening, deviation=math.nan)


def ar1_coefficient(whitening: Whitening, noise_samples: int) -> float:
    """Give the AR(1) coefficient: the lag-1 correlation r of n values, raised by its bias ``(1 + 4 r) / n``.

    The bias (M. G. Kendall, Biometrika 41, 1954) matters: whitened too little, noise of coefficient 0.9 keeps power at
    long periods. An EMA of weight w counts for ``2 / w`` values.

    Returns:
        The coefficient, between -0.98 and 0.98; 0 without noise.
    """
    if whitening.variance == 0:
        return 0.0
    correlation = whitening.covariance / whitening.variance
    correlation += (1 + 4 * correlation) / min(whitening.num_values, 2 * noise_samples)
    return min(max(correlation, -_MAX_CORRELATION), _MAX_CORRELATION)
