"""Cycles of a series, told from correlated noise by a bank of Fourier coefficients. Pure: no clock, no file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from entropy_monitor.watcher.detectors.bank import NUM_PERIODS, add_to_bank, bank_periods, bank_power, find_peak
from entropy_monitor.watcher.detectors.rules import check_options
from entropy_monitor.watcher.detectors.whitening import Whitening, skip, whiten

if TYPE_CHECKING:
    from entropy_monitor.watcher.detectors.bank import BankPeak

_SAME_PEAK = 2
"""Places in the bank by which a peak may move and still be the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodOptions:
    """How slow, and how sure, the detector is.

    Raises:
        ConfigError: a value is out of range.
    """

    noise_samples: int = 500
    """Samples over which mean, variance and correlation are learned."""
    warmup_samples: int = 60
    """Samples from which these are learned before the bank begins."""
    min_samples: int = 200
    """Samples before a cycle is claimed."""
    min_periods: float = 3.0
    """Periods that must have been observed."""
    standing_periods: float = 1.5
    """Periods for which the peak must stand above the noise before a claim: a jump of the level rings for about one."""
    min_period_steps: float = 50.0
    """Shortest period that is claimed: ten times the optimizer-scale oscillation of about 5 steps."""
    false_alarm: float = 0.01
    """Probability, over a whole run, of a claim in AR(1) noise."""
    max_missing: int = 50
    """Missing samples in a row after which the detector starts afresh."""

    def __post_init__(self) -> None:
        check_options(
            self,
            {
                "noise_samples": (self.noise_samples >= 2, "at least 2"),
                "warmup_samples": (self.warmup_samples >= 3, "at least 3"),
                "min_samples": (self.min_samples > self.warmup_samples, "more than warmup_samples"),
                "min_periods": (1 <= self.min_periods < math.inf, "at least 1"),
                "standing_periods": (0 <= self.standing_periods < math.inf, "0 or a positive number"),
                "min_period_steps": (0 < self.min_period_steps < math.inf, "a positive number"),
                "false_alarm": (0 < self.false_alarm < 1, "a number between 0 and 1"),
                "max_missing": (self.max_missing >= 1, "at least 1"),
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodState:
    """All that the detector remembers; numbers only, so that it round-trips through a row of float64."""

    first_step: int = -1
    """Step of the first value since the start or the last restart."""
    last_step: int = -1
    num_samples: int = 0
    """Samples since ``first_step``, missing ones included."""
    num_missing: int = 0
    """Missing samples in a row."""
    whitening: Whitening = field(default_factory=Whitening)
    real: tuple[float, ...] = (0.0,) * NUM_PERIODS
    """Real parts of the bank's coefficients."""
    imaginary: tuple[float, ...] = (0.0,) * NUM_PERIODS
    candidate: int = -1
    """Place in the bank of the peak that is significant, as first seen; -1 without one."""
    num_standing: int = 0
    """Samples for which that peak has stood."""
    is_cycle: int = 0
    """1 while a cycle is claimed."""


class PeriodConclusion(NamedTuple):
    """What is known of cycles after a sample."""

    is_cycle: bool
    """Whether a cycle is claimed."""
    period_samples: float = math.nan
    """Period of the highest peak, claimed or not; NaN where there is no peak. See `refine_period` for its error."""
    period_steps: float = math.nan
    """The same in optimizer steps."""
    false_alarm: float = 1.0
    """Bound on the probability that AR(1) noise has shown a peak like this one by now."""


def update_period(
    state: PeriodState, step: int, value: float, options: PeriodOptions
) -> tuple[PeriodState, PeriodConclusion]:
    """Take in one sample and say whether the series has a cycle.

    The series is whitened by its running AR(1) coefficient, and the innovations are summed in 64 leaky Fourier
    coefficients for periods of 8 to 512 samples, each with a memory of four of its periods. In AR(1) noise a
    coefficient's power exceeds p times its expectation with probability ``e^-p``. So many coefficients and samples are
    looked at that the bound is ``n^2 e^-p`` after n samples, of which the sum over an endless run is finite. A cycle is
    claimed when the bound has stayed below ``false_alarm`` at one peak of the bank for ``standing_periods``, and kept
    until it reaches 1.

    A peak is higher than its neighbours, at a period of which ``min_periods`` have been observed, and not shorter than
    ``min_period_steps``: power that only grows towards the longest period is a trend.

    What it cannot know: noise that is not AR(1), such as estimates over a sliding window, raises more false claims;
    and what oscillates faster than two samples appears at a longer period (aliasing). Where only each n-th step is
    sampled, a cycle may be an alias of the optimizer-scale oscillation until the steps in between have been sampled.

    A value that is not finite counts as the mean; ``max_missing`` of them in a row make a new start. A step not after
    the last one changes nothing. Samples count as equally spaced. Scale and sign of the values change nothing.

    Args:
        state: what the last call returned, or ``PeriodState()``.
        step: optimizer step of the sample.
        value: run-level figure, such as an alignment.
        options: `PeriodOptions`.

    Returns:
        The new state, and the conclusion.
    """
    if step <= state.last_step:
        return state, _conclude(state, _find(state, options))
    if math.isfinite(value):
        state = _take(state, step, value, options)
    elif state.first_step < 0 or state.num_missing + 1 >= options.max_missing:
        state = PeriodState(last_step=step)
    else:
        state = replace(_miss(state, options), last_step=step)
    peak = _find(state, options)
    state = _judge(state, peak, options)
    return state, _conclude(state, peak)


def _take(state: PeriodState, step: int, value: float, options: PeriodOptions) -> PeriodState:
    whitening, innovation = whiten(state.whitening, value, options.noise_samples)
    first_step = step if state.first_step < 0 else state.first_step
    state = replace(state, first_step=first_step, last_step=step, num_missing=0, whitening=whitening)
    return _add(state, innovation, options)


def _miss(state: PeriodState, options: PeriodOptions) -> PeriodState:
    state = replace(state, num_missing=state.num_missing + 1, whitening=skip(state.whitening))
    return _add(state, 0.0, options)


def _add(state: PeriodState, innovation: float, options: PeriodOptions) -> PeriodState:
    state = replace(state, num_samples=state.num_samples + 1)
    if state.num_samples <= options.warmup_samples:
        return state
    coefficients = add_to_bank(np.array(state.real) + 1j * np.array(state.imaginary), innovation)
    return replace(state, real=tuple(coefficients.real.tolist()), imaginary=tuple(coefficients.imag.tolist()))


def _judge(state: PeriodState, peak: BankPeak | None, options: PeriodOptions) -> PeriodState:
    if peak is None or _log_false_alarm(state, peak) >= 0:
        return replace(state, candidate=-1, num_standing=0, is_cycle=0)
    if _log_false_alarm(state, peak) >= math.log(options.false_alarm) or state.num_samples < options.min_samples:
        return replace(state, candidate=-1, num_standing=0)
    if state.candidate < 0 or abs(peak.place - state.candidate) > _SAME_PEAK:
        return replace(state, candidate=peak.place, num_standing=0)
    state = replace(state, num_standing=state.num_standing + 1)
    if state.num_standing >= options.standing_periods * peak.period_samples:
        return replace(state, is_cycle=1)
    return state


def _find(state: PeriodState, options: PeriodOptions) -> BankPeak | None:
    num_added = state.num_samples - options.warmup_samples
    if num_added < 1:
        return None
    periods = bank_periods()
    is_eligible = (periods * options.min_periods <= state.num_samples) & (
        periods * _steps_per_sample(state) >= options.min_period_steps
    )
    return find_peak(bank_power(np.array(state.real) + 1j * np.array(state.imaginary), num_added), is_eligible)


def _steps_per_sample(state: PeriodState) -> float:
    return (state.last_step - state.first_step) / (state.num_samples - 1)


def _log_false_alarm(state: PeriodState, peak: BankPeak) -> float:
    return 2 * math.log(state.num_samples) - peak.power


def _conclude(state: PeriodState, peak: BankPeak | None) -> PeriodConclusion:
    if peak is None:
        return PeriodConclusion(is_cycle=False)
    return PeriodConclusion(
        bool(state.is_cycle),
        peak.period_samples,
        peak.period_samples * _steps_per_sample(state),
        math.exp(min(_log_false_alarm(state, peak), 0.0)),
    )
