"""Attempts: each start of the trainer claims a number, once for all its ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from entropy_monitor.store import layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from entropy_monitor.store.objects import Objects


def claim_attempt(objects: Objects, record: Mapping[str, Any]) -> int:
    """Claim the next attempt for this start of the trainer; rank 0 does this.

    Args:
        objects: the run.
        record: command line, host, versions, model, layers, options, ...

    Returns:
        The attempt's number, from 1.
    """
    number = max([0, *list_attempts(objects)]) + 1
    while not objects.create_json(layout.attempt_key(number), {**record, "attempt": number}):
        number += 1
    return number


def list_attempts(objects: Objects) -> list[int]:
    """Numbers of all attempts.

    Returns:
        The numbers, ascending.
    """
    return layout.numbers(objects.children("attempts"), r"(\d{6,})\.json")


def read_attempt(objects: Objects, number: int) -> dict[str, Any]:
    """The record of one attempt.

    Returns:
        The record; empty when it cannot be read.
    """
    return objects.get_json(layout.attempt_key(number)) or {}


def find_attempt(objects: Objects, launch_id: str) -> dict[str, Any] | None:
    """The newest attempt of one launch; how ranks without `torch.distributed` learn their number.

    Returns:
        The record, or None while rank 0 has not claimed it.
    """
    for number in reversed(list_attempts(objects)):
        record = read_attempt(objects, number)
        if record.get("launch_id") == launch_id:
            return record
    return None
