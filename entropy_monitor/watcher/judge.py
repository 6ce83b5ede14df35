"""Regime and controller of the attempt under way: their states go into each row, so that a restart continues them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from entropy_monitor.errors import ConfigError
from entropy_monitor.gapt import GatedPhaseTransition, GateOptions, GateState
from entropy_monitor.rows import state_from_row, state_to_row
from entropy_monitor.store import event_id, read_attempt
from entropy_monitor.types import PHASES, REGIMES, PhaseEvent, Regime
from entropy_monitor.watcher.controller import Decision, Situation, decide
from entropy_monitor.watcher.feed import LossFeed
from entropy_monitor.watcher.regimes import RegimeOptions, RegimeState, update_regime
from entropy_monitor.watcher.row import mean_over_layers, middle_layers, step_scalars

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from entropy_monitor.config import Control
    from entropy_monitor.store import Run
    from entropy_monitor.types import Measurement
    from entropy_monitor.watcher.channel import ControlChannel
    from entropy_monitor.watcher.follow import JoinedStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was concluded from one step."""

    regime: Regime
    scalars: Mapping[str, float]
    """Run scalars of the row, the states included."""
    events: Sequence[PhaseEvent] = ()
    decisions: Sequence[Decision] = ()


_PREFIX = "judge_"


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
    """Folds steps into regime, events and decisions."""

    run: Run
    control: Control
    channel: ControlChannel
    gate_overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    """The record of the attempt under way."""
    regime_state: RegimeState = field(default_factory=RegimeState)
    gate: GatedPhaseTransition = field(default_factory=GatedPhaseTransition)
    regime: Regime = "undetermined"
    known: Known = field(default_factory=Known)
    feed: LossFeed = field(init=False)

    def __post_init__(self) -> None:
        self.feed = LossFeed(self.run)
        _override(GateOptions(), self.gate_overrides)  # a wrong option is told at the start, not at the first frame

    def resume(self, last_row: Mapping[str, float]) -> None:
        """Continue from the newest row of the table."""
        known = state_from_row(Known, last_row, _PREFIX)
        self._begin(known.attempt)
        self.known = known
        self.regime_state = RegimeState.from_row(last_row)
        self.regime = REGIMES[self.regime_state.regime]
        self.gate = GatedPhaseTransition(self.gate.options, GateState.from_row(last_row))

    def judge(self, joined: JoinedStep, measurements: Sequence[Measurement]) -> Verdict:
        """Take in one step.

        Args:
            joined: the step.
            measurements: its figures.

        Returns:
            The verdict. A correction of an older step changes no state.
        """
        if joined.attempt > self.known.attempt:
            self._begin(joined.attempt)
        events = [_fault_event(joined)] if joined.faults else []
        decisions: list[Decision] = []
        if not joined.is_correction:
            before, self.regime = self.regime, self._update_regime(joined, measurements)
            if self.regime != before:
                events.append(self._regime_event(joined, before))
            decisions = self._decide(joined, measurements)
            events += [_decision_event(joined, decision, self.regime) for decision in decisions]
        scalars = {
            **step_scalars(joined, measurements, self.regime),
            **self.regime_state.to_row(),
            **self.gate.state.to_row(),
            **state_to_row(self.known, _PREFIX),
        }
        return Verdict(regime=self.regime, scalars=scalars, events=events, decisions=decisions)

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
        return self.regime_state.last_step

    @property
    def world_size(self) -> int:
        """Ranks of the attempt."""
        return int(self.record.get("world_size", 1))

    def _begin(self, attempt: int) -> None:
        self.known, self.record = Known(attempt=attempt), read_attempt(self.run.objects, attempt)
        self.regime_state, self.regime = RegimeState(), "undetermined"
        base = GateOptions.for_total_steps(self.record.get("total_steps"))
        self.gate = GatedPhaseTransition(_override(base, self.gate_overrides))

    def _update_regime(self, joined: JoinedStep, measurements: Sequence[Measurement]) -> Regime:
        value, std_error = mean_over_layers(measurements)
        self.regime_state, regime = update_regime(self.regime_state, joined.step, value, std_error, RegimeOptions())
        return regime

    def _decide(self, joined: JoinedStep, measurements: Sequence[Measurement]) -> list[Decision]:
        if self.control == "off" or not joined.frames:
            return []
        self.channel.refresh()
        ranks = tuple(frame.rank for frame in joined.frames)
        steps = self.feed.take(joined.attempt, self.gate.state.last_step, joined.step, ranks)
        if not steps:
            return []
        layers = tuple(self.record.get("steered_layers") or middle_layers(self.layers(joined, measurements)))
        refused = self.channel.refusal(joined.attempt) is not None
        may_command = self.control == "auto" and not self.channel.is_suspended and not refused
        phase = joined.frames[0].phase
        now = Known(attempt=joined.attempt, phase=PHASES.index(phase), may_command=int(may_command))
        situation = Situation(phase=phase, is_new=now != self.known, may_command=may_command)
        self.known = now
        return decide(self.gate, steps, mean_over_layers(measurements, layers)[0], situation)

    def _regime_event(self, joined: JoinedStep, before: Regime) -> PhaseEvent:
        state = self.regime_state
        return PhaseEvent(
            event_id=event_id(joined.attempt, joined.step, "regime"),
            step=joined.step,
            layer=None,
            kind="regime",
            regime=self.regime,
            score=state.slope,
            evidence={
                "reason": f"row-normalised MBE {state.level:.4f} nats changes by {state.slope:+.2e} nats a sample",
                "before": before,
                "attempt": joined.attempt,
            },
        )


def _decision_event(joined: JoinedStep, decision: Decision, regime: Regime) -> PhaseEvent:
    transition = decision.transition
    # What is still unknown, such as the MBE before the first measurement, is left out: JSON has no NaN.
    figures = {name: value for name, value in transition.evidence.items() if math.isfinite(value)}
    return PhaseEvent(
        event_id=event_id(joined.attempt, transition.step, decision.kind),
        step=transition.step,
        layer=None,
        kind=decision.kind,
        regime=regime,
        score=figures.get("mbe_relative", 0.0),
        evidence={
            **figures,
            "reason": transition.reason,
            "phase": transition.phase,
            "attempt": joined.attempt,
        },
    )


def _fault_event(joined: JoinedStep) -> PhaseEvent:
    described = ", ".join(f"{count} x {kind}" for kind, count in sorted(joined.faults.items()))
    missing = f"; without rank {', '.join(map(str, joined.missing_ranks))}" if joined.missing_ranks else ""
    return PhaseEvent(
        event_id=event_id(joined.attempt, joined.step, "fault"),
        step=joined.step,
        layer=None,
        kind="fault",
        regime="undetermined",
        score=float(sum(joined.faults.values())),
        evidence={"reason": described + missing, "attempt": joined.attempt, **joined.faults},
    )


def _override(options: GateOptions, overrides: Mapping[str, Any]) -> GateOptions:
    try:
        return replace(options, **overrides)
    except TypeError as error:
        raise ConfigError(f"expected [gapt] options of GateOptions; {error}: correct monitor.toml") from error
