"""Regime and controller of the attempt under way: their states go into each row, so that a restart continues them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from entropy_monitor.errors import ConfigError
from entropy_monitor.gapt import GatedPhaseTransition, GateOptions, GateState
from entropy_monitor.store import event_id, read_attempt
from entropy_monitor.types import REGIMES, Phase, PhaseEvent, Regime
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


@dataclass(slots=True)
class Judge:
    """Folds steps into regime, events and decisions."""

    run: Run
    control: Control
    channel: ControlChannel
    gate_overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    attempt: int = 0
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    """The attempt's record."""
    regime_state: RegimeState = field(default_factory=RegimeState)
    gate: GatedPhaseTransition = field(default_factory=GatedPhaseTransition)
    regime: Regime = "undetermined"
    known: tuple[Phase, bool] | None = None
    """Phase and right to command at the last step, None after a restart."""
    feed: LossFeed = field(init=False)

    def __post_init__(self) -> None:
        self.feed = LossFeed(self.run)

    def resume(self, last_row: Mapping[str, float]) -> None:
        """Continue from the newest row of the table."""
        self._begin(int(last_row["attempt"]))
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
        if joined.attempt > self.attempt:
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
        }
        return Verdict(regime=self.regime, scalars=scalars, events=events, decisions=decisions)

    @property
    def layers(self) -> tuple[str, ...]:
        """The model's layers, as the attempt says."""
        return tuple(self.record.get("layers", ()))

    @property
    def world_size(self) -> int:
        """Ranks of the attempt."""
        return int(self.record.get("world_size", 1))

    def _begin(self, attempt: int) -> None:
        self.attempt, self.record = attempt, read_attempt(self.run.objects, attempt)
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
        steps = self.feed.take(self.attempt, self.gate.state.last_step, joined.step, ranks)
        layers = tuple(self.record.get("steered_layers") or middle_layers(self.layers))
        may_command = self.control == "auto" and not self.channel.is_suspended and self.channel.refusal is None
        now = (joined.frames[0].phase, may_command)
        situation = Situation(phase=now[0], is_new=now != self.known, may_command=may_command)
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
    return PhaseEvent(
        event_id=event_id(joined.attempt, transition.step, decision.kind),
        step=transition.step,
        layer=None,
        kind=decision.kind,
        regime=regime,
        score=float(transition.evidence.get("mbe_relative", 0.0)),
        evidence={
            **transition.evidence,
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
