"""Early-stopping advice: the step at which a figure, such as optimality, stopped improving. Pure: no clock, no file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from entropy_monitor.watcher.detectors.ladder import Ladder, climb, first_above
from entropy_monitor.watcher.detectors.peak import Level, Peak, difference_error, follow_peak, top
from entropy_monitor.watcher.detectors.rules import check_options
from entropy_monitor.watcher.detectors.window_level import WindowLevel, level_error, update_level

_RUNG_ERRORS = 0.25
"""Distance of records, in standard errors of a difference: 16 of them reach 4 standard errors down."""
_MAX_ERRORS = 3.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PlateauOptions:
    """How patient, and how sure, the detector is.

    Raises:
        ConfigError: a value is out of range.
    """

    patience: int = 256
    """Samples without significant improvement after which the figure is said to have stopped improving."""
    correlation_samples: int = 32
    """Samples in the sliding window over which each value is estimated."""
    errors: float = 3.0
    """Standard errors of a difference that make an improvement, or set a step apart from the best."""

    def __post_init__(self) -> None:
        check_options(
            self,
            {
                "correlation_samples": (self.correlation_samples >= 1, "at least 1"),
                "patience": (self.patience >= self.correlation_samples, "at least correlation_samples"),
                "errors": (1 <= self.errors <= _MAX_ERRORS, f"1 to {_MAX_ERRORS}"),
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlateauState:
    """All that the detector remembers; numbers only, so that it round-trips through a row of float64."""

    last_step: int = -1
    level: WindowLevel = field(default_factory=WindowLevel)
    peak: Peak = field(default_factory=Peak)
    ladder: Ladder = field(default_factory=Ladder)
    is_stopped: int = 0
    """1 while nothing has improved significantly for long enough."""


class PlateauConclusion(NamedTuple):
    """Where the figure stands after a sample; before the first level the steps are -1 and the figures NaN."""

    is_stopped: bool = False
    """Whether nothing has improved significantly for ``patience`` samples."""
    stopped_at: int = -1
    """First step as good as the best within one standard error."""
    earliest: int = -1
    """First step that is not significantly worse than the best."""
    latest: int = -1
    """Last step that is not significantly worse than the best."""
    best_step: int = -1
    """Step of the highest level."""
    best: float = math.nan
    """Highest level: an average of the figure over one window more."""
    best_error: float = math.nan
    """Its standard error."""


def update_plateau(
    state: PlateauState, step: int, value: float, std_error: float | None, options: PlateauOptions
) -> tuple[PlateauState, PlateauConclusion]:
    """Take in one sample of a figure that should rise, such as optimality I(Y;Z) / I(X;Z) (arXiv 2604.07569).

    The figure has stopped improving when its level has not been significantly higher for ``patience`` samples than it
    was before: when the first level within ``errors`` standard errors of the best (of a difference, see `level_error`)
    is that old. A later improvement takes it back. The step is estimated as that of the first level within one standard
    error of the best (the one-standard-error rule of L. Breiman and others, Classification and Regression Trees, 1984):
    on a long plateau the best itself may be anywhere. Levels are averages over one more window, they trail the values
    by about a window, and the steps given are those of the levels.

    A value that is not finite, or still without any standard error, is missing and changes nothing but ``last_step``.
    A step not after the last one changes nothing. Another unit, or another zero, of the figure changes nothing.

    Args:
        state: what the last call returned, or ``PlateauState()``.
        step: optimizer step of the sample.
        value: run-level figure; the higher, the better.
        std_error: its standard error; None or NaN where unknown.
        options: `PlateauOptions`.

    Returns:
        The new state, and the conclusion.
    """
    if step <= state.last_step:
        return state, _conclude(state, options)
    state = replace(state, last_step=step)
    if math.isfinite(value):
        level = update_level(state.level, value, std_error, options.correlation_samples)
        error = level_error(level, std_error, options.correlation_samples)
        state = replace(state, level=level)
        # The level begins at the first value: only after a window's length is it an average.
        if level.num_samples >= options.correlation_samples and error > 0:
            state = _follow(state, Level(step, level.level, error), options)
    return state, _conclude(state, options)


def describe_plateau(found: PlateauConclusion, figure: str = "optimality") -> str:
    """Put the advice into words.

    Args:
        found: the conclusion.
        figure: name of the figure.

    Returns:
        One line.
    """
    if found.stopped_at < 0:
        return f"{figure}: undetermined, not measured"
    if not found.is_stopped:
        return f"{figure} may still improve: best {found.best:.4g} at step {found.best_step}"
    return (
        f"{figure} stopped improving at step {found.stopped_at}: steps {found.earliest} to {found.latest} are as good "
        f"as its best, {found.best:.4g} +- {found.best_error:.2g}, within its error; a slower rise than that error in "
        "eight windows is not seen; consider stopping, or keep a checkpoint from there"
    )


def _follow(state: PlateauState, found: Level, options: PlateauOptions) -> PlateauState:
    spacing = _RUNG_ERRORS * difference_error(found, found)
    ladder = climb(state.ladder, found.value, found.step, state.level.num_samples, spacing)
    state = replace(state, peak=follow_peak(state.peak, found, options.errors), ladder=ladder)
    _, sample = _first_as_good(state, options.errors)
    # Half the patience keeps it: with a bar that moves by a hair at each sample it would be told again and again.
    patience = options.patience // 2 if state.is_stopped else options.patience
    return replace(state, is_stopped=int(state.level.num_samples - sample >= patience))


def _first_as_good(state: PlateauState, errors: float) -> tuple[int, int]:
    """Find the first record within so many standard errors of the best.

    Returns:
        Its step, and the number of its sample.
    """
    bar = state.peak.value - errors * difference_error(top(state.peak), top(state.peak))
    return first_above(state.ladder, bar) or (state.peak.step, state.level.num_samples)


def _conclude(state: PlateauState, options: PlateauOptions) -> PlateauConclusion:
    peak = state.peak
    if peak.step < 0:
        return PlateauConclusion()
    stopped_at, _ = _first_as_good(state, 1.0)
    earliest, _ = _first_as_good(state, options.errors)
    return PlateauConclusion(
        is_stopped=bool(state.is_stopped),
        stopped_at=min(stopped_at, peak.step),
        earliest=min(earliest, peak.step),
        latest=peak.latest,
        best_step=peak.step,
        best=peak.value,
        best_error=peak.std_error,
    )
