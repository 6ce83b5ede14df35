"""The watcher daemon, top to bottom: follow, measure, judge, command, record."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from entropy_monitor.config import WatchOptions
from entropy_monitor.store import EventLog, MetricsWriter, WatcherLock, read_states, read_tail
from entropy_monitor.watcher.beat import WatcherBeat
from entropy_monitor.watcher.channel import ControlChannel
from entropy_monitor.watcher.follow import REMEMBERED_STEPS, JoinedStep, watch_frames
from entropy_monitor.watcher.judge import Judge
from entropy_monitor.watcher.measure import FrameMeasurements, measure_frames
from entropy_monitor.watcher.refill import refill
from entropy_monitor.watcher.row import metrics_row, table_layout
from entropy_monitor.watcher.window import InformationWindow

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping
    from typing import Any

    from entropy_monitor.store import MetricsBlock, Run

logger = logging.getLogger(__name__)


def watch(
    run: Run,
    stop_event: threading.Event,
    options: WatchOptions | None = None,
    *,
    gapt: Mapping[str, Any] | None = None,
    once: bool = False,
) -> int:
    """Measure a run's frames until it has ended or `stop_event` is set; a restart continues where the cursor stands.

    Args:
        run: the run.
        stop_event: ends the loop after the step in hand.
        options: joining and control.
        gapt: options of `entropy_monitor.gapt.GateOptions` that replace the preset's.
        once: measure what is committed now, and return.

    Returns:
        Rows written.

    Raises:
        WatcherRunningError: another watcher measures this run.
        StoreError: the metrics cannot be written.
    """
    options = options or WatchOptions()
    num_rows = 0
    # What was recorded is read before the first heartbeat, which would otherwise hide it when it cannot be.
    with WatcherLock(run.objects):
        table, events, channel = MetricsWriter(run.objects), EventLog(run.objects), ControlChannel(run)
        judge, window = Judge(run, options.control, channel, gapt or {}), InformationWindow()
        tail = read_tail(run.objects, REMEMBERED_STEPS)
        faults = _resume(judge, window, run, table.cursor)
        with WatcherBeat(run.objects, options.control) as beat:
            beat.fault(faults)
            if tail:
                beat.reached(judge.last_step, table.cursor, judge.trends)
            for joined in watch_frames(
                run,
                stop_event,
                cursor=table.cursor,
                done=_sources(tail),
                join_timeout_s=options.join_timeout_s,
                once=once,
            ):
                measured = _measure(joined)
                informed = window.advance(joined.frames, measured.assignments)
                measurements = (*measured.measurements, *informed.measurements)
                verdict = judge.judge(joined, measurements, window.extent)
                for event in verdict.events:
                    events.append(event)
                for decision in verdict.decisions:
                    if decision.kind == "transition":
                        transition = decision.transition
                        weight = judge.gate.options.weight
                        channel.command(joined.attempt, transition.step, transition.phase, weight, transition.reason)
                # The row comes last: killed before it, a restarted watcher finds event and command done.
                num_ranks = max(judge.world_size, 1 + max(joined.source))
                layout = table_layout(judge.layers(joined, measurements), verdict.scalars, verdict.states, num_ranks)
                table.append(layout, metrics_row(joined, measurements, verdict.scalars, verdict.states, layout))
                num_rows += 1
                beat.fault({**joined.faults, **measured.faults, **informed.faults})
                beat.control("suspended" if options.control == "auto" and channel.is_suspended else options.control)
                beat.lag(time.time() - verdict.scalars["wall_time_s"])
                beat.reached(judge.last_step, table.cursor, verdict.trends)
    return num_rows


def _resume(judge: Judge, window: InformationWindow, run: Run, cursor: Mapping[int, int]) -> dict[str, int]:
    """Continue where the watcher before stood; without its states the detectors begin afresh, and nothing else is lost.

    Returns:
        Faults.
    """
    try:
        states = read_states(run.objects)
        if states:
            judge.resume(states)
    except ValueError as error:  # damaged, or written by another version
        logger.warning("expected the states of the newest row; the detectors begin afresh: %s", error)
        return {"states_lost": 1}
    refill(window, run, judge.known.attempt, cursor)
    return {}


def _measure(joined: JoinedStep) -> FrameMeasurements:
    """Measure what can be: a damaged frame is undetermined and counted, and the watcher goes on.

    Returns:
        The figures.
    """
    if not joined.frames:
        return FrameMeasurements(measurements=(), faults={"undetermined_step": 1})
    try:
        return measure_frames(joined.frames)
    except ValueError as error:
        logger.warning("step %d of attempt %d is undetermined: %s", joined.step, joined.attempt, error)
        return FrameMeasurements(measurements=(), faults={"undetermined_step": 1})


def _sources(tail: list[MetricsBlock]) -> dict[tuple[int, int], dict[int, int]]:
    return {
        (int(attempt), int(step)): {rank: int(seq) for rank, seq in enumerate(source) if seq >= 0}
        for block in tail
        for attempt, step, source in zip(block.column("attempt"), block.column("step"), block.source, strict=True)
    }
