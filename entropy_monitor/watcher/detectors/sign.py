"""Sign of the CE-MBE alignment, told from its noise by a two-sided CUSUM. Pure: no clock, no file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from entropy_monitor.watcher.detectors.flips import FlipOptions, Flips, count_flip
from entropy_monitor.watcher.detectors.long_run_noise import LongRunNoise, learn_noise, long_run_variance
from entropy_monitor.watcher.detectors.rules import check_options

_MAX_Z = 1e6
"""Values of more standard errors than this count for as many: their squares must stay finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignOptions:
    """How slow, and how sure, the detector is.

    Raises:
        ConfigError: a value is out of range.
    """

    drift: float = 0.25
    """Evidence that each sample must bring to count, in standard deviations of the noise."""
    threshold: float = 10.0
    """Summed evidence beyond which a sign is named, in standard deviations of the noise."""
    clip: float = 4.0
    """Evidence of a single sample at most, in standard deviations of the noise."""
    level_samples: int = 10
    """Samples over which the level is averaged, about which noise is learned."""
    noise_samples: int = 100
    """Samples over which the noise is learned."""
    min_samples: int = 10
    """Samples before a sign is named."""
    max_missing: int = 20
    """Undetermined samples in a row after which the detector starts afresh: a turn would by now have been seen."""
    sample_errors: float = 2.0
    """Standard errors beyond which a single sample has a sign."""
    flips: FlipOptions = field(default_factory=FlipOptions)
    """When the undersampling warning is given."""

    def __post_init__(self) -> None:
        check_options(
            self,
            {
                "drift": (0 < self.drift < math.inf, "a positive number"),
                "threshold": (0 < self.threshold < math.inf, "a positive number"),
                "clip": (self.drift < self.clip < math.inf, "more than drift"),
                "level_samples": (self.level_samples >= 2, "at least 2"),
                "noise_samples": (self.noise_samples >= 2, "at least 2"),
                "min_samples": (self.min_samples >= 1, "at least 1"),
                "max_missing": (self.max_missing >= 1, "at least 1"),
                "sample_errors": (0 < self.sample_errors < math.inf, "a positive number"),
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SignState:
    """All that the detector remembers; numbers only, so that it round-trips through a row of float64."""

    last_step: int = -1
    num_samples: int = 0
    """Samples seen since the start or the last restart."""
    num_missing: int = 0
    """Undetermined samples in a row."""
    sign: int = 0
    """-1 or 1, 0 while undetermined."""
    upward: float = 0.0
    """Summed evidence for a positive sign; 0 while the sign is positive."""
    downward: float = 0.0
    """Summed evidence for a negative sign; 0 while the sign is negative."""
    noise: LongRunNoise = field(default_factory=LongRunNoise)
    flips: Flips = field(default_factory=Flips)


class SignConclusion(NamedTuple):
    """What is known of the sign after a sample."""

    sign: int
    """Sign of the series: -1 or 1, 0 while undetermined."""
    sample_sign: int
    """Sign of the last sample by itself: -1 or 1, 0 within its standard errors of 0 or missing."""
    flip_fraction: float
    """Fraction of recent samples whose sign is not that of the determined sample before."""
    is_undersampled: bool
    """Whether the series is an oscillation on the optimizer's scale, faster than it is sampled."""


def update_sign(
    state: SignState, step: int, value: float, std_error: float | None, options: SignOptions
) -> tuple[SignState, SignConclusion]:
    """Take in one sample of an alignment cosine and name the sign of the series (E. S. Page, Biometrika 41, 1954).

    Two sums of evidence, ``U <- max(0, U + z - drift)`` and the same of -z, are kept while the sign is undetermined,
    the opposite one alone once it is known. A sum above ``threshold`` names its sign, and the sums begin again at 0.
    z is the value in stated standard errors over the root of the long-run variance of the noise (see
    `long_run_variance`), clipped: errors stated too small and noise correlated between samples would otherwise raise
    false alarms, 5.8 in 1000 samples instead of 1.5 at an AR(1) coefficient of 0.5.

    A value or an error that is not a finite number is a missing sample: it leaves the sign as it is, and
    ``max_missing`` of them in a row make a new start. A step not after the last one changes nothing. Samples count
    equally, whatever steps lie between them. Multiplying values and errors alike changes nothing, and values of the
    other sign give the other sign.

    Args:
        state: what the last call returned, or ``SignState()``.
        step: optimizer step of the sample.
        value: alignment, a cosine.
        std_error: its standard error, above 0; None or NaN where unknown, which makes the sample a missing one.
        options: `SignOptions`.

    Returns:
        The new state, and the conclusion.
    """
    if step <= state.last_step:
        return state, _conclude(state, options)
    if std_error is None or not (math.isfinite(value) and 0 < std_error < math.inf):
        missing = replace(state, last_step=step, num_missing=state.num_missing + 1)
        if missing.num_missing >= options.max_missing:
            missing = SignState(last_step=step, num_missing=missing.num_missing)
        return missing, _conclude(missing, options)
    errors = min(max(value / std_error, -_MAX_Z), _MAX_Z)
    noise = learn_noise(state.noise, errors, options.level_samples, options.noise_samples)
    z = errors / math.sqrt(long_run_variance(noise))
    upward, downward = accumulate(state.upward, state.downward, z, state.sign, options)
    state = replace(
        state,
        last_step=step,
        num_samples=state.num_samples + 1,
        num_missing=0,
        upward=upward,
        downward=downward,
        noise=noise,
        flips=count_flip(state.flips, _sign_of_sample(errors, options), options.flips),
    )
    state = _judge(state, options)
    return state, _conclude(state, options)


def accumulate(upward: float, downward: float, z: float, sign: int, options: SignOptions) -> tuple[float, float]:
    """Add one sample's evidence to both sums.

    Args:
        upward: summed evidence for a positive sign.
        downward: summed evidence for a negative sign.
        z: the sample, in standard deviations of white noise.
        sign: the sign in force, -1 or 1, or 0; nothing is summed in favour of what is known.
        options: `SignOptions`.

    Returns:
        The new sums, ``upward`` first.
    """
    z = min(max(z, -options.clip), options.clip)
    return (
        0.0 if sign > 0 else max(0.0, upward + z - options.drift),
        0.0 if sign < 0 else max(0.0, downward - z - options.drift),
    )


def _judge(state: SignState, options: SignOptions) -> SignState:
    evidence = max(state.upward, state.downward)
    if state.num_samples < options.min_samples or evidence <= options.threshold:
        return state
    return replace(state, sign=1 if state.upward > state.downward else -1, upward=0.0, downward=0.0)


def _conclude(state: SignState, options: SignOptions) -> SignConclusion:
    sample_sign = 0 if state.num_missing or not state.num_samples else _sign_of_sample(state.noise.last, options)
    return SignConclusion(state.sign, sample_sign, state.flips.fraction, bool(state.flips.is_undersampled))


def _sign_of_sample(errors: float, options: SignOptions) -> int:
    return int(errors > options.sample_errors) - int(errors < -options.sample_errors)
