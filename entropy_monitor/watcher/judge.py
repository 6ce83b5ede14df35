"""Trends and controller of the attempt under way: their states go into each row, so that a restart continues them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from entropy_monitor.catalog import RUN_PREFIX
from entropy_monitor.errors import ConfigError
from entropy_monitor.gapt import GatedPhaseTransition, GateOptions, GateState
from entropy_monitor.rows import state_from_row, state_to_row
from entropy_monitor.store import read_attempt
from entropy_monitor.types import PHASES
from entropy_monitor.watcher.controller import Decision, Situation, decide
from entropy_monitor.watcher.detectors.refine import refine_period
from entropy_monitor.watcher.feed import LossFeed
from entropy_monitor.watcher.findings import decision_event, fault_event, trend_events
from entropy_monitor.watcher.row import RunFigure, run_figures, step_scalars
from entropy_monitor.watcher.trends import Trends, TrendState, update_trends

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from entropy_monitor.config import Control
    from entropy_monitor.store import Run
    from entropy_monitor.types import Measurement, PhaseEvent
    from entropy_monitor.watcher.channel import ControlChannel
    from entropy_monitor.watcher.follow import JoinedStep
    from entropy_monitor.watcher.window import WindowExtent


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was concluded from one step."""

    trends: Trends
    scalars: Mapping[str, float]
    """Run scalars of the row."""
    states: Mapping[str, float]
    """What the detectors and the gate remember after it."""
    events: Sequence[PhaseEvent] = ()
    decisions: Sequence[Decision] = ()


_PREFIX = "judge_"
_WINDOW_SAMPLES = 32
"""Steps that the sliding window will span, as long as there is none."""
_CONTROLLED = "mbe_normalized"
"""What the controller lowers: the mean over the layers that it steers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the controller met at its last step; numbers only, so that it round-trips through a row of float64."""

    attempt: int = 0
    """The attempt under way: that of the row itself may be an older one, which the row corrects."""
    phase: int = -1
    """Code of the phase; -1 before the first step."""
    may_command: int = -1
    """Whether the controller commanded, 0 or 1; -1 before the first step."""


@dataclass(slots=True)
class Judge:
    """Folds steps into trends, events and decisions."""

    run: Run
    control: Control
    channel: ControlChannel
    gate_overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    """The record of the attempt under way."""
    trend_state: TrendState = field(default_factory=TrendState)
    trends: Trends = field(default_factory=Trends)
    gate: GatedPhaseTransition = field(default_factory=GatedPhaseTransition)
    known: Known = field(default_factory=Known)
    feed: LossFeed = field(init=False)

    def __post_init__(self) -> None:
        self.feed = LossFeed(self.run)
        _override(GateOptions(), self.gate_overrides)  # a wrong option is told at the start, not at the first frame

    def resume(self, states: Mapping[str, float]) -> None:
        """Continue from the states of the table's newest row."""
        known = state_from_row(Known, states, _PREFIX)
        self._begin(known.attempt)
        self.known = known
        self.trend_state = TrendState.from_row(states)
        # A step that is not new changes no state, and says what is known.
        _, self.trends = update_trends(self.trend_state, self.last_step, {}, _WINDOW_SAMPLES)
        self.gate = GatedPhaseTransition(self.gate.options, GateState.from_row(states))

    def judge(
        self, joined: JoinedStep, measurements: Sequence[Measurement], window: WindowExtent | None = None
    ) -> Verdict:
        """Take in one step.

        Args:
            joined: the step.
            measurements: its figures.
            window: what its information figures were computed from.

        Returns:
            The verdict. A correction of an older step changes no state.
        """
        if joined.attempt > self.known.attempt:
            self._begin(joined.attempt)
        figures = run_figures(measurements)
        events = [fault_event(joined)] if joined.faults else []
        decisions: list[Decision] = []
        if not joined.is_correction:
            before = self.trends
            window_samples = window.num_samples if window else _WINDOW_SAMPLES
            self.trend_state, self.trends = update_trends(self.trend_state, joined.step, figures, window_samples)
            found = trend_events(joined, before, self.trends, self.trend_state)
            events += [self._with_period(event) if event.kind == "cycle" else event for event in found]
            decisions = self._decide(joined, measurements)
            events += [decision_event(joined, decision, self.trends.regime) for decision in decisions]
        states = {**self.trend_state.to_row(), **self.gate.state.to_row(), **state_to_row(self.known, _PREFIX)}
        scalars = {**step_scalars(joined, measurements, figures, window), **self.trends.to_row()}
        return Verdict(trends=self.trends, scalars=scalars, states=states, events=events, decisions=decisions)

    def layers(self, joined: JoinedStep, measurements: Sequence[Measurement]) -> tuple[str, ...]:
        """Layers of a step's row: the model's, as its attempt says, which may be an older one.

        Returns:
            Their names, in order; then what was measured without being announced.
        """
        record = self.record
        if joined.attempt != self.known.attempt:
            record = read_attempt(self.run.objects, joined.attempt)
        return tuple(dict.fromkeys((*record.get("layers", ()), *(m.layer for m in measurements))))

    @property
    def last_step(self) -> int:
        """Newest step judged in this attempt; corrections of older ones do not count."""
        return self.trend_state.regime.last_step

    @property
    def world_size(self) -> int:
        """Ranks of the attempt."""
        return int(self.record.get("world_size", 1))

    def _begin(self, attempt: int) -> None:
        self.known, self.record = Known(attempt=attempt), read_attempt(self.run.objects, attempt)
        self.trend_state, self.trends = TrendState(), Trends()
        base = GateOptions.for_total_steps(self.record.get("total_steps"))
        self.gate = GatedPhaseTransition(_override(base, self.gate_overrides))

    def _with_period(self, event: PhaseEvent) -> PhaseEvent:
        """Add how well the period is known, from the whole series: once for each claim.

        Returns:
            The event.
        """
        series = self.run.metrics(self.known.attempt)[f"{RUN_PREFIX}alignment_weight"]
        period, std_error = refine_period(series["step"].values, series.values, self.trends.cycle.period_steps)
        if not math.isfinite(std_error):
            return event
        reason = f"{event.evidence['reason']}; period {period:.1f} +- {std_error:.1f} steps"
        refined = {"period_steps": period, "period_steps_se": std_error}
        return replace(event, evidence={**event.evidence, "reason": reason, **refined})

    def _decide(self, joined: JoinedStep, measurements: Sequence[Measurement]) -> list[Decision]:
        if self.control == "off" or not joined.frames:
            return []
        self.channel.refresh()
        ranks = tuple(frame.rank for frame in joined.frames)
        steps = self.feed.take(joined.attempt, self.gate.state.last_step, joined.step, ranks)
        if not steps:
            return []
        refused = self.channel.refusal(joined.attempt) is not None
        may_command = self.control == "auto" and not self.channel.is_suspended and not refused
        phase = joined.frames[0].phase
        now = Known(attempt=joined.attempt, phase=PHASES.index(phase), may_command=int(may_command))
        situation = Situation(phase=phase, is_new=now != self.known, may_command=may_command)
        self.known = now
        steered = run_figures(measurements, self.record.get("steered_layers"))
        return decide(self.gate, steps, steered.get(_CONTROLLED, RunFigure()).value, situation)


def _override(options: GateOptions, overrides: Mapping[str, Any]) -> GateOptions:
    try:
        return replace(options, **overrides)
    except TypeError as error:
        raise ConfigError(f"expected [gapt] options of GateOptions; {error}: correct monitor.toml") from error
