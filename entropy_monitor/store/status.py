"""The state of a run in one record, from its heartbeats, commands and acknowledgements."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from entropy_monitor.store.attempts import list_attempts, read_attempt
from entropy_monitor.store.commands import acknowledged_numbers, command_numbers, read_command
from entropy_monitor.store.heartbeat import (
    WATCHER,
    Liveness,
    liveness,
    read_heartbeat,
    read_trainer_heartbeats,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from entropy_monitor.store.objects import Objects
    from entropy_monitor.store.run import Run

_MOST_ALIVE: tuple[Liveness, ...] = ("live", "stale", "dead", "ended")

_NO_ADVICE = {"stopped": False, "stopped_at": None, "earliest": None, "latest": None, "advice": "undetermined"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What `entropy-monitor status` and the dashboard's badges say."""

    run_id: str
    state: Liveness
    """Of the trainer: its most alive rank."""
    heartbeat_age_s: float | None
    """Age of the newest trainer heartbeat; negative when the clocks disagree."""
    attempt: int
    step: int | None
    phase: str | None
    weight: float | None
    steer: bool
    every: int | None
    regime: str
    frames_committed: int
    frames_dropped: int
    frames_removed_unmeasured: int
    overhead_percent: float | None
    """Of the training time, see `entropy_hooks.MonitorStats`."""
    overhead_error_percent: float | None
    """Standard error; None while the figure is a lower bound."""
    overhead_samples: int
    overhead_source: str
    last_step_age_s: float | None
    """Seconds since the last optimizer step; tells a hung trainer from a live one."""
    ranks: list[int]
    missing_ranks: list[int]
    """Ranks of the attempt that have said nothing yet, or nothing for a while and no goodbye."""
    watcher_state: Liveness
    control: str
    """The watcher's mode (off, advise, auto), ``suspended`` while an operator's command stands."""
    last_measured_step: int | None
    watcher_lag_s: dict[str, float | None]
    """``p50`` and ``p95`` of the time from a frame's commit to its metrics row."""
    commands_pending: int
    """Commands that are still valid and that a rank of this attempt has not answered."""
    stage: str = "undetermined"
    """On the information plane: fitting, compression or undetermined."""
    early_stopping: dict[str, Any] = field(default_factory=lambda: dict(_NO_ADVICE))
    """``advice`` in words; ``stopped``, whether optimality no longer improves; ``stopped_at``, the first step that is
    as good as the best, and from ``earliest`` to ``latest`` those not significantly worse; None where undetermined."""
    faults: dict[str, int] = field(default_factory=dict[str, int])
    """Count by kind, trainer and watcher together."""

    @property
    def overhead_words(self) -> str:
        """The overhead with its error, or how it is known to be at least so much."""
        if self.overhead_percent is None:
            return "not measured yet"
        if self.overhead_error_percent is None:
            return f"at least {self.overhead_percent:.2f} % of step time ({self.overhead_source})"
        figure = f"{self.overhead_percent:.2f} ± {self.overhead_error_percent:.2f} % of step time"
        return f"{figure} (n = {self.overhead_samples}, every {self.every}; {self.overhead_source})"


def read_status(run: Run, now: float | None = None) -> RunStatus:
    """Read the run's state.

    Args:
        run: the run.
        now: Unix time; the clock's when None.

    Returns:
        The state.
    """
    now = time.time() if now is None else now
    objects = run.objects
    attempt = max([0, *list_attempts(objects)])
    beats = {rank: beat for rank, beat in read_trainer_heartbeats(objects).items() if beat.get("attempt") == attempt}
    watcher = read_heartbeat(objects, WATCHER)
    states: list[Liveness] = [liveness(beat, now) for beat in beats.values()] or ["dead"]
    lead = beats.get(min(beats)) if beats else None
    lag: Mapping[str, Any] = (watcher or {}).get("lag_s") or {}
    return RunStatus(
        run_id=run.run_id,
        state=min(states, key=_MOST_ALIVE.index),
        heartbeat_age_s=_age(beats.values(), "written_at", now),
        attempt=attempt,
        step=_get(lead, "step"),
        phase=_get(lead, "phase"),
        weight=_get(lead, "weight"),
        steer=bool(_get(lead, "steer")),
        every=_get(lead, "every"),
        regime=_get(watcher, "regime") or "undetermined",
        stage=_get(watcher, "stage") or "undetermined",
        early_stopping=_get(watcher, "early_stopping") or dict(_NO_ADVICE),
        frames_committed=sum(int(beat.get("frames_committed", 0)) for beat in beats.values()),
        frames_dropped=sum(int(beat.get("frames_dropped", 0)) for beat in beats.values()),
        frames_removed_unmeasured=_removed_unmeasured(objects),
        overhead_percent=_get(lead, "overhead_percent"),
        overhead_error_percent=_get(lead, "overhead_error_percent"),
        overhead_samples=_get(lead, "overhead_samples") or 0,
        overhead_source=_get(lead, "overhead_source") or "not measured",
        last_step_age_s=_age(beats.values(), "last_step_at", now),
        ranks=sorted(beats),
        missing_ranks=_missing(objects, attempt, beats, now),
        watcher_state=liveness(watcher, now),
        control=_get(watcher, "control") or "off",
        last_measured_step=_get(watcher, "last_measured_step"),
        watcher_lag_s={"p50": lag.get("p50"), "p95": lag.get("p95")},
        commands_pending=_pending(objects, sorted(beats), now),
        faults=_faults([*beats.values(), watcher or {}]),
    )


def _missing(objects: Objects, attempt: int, beats: Mapping[int, Mapping[str, Any]], now: float) -> list[int]:
    world_size = int(read_attempt(objects, attempt).get("world_size", 1)) if attempt else 0
    return [rank for rank in range(world_size) if liveness(beats.get(rank), now) in ("stale", "dead")]


def _get(beat: Mapping[str, Any] | None, name: str) -> Any:
    return None if beat is None else beat.get(name)


def _age(beats: Iterable[Mapping[str, Any]], name: str, now: float) -> float | None:
    times = [float(beat[name]) for beat in beats if beat.get(name) is not None]
    return round(now - max(times), 3) if times else None


def _pending(objects: Objects, ranks: list[int], now: float) -> int:
    answered = [acknowledged_numbers(objects, rank) for rank in ranks] or [set[int]()]
    unanswered = set(command_numbers(objects)) - set.intersection(*answered)
    commands = [read_command(objects, number) for number in unanswered]
    return sum(command is not None and now <= command.issued_at + command.expires_after_s for command in commands)


def _removed_unmeasured(objects: Objects) -> int:
    records = [objects.get_json(f"retention/{name}") or {} for name in objects.children("retention")]
    return sum(int(record.get("frames_removed_unmeasured", 0)) for record in records)


def _faults(beats: list[Mapping[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for beat in beats:
        total.update({kind: int(count) for kind, count in (beat.get("faults") or {}).items()})
    return dict(sorted(total.items()))
