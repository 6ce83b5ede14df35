"""Heartbeats: once a second each process says how it does, by atomic replacement of one file."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from entropy_monitor.store import layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from entropy_monitor.store.objects import Objects

PERIOD_S = 1.0
STALE_AFTER_S = 5.0
DEAD_AFTER_S = 60.0
WATCHER = "watcher"

Liveness = Literal["live", "stale", "dead", "ended"]


def write_heartbeat(objects: Objects, who: str, fields: Mapping[str, Any]) -> None:
    """Replace a heartbeat; ``written_at`` is added."""
    objects.put_json(layout.heartbeat_key(who), {**fields, "written_at": time.time()})


def read_heartbeat(objects: Objects, who: str) -> dict[str, Any] | None:
    """The newest heartbeat of a rank (``r00000``) or of the watcher.

    Returns:
        Its fields, or None when there is none.
    """
    return objects.get_json(layout.heartbeat_key(who))


def read_trainer_heartbeats(objects: Objects) -> dict[int, dict[str, Any]]:
    """The newest heartbeat of every rank.

    Returns:
        Rank to fields.
    """
    ranks = layout.numbers(objects.children("heartbeat"), r"r(\d{5,})\.json")
    beats = {rank: read_heartbeat(objects, layout.rank_name(rank)) for rank in ranks}
    return {rank: beat for rank, beat in beats.items() if beat is not None}


def liveness(heartbeat: Mapping[str, Any] | None, now: float) -> Liveness:
    """Judge a heartbeat by its age and by what the process said last.

    Args:
        heartbeat: the fields, or None when there is none.
        now: Unix time.

    Returns:
        ``live``, ``stale`` (older than 5 s), ``dead`` (older than 60 s, or none) or ``ended`` (said goodbye).
    """
    if heartbeat is None:
        return "dead"
    if heartbeat.get("state") == "ended":
        return "ended"
    age_s = now - float(heartbeat.get("written_at", 0.0))
    return "live" if age_s <= STALE_AFTER_S else "stale" if age_s <= DEAD_AFTER_S else "dead"
