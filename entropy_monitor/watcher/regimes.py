"""Observed regime: the direction of row-normalised MBE, told from its noise. Pure: no clock, no file."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from entropy_monitor.errors import ConfigError
from entropy_monitor.types import REGIMES, Regime

_JUMP_SPREAD = 3.0
"""Standard deviations that a jump counts for when the noise is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegimeOptions:
    """How slow, and how sure, the detector is.

    Raises:
        ConfigError: a value is out of range.
    """

    smoothing_samples: int = 10
    """Samples over which level and slope are averaged (the inverse weight of a new sample)."""
    noise_samples: int = 50
    """Samples over which the noise is learned."""
    min_samples: int = 30
    """Samples before a regime is named."""
    enter: float = 4.0
    """Slope, in standard errors, at which a regime is entered."""
    leave: float = 1.5
    """Slope, in standard errors, below which it is left."""
    min_slope: float = 1e-6
    """Slope, in nats a sample, below which nothing moves, however small the noise."""
    jump: float = 8.0
    """Distance from the running line, in standard deviations, beyond which the line begins again."""
    max_missing: int = 5
    """Undetermined samples in a row after which the detector starts afresh."""

    def __post_init__(self) -> None:
        rules = {
            "smoothing_samples": (self.smoothing_samples >= 2, "at least 2"),
            "noise_samples": (self.noise_samples >= 2, "at least 2"),
            "min_samples": (self.min_samples >= 3, "at least 3"),
            "enter": (0 < self.enter < math.inf, "a positive number"),
            "leave": (0 <= self.leave <= self.enter, "0 to enter"),
            "min_slope": (0 <= self.min_slope < math.inf, "0 or a positive number"),
            "jump": (self.jump > 1, "more than 1"),
            "max_missing": (self.max_missing >= 1, "at least 1"),
        }
        for name, (valid, expected) in rules.items():
            if not valid:
                raise ConfigError(
                    f"{name}: expected {expected}, found {getattr(self, name)}: leave it out for the default"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class RegimeState:
    """All that the detector remembers; numbers only, so that it round-trips through a row of float64."""

    last_step: int = -1
    num_samples: int = 0
    """Samples seen since the start or the last restart."""
    num_missing: int = 0
    """Undetermined samples in a row."""
    regime: int = 0
    """Code of the regime: 0 undetermined, 1 memorizing, 2 compressing."""
    level: float = math.nan
    """EMA of the value, nats."""
    slope: float = 0.0
    """EMA of the change of ``level``, nats a sample."""
    residual: float = 0.0
    """Last sample less its forecast."""
    variance: float = 0.0
    """Smoothed square of ``residual``."""
    covariance: float = 0.0
    """Smoothed product of ``residual`` and the one before."""
    measurement_variance: float = 0.0
    """Smoothed square of the standard errors given."""


def update_regime(
    state: RegimeState, step: int, value: float, std_error: float | None, options: RegimeOptions
) -> tuple[RegimeState, Regime]:
    """Take in one sample of row-normalised MBE and name the regime: rising is memorizing, falling is compressing.

    The slope is an EMA of the change of an EMA. For white noise of variance v and weight ``a = 1 / smoothing_samples``
    its standard error is ``sqrt(2 v (a / (2 - a))^3)``. v is learned from the residuals about the running line, so that
    a trend does not count as noise; it is raised by ``(1 + r) / (1 - r)`` for a positive lag-1 correlation r of theirs,
    as slow noise feigns slopes, and is never taken below the measurement's own variance. Farther than ``jump`` standard
    deviations from the line, the line begins again at the sample.

    A regime is entered at ``enter`` standard errors and kept until the slope falls below ``leave``; then, as before
    ``min_samples``, it is undetermined. A value that is not finite leaves the regime as it is, and ``max_missing`` of
    them in a row make a new start. A step not after the last one (a correction of an old row) changes nothing. Samples
    count equally, whatever steps lie between them.

    Args:
        state: what the last call returned, or ``RegimeState()``.
        step: optimizer step of the sample.
        value: row-normalised MBE, nats.
        std_error: its standard error; None or NaN where unknown.
        options: `RegimeOptions`.

    Returns:
        The new state, and the regime.
    """
    if step <= state.last_step:
        return state, REGIMES[state.regime]
    if not math.isfinite(value):
        missing = replace(state, last_step=step, num_missing=state.num_missing + 1)
        if missing.num_missing >= options.max_missing:
            missing = RegimeState(last_step=step, num_missing=missing.num_missing)
        return missing, REGIMES[missing.regime]
    state = replace(_learn(state, value, std_error, options), last_step=step, num_missing=0)
    state = replace(state, regime=REGIMES.index(_judge(state, options)))
    return state, REGIMES[state.regime]


def slope_std_error(state: RegimeState, options: RegimeOptions) -> float:
    """Give the standard error of ``state.slope``; see `update_regime`.

    Returns:
        Nats a sample.
    """
    # Correlations above 0.9 cannot be told from a trend within the window of the noise.
    correlation = min(max(state.covariance / state.variance, 0.0), 0.9) if state.variance else 0.0
    variance = max(state.variance * (1 + correlation) / (1 - correlation), state.measurement_variance)
    return math.sqrt(2 * variance / (2 * options.smoothing_samples - 1) ** 3)


def _learn(state: RegimeState, value: float, std_error: float | None, options: RegimeOptions) -> RegimeState:
    count = state.num_samples + 1
    if count == 1:
        return replace(state, num_samples=1, level=value)
    # Plain means at first: an EMA would keep the first sample's noise for long.
    weight = max(1 / options.smoothing_samples, 1 / count)
    square = std_error**2 if std_error is not None and math.isfinite(std_error) else state.measurement_variance
    # Known errors are what the noise starts from. Without them its first samples are a plain mean.
    known = square > 0
    noise_weight = 1 / options.noise_samples if known else max(1 / options.noise_samples, 1 / (count - 1))
    variance = square if known and count == 2 else state.variance
    noise = math.sqrt(max(variance, square))
    level = state.level + weight * (value - state.level)
    slope = state.slope + weight * (level - state.level - state.slope)
    # The level lags behind a line by slope / weight.
    residual = value - state.level - state.slope / weight
    if noise and abs(residual) > options.jump * noise:
        # A jump, such as the fall at the start of training, is neither noise nor trend: begin again where it led. Noise
        # grows a little, so that errors stated far too small do not make a jump of every sample for ever.
        level, slope, residual = value, 0.0, 0.0
        spread = (_JUMP_SPREAD * noise) ** 2
    else:
        spread = residual**2
    return replace(
        state,
        num_samples=count,
        level=level,
        slope=slope,
        residual=residual,
        variance=variance + noise_weight * (spread - variance),
        covariance=state.covariance + noise_weight * (residual * state.residual - state.covariance),
        measurement_variance=state.measurement_variance + noise_weight * (square - state.measurement_variance),
    )


def _judge(state: RegimeState, options: RegimeOptions) -> Regime:
    if state.num_samples < options.min_samples:
        return "undetermined"
    direction: Regime = "memorizing" if state.slope > 0 else "compressing"
    bar = options.leave if direction == REGIMES[state.regime] else options.enter
    if abs(state.slope) > max(bar * slope_std_error(state, options), options.min_slope):
        return direction
    return "undetermined"
