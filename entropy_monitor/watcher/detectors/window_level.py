"""Level of estimates over a sliding window, with its standard error, their overlap taken into account. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

_CAP = 16.0
"""Squares count for at most so many times the mean square, four standard deviations: one jump must not blind."""
_NOISE_WINDOWS = 8
"""Windows over which the noise is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowLevel:
    """What is known of a series of estimates whose windows overlap; numbers only."""

    num_samples: int = 0
    level: float = math.nan
    """EMA of the estimate over one window's length; it trails the estimates by about as many samples."""
    last: float = math.nan
    """Last estimate."""
    last_change: float = math.nan
    """Last estimate less the one before."""
    square: float = math.nan
    """Smoothed square of the change of ``last_change``."""


def update_level(state: WindowLevel, value: float, std_error: float | None, correlation_samples: int) -> WindowLevel:
    """Take in one estimate.

    Args:
        state: what the last call returned, or ``WindowLevel()``.
        value: the estimate, finite.
        std_error: its stated standard error; None or NaN where unknown.
        correlation_samples: samples in the window.

    Returns:
        The new state.
    """
    change = value - state.last
    return WindowLevel(
        num_samples=state.num_samples + 1,
        level=state.level + (value - state.level) / correlation_samples if state.num_samples else value,
        last=value,
        last_change=change,
        square=_learn(state, change, std_error, correlation_samples),
    )


def level_error(state: WindowLevel, std_error: float | None, correlation_samples: int) -> float:
    """Give the standard error of ``level``: the stated one, or the one learned where that is larger or none is stated.

    The mean of a window of n white samples of variance v has variance ``v / n``. Moving the window by one sample
    replaces one of them, so that the change of the mean has variance ``2 v / n^2``, and the change of that change
    ``4 v / n^2``, in which a steady trend no longer shows: the variance of an estimate is ``n / 4`` times the latter.
    For estimates that are independent after all (n = 1) this is 1.5 times the truth. The level's error is smaller than
    an estimate's by `level_error_ratio`.

    Returns:
        In the unit of the values; 0 where it is unknown.
    """
    learned = 0.0
    if state.num_samples > correlation_samples and not math.isnan(state.square):
        learned = math.sqrt(state.square * correlation_samples / 4)
    stated = std_error if std_error is not None and math.isfinite(std_error) else 0.0
    return max(stated, learned) * level_error_ratio(correlation_samples)


@cache
def level_error_ratio(correlation_samples: int) -> float:
    """Give the standard deviation of the EMA of weight ``a = 1 / n`` over that of the estimates it is made of.

    Estimates k samples apart share ``1 - k / n`` of their window. An EMA of a series of autocorrelation r has the
    variance ``a / (2 - a) (1 + 2 sum_k r_k (1 - a)^k)`` times the series'.

    Returns:
        1 for n = 1, and 0.61 for large n.
    """
    num, weight = correlation_samples, 1 / correlation_samples
    total = 1 + 2 * sum((1 - lag / num) * (1 - weight) ** lag for lag in range(1, num))
    return math.sqrt(weight / (2 - weight) * total)


def _learn(state: WindowLevel, change: float, std_error: float | None, correlation_samples: int) -> float:
    square, second = state.square, (change - state.last_change) ** 2
    weight = 1 / (_NOISE_WINDOWS * correlation_samples)
    if std_error is None or not 0 < std_error < math.inf:
        # Nothing to begin from: a plain mean at first, of which the first change of a change is the third estimate's.
        weight = max(weight, 1 / max(state.num_samples - 1, 1))
    elif math.isnan(square):
        square = 4 * std_error**2 / correlation_samples
    if math.isnan(second) or math.isnan(square):
        return square if math.isnan(second) else second
    return square + weight * (min(second, _CAP * square) - square)
