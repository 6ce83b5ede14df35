"""Records of a rising level, which tell without its history when it was first as high as so and so. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

NUM_RUNGS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The newest records, each higher than the one before; unused rungs are NaN and come first."""

    values: tuple[float, ...] = (math.nan,) * NUM_RUNGS
    steps: tuple[float, ...] = (math.nan,) * NUM_RUNGS
    samples: tuple[float, ...] = (math.nan,) * NUM_RUNGS
    """Number of the sample that set each record."""


def climb(ladder: Ladder, value: float, step: int, sample: int, spacing: float) -> Ladder:
    """Take in one level: a new record, if it is more than ``spacing`` above the last; the oldest is forgotten.

    Args:
        ladder: what the last call returned, or ``Ladder()``.
        value: the level.
        step: its optimizer step.
        sample: its number.
        spacing: least distance of records, in the unit of the level.

    Returns:
        The new ladder.
    """
    if value <= ladder.values[-1] + spacing:
        return ladder
    return Ladder(
        values=(*ladder.values[1:], value),
        steps=(*ladder.steps[1:], float(step)),
        samples=(*ladder.samples[1:], float(sample)),
    )


def first_above(ladder: Ladder, bar: float) -> tuple[int, int] | None:
    """Find the first record that is not below a bar.

    Returns:
        Its step, and the number of its sample; None where the bar is above the last record.
    """
    for value, step, sample in zip(ladder.values, ladder.steps, ladder.samples, strict=True):
        if value >= bar:
            return int(step), int(sample)
    return None
