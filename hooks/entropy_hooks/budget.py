"""The overhead budget: `every` is stretched until sampling costs no more than was allowed, equally on all ranks."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from entropy_hooks.cost import Clock, StepCosts
    from entropy_hooks.faults import Faults
    from entropy_hooks.shared_notes import SharedNotes

logger = logging.getLogger("entropy_hooks")

_BYPASS_EVERY = 8
"""With every step sampled, one of so many passes our hooks by, to be compared with."""
_ENOUGH_PAIRS: dict[Clock, int] = {"hooks": 0, "cpu": 8, "wall": 8}
"""Comparisons before a clock is believed; our own has no noise."""
_CONFIDENCE = 3.0
"""Standard errors by which a cost must exceed the budget before the sampling is changed."""
_MAX_FACTOR = 8
"""At one look: what a first guess was too high by must not end the sampling."""
_MAX_STRETCH = 1000
"""Beyond this multiple of what was asked for, a run has hardly a frame: the budget is given up instead, and said so."""
_LOOK_EVERY = 4
"""Sampled steps between two looks: the more looks, the more often noise alone would stretch."""


class Cadence:
    """Which steps are sampled."""

    def __init__(
        self,
        every: int,
        max_overhead: float | None,
        costs: StepCosts,
        open_notes: Callable[[], SharedNotes | None],
        faults: Faults,
    ) -> None:
        self._asked, self._faults = every, faults
        self.every = every
        """As it stands now; it only grows."""
        self._budget, self._costs, self._open_notes = max_overhead, costs, open_notes
        self._notes: SharedNotes | None = None
        self._opened = False
        self._num_sampled = 0
        self._next: tuple[int, int] | None = None
        """(every, the sampled step behind which it begins), once decided."""

    def is_sampled(self, step: int) -> bool:
        """Whether a step is sampled.

        Returns:
            True or False, alike on all ranks.
        """
        if step % self.every:
            return False
        return self._budget is None or self.every > 1 or step % _BYPASS_EVERY != _BYPASS_EVERY - 1

    def after_sampled(self, step: int) -> None:
        """A sampled step has ended: is the budget kept?

        Rank 0 decides behind one sampled step what is to be done behind the next: by then every rank can read it.
        """
        if self._budget is None:
            return
        if not self._opened:
            self._opened, self._notes = True, self._open_notes()
        if self._notes is not None and self._notes.rank != 0:
            note = self._notes.read("every")
            self._next = None if note is None else (int(note["every"]), int(note["after"]))
        if self._next is not None and self._next[1] <= step:
            every, _ = self._next
            self._next = None
            self.every = every
        elif self._next is None and (self._notes is None or self._notes.rank == 0):
            self._stretch(step)

    def _stretch(self, step: int) -> None:
        self._num_sampled += 1
        if self._num_sampled % _LOOK_EVERY:
            return
        factor = max(self._factor(clock) for clock in _ENOUGH_PAIRS)
        if factor == 1:
            return
        if factor * self.every > _MAX_STRETCH * self._asked:
            self._faults.count(
                "budget_not_kept",
                f"expected sampling to cost at most {self._budget:g} of the training time; found more at every "
                f"{self.every}, {self.every // self._asked} times what was asked for: give a larger max_overhead, or "
                "fewer patches or layers",
            )
            return
        logger.info("sampling every %d steps from now on: it cost more than the budget", factor * self.every)
        self._next = (factor * self.every, step + self.every)
        if self._notes is None:
            self.every, self._next = factor * self.every, None
        else:
            self._notes.write("every", {"every": self._next[0], "after": self._next[1]})

    def _factor(self, clock: Clock) -> int:
        """By how much `every` must grow for this clock's sake.

        Returns:
            A whole number; 1 while the cost may be within the budget.
        """
        assert self._budget is not None
        cost = self._costs.cost(clock)
        if cost is None or cost.num_pairs < _ENOUGH_PAIRS[clock]:
            return 1
        surely = cost.fraction(self.every) - _CONFIDENCE * cost.fraction_error(self.every)
        if not surely > self._budget:
            return 1
        return min(_MAX_FACTOR, max(2, math.ceil(cost.fraction(self.every) / self._budget)))
