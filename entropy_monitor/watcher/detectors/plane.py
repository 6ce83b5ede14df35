"""Stage on the information plane: fitting, then compression. Pure: no clock, no file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from entropy_monitor.types import STAGES, Stage
from entropy_monitor.watcher.detectors.peak import Level, exceeds
from entropy_monitor.watcher.detectors.rules import check_options
from entropy_monitor.watcher.detectors.swing import Swing, follow_swing
from entropy_monitor.watcher.detectors.window_level import WindowLevel, level_error, update_level

_UNDETERMINED, _FITTING, _COMPRESSION = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneOptions:
    """How slow, and how sure, the detector is.

    Raises:
        ConfigError: a value is out of range.
    """

    correlation_samples: int = 32
    """Samples in the sliding window over which each value is estimated."""
    min_samples: int = 64
    """Samples before a stage is named."""
    errors: float = 5.0
    """Change of a level, in standard errors of a difference, that makes a rise or a fall."""
    interval_errors: float = 2.0
    """Change, in standard errors of a difference, up to which nothing may have happened: within it a step may be the
    turn, I(Y;Z) has not fallen when compression is named, and a rise of I(Y;Z) is lost."""

    def __post_init__(self) -> None:
        check_options(
            self,
            {
                "correlation_samples": (self.correlation_samples >= 1, "at least 1"),
                "min_samples": (self.min_samples >= 3, "at least 3"),
                "errors": (0 < self.errors < math.inf, "a positive number"),
                "interval_errors": (0 < self.interval_errors <= self.errors, "more than 0, at most errors"),
            },
        )


class PlanePoint(NamedTuple):
    """The run's place on the information plane at one sample, in nats or any other one unit."""

    input_information: float
    """I(X;Z)."""
    input_std_error: float | None
    """None or NaN where unknown."""
    output_information: float
    """I(Y;Z)."""
    output_std_error: float | None
    """None or NaN where unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneState:
    """All that the detector remembers; numbers only, so that it round-trips through a row of float64."""

    first_step: int = -1
    """Step of the first point that was not missing."""
    point_step: int = -1
    """Step of the last such point."""
    last_step: int = -1
    input_level: WindowLevel = field(default_factory=WindowLevel)
    """I(X;Z)."""
    output_level: WindowLevel = field(default_factory=WindowLevel)
    """I(Y;Z)."""
    swing: Swing = field(default_factory=Swing)
    """Rises and falls of I(X;Z)."""
    output: float = math.nan
    """Level of I(Y;Z) now."""
    output_error: float = math.nan
    output_at_high: float = math.nan
    """Level of I(Y;Z) when I(X;Z) was highest."""
    output_at_high_error: float = math.nan
    output_at_low: float = math.nan
    """Level of I(Y;Z) when I(X;Z) was lowest."""
    output_at_low_error: float = math.nan
    stage: int = 0
    """Code of the stage: 0 undetermined, 1 fitting, 2 compression."""


class PlaneConclusion(NamedTuple):
    """The stage after a sample, and where I(X;Z) turned into it; steps are -1 while undetermined."""

    stage: Stage
    began: int = -1
    """Last step with I(X;Z) within one standard error of its lowest level (fitting) or highest (compression)."""
    earliest: int = -1
    """Step of that level, less the window by which it may trail."""
    latest: int = -1
    """Last step at which I(X;Z) was not significantly different from it."""


def update_plane(
    state: PlaneState, step: int, point: PlanePoint, options: PlaneOptions
) -> tuple[PlaneState, PlaneConclusion]:
    """Take in one point and name the stage (information plane of arXiv 2604.07569).

    Fitting: I(X;Z) last rose, and I(Y;Z) is higher than it was when that rise began. Compression: I(X;Z) last fell, and
    I(Y;Z) is not lower than when that fall began. Anything else, such as a model that forgets, is undetermined. A stage
    is kept while I(Y;Z) is between ``interval_errors`` and ``errors`` from naming and from ending it.

    Values over a sliding window repeat each other's noise. A rise or fall counts therefore by its size alone, never by
    how many samples agree on it: the level, an average over one more window, must change by more than ``errors``
    standard errors of a difference (see `level_error`). Levels trail the values by about a window, and the steps given
    are those of the levels.

    A point with a value that is not finite, or still without any standard error, is missing and changes nothing but
    ``last_step``; levels are absolute, so that no number of missing points makes a new start. A step not after the
    last one changes nothing. Another unit, or another zero, of either value changes nothing.

    Args:
        state: what the last call returned, or ``PlaneState()``.
        step: optimizer step of the sample.
        point: run-level estimates.
        options: `PlaneOptions`.

    Returns:
        The new state, and the conclusion.
    """
    if step <= state.last_step:
        return state, _conclude(state, options)
    state, window = replace(state, last_step=step), options.correlation_samples
    if not (math.isfinite(point.input_information) and math.isfinite(point.output_information)):
        return state, _conclude(state, options)
    state = replace(
        state,
        first_step=step if state.first_step < 0 else state.first_step,
        point_step=step,
        input_level=update_level(state.input_level, point.input_information, point.input_std_error, window),
        output_level=update_level(state.output_level, point.output_information, point.output_std_error, window),
    )
    input_error = level_error(state.input_level, point.input_std_error, window)
    output_error = level_error(state.output_level, point.output_std_error, window)
    # A level begins at the first value: only after a window's length is it an average.
    if state.input_level.num_samples >= window and input_error > 0 and output_error > 0:
        found = Level(step, state.input_level.level, input_error)
        state = _follow(replace(state, output=state.output_level.level, output_error=output_error), found, options)
        state = replace(state, stage=_judge(state, options))
    return state, _conclude(state, options)


def _follow(state: PlaneState, found: Level, options: PlaneOptions) -> PlaneState:
    swing = follow_swing(state.swing, found, options.errors, options.interval_errors)
    state = replace(state, swing=swing)
    if swing.high.step == found.step:
        state = replace(state, output_at_high=state.output, output_at_high_error=state.output_error)
    if swing.low.step == found.step:
        state = replace(state, output_at_low=state.output, output_at_low_error=state.output_error)
    return state


def _judge(state: PlaneState, options: PlaneOptions) -> int:
    swing, now = state.swing, Level(state.point_step, state.output, state.output_error)
    if state.input_level.num_samples < options.min_samples or swing.direction == 0:
        return _UNDETERMINED
    if swing.direction > 0:
        before = Level(swing.low.step, state.output_at_low, state.output_at_low_error)
        bar = options.interval_errors if state.stage == _FITTING else options.errors
        return _FITTING if exceeds(now, before, bar) else _UNDETERMINED
    before = Level(swing.high.step, state.output_at_high, state.output_at_high_error)
    bar = options.errors if state.stage == _COMPRESSION else options.interval_errors
    return _UNDETERMINED if exceeds(before, now, bar) else _COMPRESSION


def _conclude(state: PlaneState, options: PlaneOptions) -> PlaneConclusion:
    if state.stage == _UNDETERMINED:
        return PlaneConclusion("undetermined")
    turn = state.swing.low if state.stage == _FITTING else state.swing.high
    steps_per_sample = (state.point_step - state.first_step) / (state.input_level.num_samples - 1)
    trail = round(options.correlation_samples * steps_per_sample)
    earliest = max(turn.step - trail, state.first_step)
    return PlaneConclusion(STAGES[state.stage], turn.near, earliest, turn.latest)
