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
        self._newest: dict[int, tuple[int, int]] = {}
        """Newest (attempt, step) of each rank: an earlier one that is not there by then was lost."""

    def take(self, attempt: int, after: int, through: int, ranks: Collection[int]) -> list[tuple[int, float]]:
        """Steps of an attempt whose scalars all ranks have written, but for those that a rank has lost.

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
                    key = (row_attempt, int(row[_STEP]))
                    self._losses[key][rank] = float(row[_LOSS])
                    self._newest[rank] = max(key, self._newest.get(rank, key))
        steps: list[tuple[int, float]] = []
        for key in sorted(key for key in self._losses if key <= (attempt, through)):
            if key[0] == attempt and key[1] > after:
                losses = self._losses[key]
                if any(rank not in losses and self._newest.get(rank, key) <= key for rank in ranks):
                    break
                known = [losses[rank] for rank in ranks if rank in losses]
                if known:
                    steps.append((key[1], sum(known) / len(known)))
            del self._losses[key]
        return steps
