"""Which way a noisy level last moved, and where it turned. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from entropy_monitor.watcher.detectors.peak import Level, Peak, exceeds, follow_peak, top


@dataclass(frozen=True, slots=True, kw_only=True)
class Swing:
    """What is remembered of a series that rises and falls; numbers only."""

    direction: int = 0
    """1 after a significant rise, -1 after a significant fall, 0 before either."""
    high: Peak = field(default_factory=Peak)
    """The highest level; while falling, where the fall began."""
    low: Peak = field(default_factory=Peak)
    """The lowest level, its sign changed; while rising, where the rise began."""


def follow_swing(swing: Swing, found: Level, errors: float, interval_errors: float) -> Swing:
    """Take in one level.

    A fall is significant when the level is more than ``errors`` standard errors of the difference below the highest
    since the last turn; the lowest is then sought from here on, and the highest stays where the fall began. Rises are
    the mirror image.

    Args:
        swing: what the last call returned, or ``Swing()``.
        found: the level.
        errors: standard errors of the difference that make a turn.
        interval_errors: those beyond which a level no longer belongs to a peak.

    Returns:
        The new swing.
    """
    mirrored = Level(found.step, -found.value, found.std_error)
    high, low = swing.high, swing.low
    if swing.direction >= 0:
        high = follow_peak(high, found, interval_errors)
    if swing.direction <= 0:
        low = follow_peak(low, mirrored, interval_errors)
    if swing.direction >= 0 and exceeds(top(high), found, errors):
        return Swing(direction=-1, high=high, low=follow_peak(Peak(), mirrored, interval_errors))
    if swing.direction <= 0 and exceeds(top(low), mirrored, errors):
        return Swing(direction=1, high=follow_peak(Peak(), found, interval_errors), low=low)
    return replace(swing, high=high, low=low)
