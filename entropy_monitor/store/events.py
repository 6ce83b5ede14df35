"""Events: what deserves a mark on the time axis, numbered, each exactly once."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from entropy_monitor.store import layout
from entropy_monitor.types import PhaseEvent

if TYPE_CHECKING:
    from entropy_monitor.store.objects import Objects


def event_id(attempt: int, step: int, kind: str) -> str:
    """The same for the same finding, so that a restarted watcher repeats nothing.

    Returns:
        16 hexadecimal digits.
    """
    return hashlib.sha256(f"{attempt}/{step}/{kind}".encode()).hexdigest()[:16]


class EventLog:
    """Appends events, and reads those that others have appended since the last look."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._next = 1
        self._known: set[str] = set()

    def append(self, event: PhaseEvent) -> bool:
        """Append an event unless one of the same id exists.

        Returns:
            Whether it was new.
        """
        self.read_new()
        if event.event_id in self._known:
            return False
        while not self._objects.create_json(layout.event_key(self._next), asdict(event)):
            self._next += 1
        self._known.add(event.event_id)
        return True

    def read_new(self) -> list[PhaseEvent]:
        """Events appended since the last call, by whomever; one that cannot be read hides none behind it.

        Returns:
            The events, oldest first.
        """
        events: list[PhaseEvent] = []
        for number in layout.numbers(self._objects.children("events"), r"(\d{8,})\.json"):
            if number < self._next:
                continue
            self._next = number + 1
            try:
                fields = self._objects.get_json(layout.event_key(number)) or {}
                fields["score"] = math.nan if fields.get("score") is None else fields["score"]
                event = PhaseEvent(**fields)
            except TypeError:  # damaged, or of another version
                continue
            self._known.add(event.event_id)
            events.append(event)
        return events
