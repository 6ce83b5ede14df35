"""The metrics table: one row for each (attempt, step), kept for ever, its cursor committed with it.

Four arrays a segment are written in the order ``values``, ``scalars``, ``states``, ``source``; a row exists once its
``source`` does. Each append rewrites the tail chunk of each, so a restarted watcher continues exactly behind the last
whole row. Of the detectors' states only the newest two are kept, in turns: that of the last whole row is one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from entropy_monitor.store import layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from entropy_monitor.store.objects import Objects


STATES_KEPT = 2
"""A state is written before its row is committed: the one of the row before must survive until then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsLayout:
    """Names of everything in a metrics row; a change opens a fresh segment."""

    layers: tuple[str, ...]
    metrics: tuple[str, ...]
    """Per layer; a standard error stands beside its metric as ``NAME_se``."""
    scalars: tuple[str, ...]
    """Per row, float64: attempt, step, ..."""
    num_ranks: int
    states: tuple[str, ...] = ()
    """The detectors' states, float64; those of the newest row alone can be read again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsRow:
    """What was concluded from all ranks' frames of one step."""

    values: NDArray[np.float32]
    """Shape ``(L, M)``; NaN is undetermined."""
    scalars: Mapping[str, float]
    source: Mapping[int, int]
    """`seq` of the frame that each rank contributed."""
    states: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsBlock:
    """Consecutive rows of one segment."""

    layout: MetricsLayout
    values: NDArray[np.float32]
    """Shape ``(T, L, M)``."""
    scalars: NDArray[np.float64]
    """Shape ``(T, S)``."""
    source: NDArray[np.int64]
    """Shape ``(T, R)``; -1 where the rank is missing."""

    def column(self, name: str) -> NDArray[np.float64]:
        """One scalar of every row, ``(T,)``; NaN where this segment has no such column.

        Returns:
            The values.
        """
        if name not in self.layout.scalars:
            return np.full(len(self.scalars), np.nan)
        return self.scalars[:, self.layout.scalars.index(name)]


def list_metrics_segments(objects: Objects) -> list[int]:
    """Numbers of the table's segments.

    Returns:
        The numbers, ascending.
    """
    return layout.numbers(objects.children(layout.metrics_key()), r"s(\d{6,})")


def advance(cursor: Mapping[int, int], source: Mapping[int, int]) -> dict[int, int]:
    """Move a cursor over one row.

    Returns:
        Newest `seq` of each rank.
    """
    return {**cursor, **{rank: max(seq, cursor.get(rank, -1)) for rank, seq in source.items()}}
