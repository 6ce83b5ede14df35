"""Noise of a series about a level that may turn at any time, its correlation included. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

_MAX_CORRELATION = 0.9
"""Noise that is correlated more closely than this cannot be told from a turn within the window that learns it."""
_CAP = 16.0
"""Squares count for at most so many times the mean square, four standard deviations: one outlier must not blind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRunNoise:
    """What is known of the noise, in units of the stated standard error. It begins as white noise of variance 1."""

    num_samples: int = 0
    level: float = 0.0
    """EMA of the value."""
    residual: float = 0.0
    """Last value less the level before it."""
    variance: float = 1.0
    """Smoothed square of ``residual``."""
    covariance: float = 0.0
    """Smoothed product of ``residual`` and the one before."""
    last: float = 0.0
    second_last: float = 0.0
    change: float = 2.0
    """Smoothed square of the change between neighbours."""
    change_of_two: float = 2.0
    """Smoothed square of the change between a value and the last but one."""


def learn_noise(noise: LongRunNoise, value: float, level_samples: int, noise_samples: int) -> LongRunNoise:
    """Take in one value.

    Args:
        noise: what the last call returned, or ``LongRunNoise()``.
        value: in units of its stated standard error.
        level_samples: samples over which the level is averaged.
        noise_samples: samples over which squares are averaged.

    Returns:
        The new state.
    """
    count = noise.num_samples + 1
    if count == 1:
        return replace(noise, num_samples=1, level=value, last=value)
    weight = 1 / noise_samples
    bound = (_CAP * noise.variance) ** 0.5
    residual = min(max(value - noise.level, -bound), bound)
    change = min((value - noise.last) ** 2, _CAP * noise.change)
    change_of_two = noise.change_of_two if count == 2 else min((value - noise.second_last) ** 2, _CAP * noise.change)
    return LongRunNoise(
        num_samples=count,
        level=noise.level + max(1 / level_samples, 1 / count) * (value - noise.level),
        residual=residual,
        variance=noise.variance + weight * (residual**2 - noise.variance),
        covariance=noise.covariance + weight * (residual * noise.residual - noise.covariance),
        last=value,
        second_last=noise.last,
        change=noise.change + weight * (change - noise.change),
        change_of_two=noise.change_of_two + weight * (change_of_two - noise.change_of_two),
    )


def long_run_variance(noise: LongRunNoise) -> float:
    """Give n times the variance of a mean of n values, for large n: ``v (1 + r) / (1 - r)`` for AR(1) noise.

    v and r are learned twice, and the smaller result counts. From residuals about the level: these overrate the noise
    after a turn, until the level has followed. From changes between neighbours, ``E (x_t - x_t-1)^2 = 2 v (1 - r)``,
    and between next but one neighbours, ``2 v (1 - r^2)``: a turn hardly touches these, but a fast oscillation makes
    them overrate the noise.

    Returns:
        The variance in units of the squared stated standard error, at least 1: errors are never taken to be overstated.
    """
    by_residuals = _ar1_variance(noise.variance, noise.covariance / noise.variance)
    correlation = _bounded(noise.change_of_two / noise.change - 1)
    by_changes = _ar1_variance(noise.change / (2 * (1 - correlation)), correlation)
    return max(1.0, min(by_residuals, by_changes))


def _ar1_variance(variance: float, correlation: float) -> float:
    correlation = _bounded(correlation)
    return variance * (1 + correlation) / (1 - correlation)


def _bounded(correlation: float) -> float:
    return min(max(correlation, -_MAX_CORRELATION), _MAX_CORRELATION)
