"""Faults: counted by kind, logged once each, never raised into training."""

from __future__ import annotations

import logging
import threading
from collections import Counter

logger = logging.getLogger("entropy_hooks")


class Faults:
    """Counts what went wrong, from whichever thread saw it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def count(self, kind: str, detail: object, number: int = 1) -> None:
        """Count a fault; the first of each kind is logged with its detail, in one line."""
        with self._lock:
            first = kind not in self._counts
            self._counts[kind] += number
        if first:
            error = detail if isinstance(detail, BaseException) else None
            described = f"{type(error).__name__}: {error}" if error is not None else str(detail)
            one_line = self._first[kind] = " ".join(described.split())
            logger.warning("%s: %s (training goes on; further ones are only counted)", kind, one_line)
            if error is not None:
                logger.debug("%s", kind, exc_info=error)

    def describe(self) -> str:
        """The first fault of each kind, in words.

        Returns:
            One line; empty when nothing went wrong.
        """
        return "; ".join(f"{kind}: {detail}" for kind, detail in self._first.items())

    def forget_threads(self) -> None:
        """In a forked child: the lock may have been held by a thread that does not exist here."""
        self._lock = threading.Lock()

    def snapshot(self) -> dict[str, int]:
        """Counts by kind.

        Returns:
            A copy.
        """
        with self._lock:
            return dict(self._counts)
