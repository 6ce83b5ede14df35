"""Ranks of scored models: what the standard errors cannot tell apart shares a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from entropy_monitor.ranking.score import ModelScore

_CLEAR_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Rank:
    """A model's place."""

    position: int | None
    """From 1; None where optimality or its error is undetermined."""
    tied: bool
    """Another model has this position too."""
    score: ModelScore


def rank_scores(scores: Sequence[ModelScore]) -> list[Rank]:
    """Order models by optimality, the highest first.

    A model shares the position of the best of its group when they are no more than 2 standard errors of their
    difference apart, and the next group counts all before it: 1, 1, 3. All models saw the same text, so that
    ``sqrt(SE_1^2 + SE_2^2)`` is an upper bound of that error: ties are given rather than denied.

    Args:
        scores: of the models, in any order.

    Returns:
        Ranks, best first, undetermined ones last.
    """
    known = sorted((score for score in scores if score.optimality.is_known), key=_optimality, reverse=True)
    unknown = [score for score in scores if not score.optimality.is_known]
    positions: list[int] = []
    for index, score in enumerate(known):
        best = known[positions[-1] - 1] if positions else score
        positions.append(positions[-1] if positions and _alike(best, score) else index + 1)
    ranks = [
        Rank(position, positions.count(position) > 1, score) for position, score in zip(positions, known, strict=True)
    ]
    return ranks + [Rank(None, False, score) for score in unknown]


def _optimality(score: ModelScore) -> float:
    return score.optimality.value


def _alike(better: ModelScore, worse: ModelScore) -> bool:
    difference = better.optimality.value - worse.optimality.value
    return difference <= _CLEAR_ERRORS * math.hypot(better.optimality.std_error, worse.optimality.std_error)
