"""The highest level so far, and how long the series stayed as high within its error. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple


class Level(NamedTuple):
    """A level at a step."""

    step: int
    value: float
    std_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """What is remembered of the highest levels; numbers only."""

    step: int = -1
    """Step of the highest level, -1 before any."""
    value: float = math.nan
    std_error: float = math.nan
    near: int = -1
    """Last step at which the level was within one standard error of the highest."""
    latest: int = -1
    """Last step at which the level was not significantly below the highest."""


def follow_peak(peak: Peak, found: Level, errors: float) -> Peak:
    """Take in one level.

    Args:
        peak: what the last call returned, or ``Peak()``.
        found: the level.
        errors: standard errors of a difference beyond which it is significant.

    Returns:
        The new peak.
    """
    if peak.step < 0 or found.value > peak.value:
        step, value, std_error = found
        return Peak(step=step, value=value, std_error=std_error, near=step, latest=step)
    if not exceeds(top(peak), found, 1.0):
        peak = replace(peak, near=found.step)
    if not exceeds(top(peak), found, errors):
        peak = replace(peak, latest=found.step)
    return peak


def top(peak: Peak) -> Level:
    """The highest level.

    Returns:
        With its step and error.
    """
    return Level(peak.step, peak.value, peak.std_error)


def exceeds(higher: Level, lower: Level, errors: float) -> bool:
    """Whether one level is significantly above another.

    Returns:
        True when the difference is more than ``errors`` of its standard errors.
    """
    return higher.value - lower.value > errors * difference_error(higher, lower)


def difference_error(one: Level, other: Level) -> float:
    """Standard error of the difference of independent levels.

    Returns:
        The larger error times the root of 2: what was learned of the noise later holds for earlier levels too.
    """
    return math.sqrt(2) * max(one.std_error, other.std_error)
