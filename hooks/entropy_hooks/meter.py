"""What the hooks cost the training thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


class Meter:
    """Adds up the time spent in our own code; a context manager that may be entered again and again."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self._depth = 0
        self._entered = 0.0
        self._since: float | None = None

    def __enter__(self) -> None:
        """Our code begins."""
        if self._depth == 0:
            self._entered = time.perf_counter()
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Our code ends."""
        self._depth -= 1
        if self._depth == 0:
            self.spent_s += time.perf_counter() - self._entered

    def step(self) -> None:
        """An optimizer step has ended; the first one starts the clock, so that set-up is not counted."""
        if self._since is None:
            self._since, self.spent_s = time.perf_counter(), 0.0

    @property
    def overhead_percent(self) -> float | None:
        """Share of the wall time since the first step that was spent here; None before it.

        Host time on the training thread: kernels queued on a GPU are not in it.
        """
        if self._since is None or (elapsed := time.perf_counter() - self._since) < 1e-3:
            return None
        return round(100 * self.spent_s / elapsed, 4)
