"""What is worth a mark on the time axis, with the reason in words. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from entropy_monitor.store import event_id
from entropy_monitor.types import PhaseEvent, Regime
from entropy_monitor.watcher.detectors.plateau import describe_plateau

if TYPE_CHECKING:
    from collections.abc import Iterator

    from entropy_monitor.watcher.controller import Decision
    from entropy_monitor.watcher.detectors.sign import SignConclusion
    from entropy_monitor.watcher.follow import JoinedStep
    from entropy_monitor.watcher.trends import Trends, TrendState

_SIGNS = {-1: "negative", 0: "undetermined", 1: "positive"}


def trend_events(joined: JoinedStep, before: Trends, now: Trends, state: TrendState) -> list[PhaseEvent]:
    """Tell what the detectors conclude now and did not before.

    Args:
        joined: the step.
        before: conclusions after the step before.
        now: conclusions after this step.
        state: what the detectors remember.

    Returns:
        One event for each change.
    """

    def event(kind: str, score: float, reason: str, about: str = "", **evidence: Any) -> PhaseEvent:
        return PhaseEvent(
            event_id=event_id(joined.attempt, joined.step, f"{kind}{about}"),
            step=joined.step,
            layer=None,
            kind=kind,
            regime=now.regime,
            score=score,
            evidence={"reason": reason, **evidence, "attempt": joined.attempt},
        )

    def changes() -> Iterator[PhaseEvent]:
        if now.regime != before.regime:
            regime = state.regime
            reason = f"row-normalised MBE {regime.level:.4f} nats changes by {regime.slope:+.2e} nats a sample"
            yield event("regime", regime.slope, reason, before=before.regime)
        if now.plane.stage != before.plane.stage:
            yield event("stage", 0.0, _stage_reason(now), stage=now.plane.stage, before=before.plane.stage)
        for name, old, new in (
            ("alignment_weight", before.weight_sign, now.weight_sign),
            ("alignment_activation", before.activation_sign, now.activation_sign),
        ):
            if new.sign != old.sign:
                reason = f"{name} is {_SIGNS[new.sign]}, was {_SIGNS[old.sign]}"
                yield event("sign", float(new.sign), reason, name, before=_SIGNS[old.sign])
            if new.is_undersampled and not old.is_undersampled:
                yield event("alert", new.flip_fraction, _undersampled_reason(name, new), name)
        if now.cycle.is_cycle and not before.cycle.is_cycle:
            yield event("cycle", now.cycle.false_alarm, _cycle_reason(now))
        if now.plateau.is_stopped and not before.plateau.is_stopped:
            yield event("plateau", now.plateau.best, describe_plateau(now.plateau))

    return list(changes())


def _stage_reason(now: Trends) -> str:
    plane = now.plane
    if plane.stage == "undetermined":
        return "the last moves on the information plane are neither fitting nor compression"
    what = "I(X;Z) and I(Y;Z) rise" if plane.stage == "fitting" else "I(X;Z) falls, I(Y;Z) does not"
    return f"{what} since step {plane.began} (within steps {plane.earliest} to {plane.latest})"


def _undersampled_reason(name: str, found: SignConclusion) -> str:
    return (
        f"undersampled: optimizer-scale oscillation: {name} changes its sign in {100 * found.flip_fraction:.0f} % of "
        "the samples; sample more often to see it"
    )


def _cycle_reason(now: Trends) -> str:
    return (
        f"alignment_weight has a cycle of about {now.cycle.period_steps:.0f} steps: chance at most "
        f"{now.cycle.false_alarm:.1g} in AR(1) noise"
    )


def decision_event(joined: JoinedStep, decision: Decision, regime: Regime) -> PhaseEvent:
    """Tell a transition or an advice of the gate.

    Returns:
        The event.
    """
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


def fault_event(joined: JoinedStep) -> PhaseEvent:
    """Tell what was wrong with a step's frames.

    Returns:
        The event.
    """
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
