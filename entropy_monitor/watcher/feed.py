"""Cross-entropy of every optimizer step, averaged over the ranks, in order."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from entropy_monitor.store import ScalarsReader
from entropy_monitor.store.layout import SCALAR_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Collection

    from entropy_monitor.store import Run

_STEP, _LOSS = SCALAR_COLUMNS.index("step"), SCALAR_COLUMNS.index("loss")


class LossFeed:
    """Reads the ranks' scalars as they come, and gives each step once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._readers: dict[int, ScalarsReader] = {}
        self._losses: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)

    def take(self, attempt: int, after: int, through: int, ranks: Collection[int]) -> list[tuple[int, float]]:
        """Steps of an attempt whose scalars all ranks have written.

        Args:
            attempt: the attempt.
            after: last step that was given before.
            through: last step wanted.
            ranks: ranks that must have written a step.

        Returns:
            (step, mean CE) in order, up to the first step that a rank has not written yet.
        """
        for rank in ranks:
            reader = self._readers.setdefault(rank, ScalarsReader(self._run.objects, rank))
            for row_attempt, rows in reader.read_new():
                for row in rows:
                    self._losses[row_attempt, int(row[_STEP])][rank] = float(row[_LOSS])
        steps: list[tuple[int, float]] = []
        for key in sorted(key for key in self._losses if key <= (attempt, through)):
            if key[0] == attempt and key[1] > after:
                losses = self._losses[key]
                if not all(rank in losses for rank in ranks):
                    break
                steps.append((key[1], sum(losses[rank] for rank in ranks) / len(ranks)))
            del self._losses[key]
        return steps
