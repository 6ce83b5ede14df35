"""The controller: feeds the GAPT gate step by step and says what it would do. Pure: no clock, no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from entropy_monitor.gapt import GatedPhaseTransition, Transition
    from entropy_monitor.types import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the gate's decisions meet."""

    phase: Phase
    """The phase that the newest frame was trained in."""
    is_new: bool
    """That phase, or who decides, has changed since the last call: the gate starts from what is."""
    may_command: bool
    """The watcher runs with ``--control auto``, no operator's command stands, and the trainer takes commands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A transition of the gate, and whether it is to be commanded or only advised."""

    kind: Literal["transition", "advice"]
    transition: Transition


def decide(
    gate: GatedPhaseTransition, steps: Sequence[tuple[int, float]], mbe: float, situation: Situation
) -> list[Decision]:
    """Feed optimizer steps to the gate.

    Args:
        gate: the state machine; it is advanced.
        steps: (step, rank-averaged CE) of every step since the last call, in order; the last one was measured.
        mbe: row-normalised MBE of the last step in nats, mean of the middle layers.
        situation: who decides.

    Returns:
        What the gate decided. Advice is what the controller would have done: until somebody changes the phase, the gate
        goes on as if it had been taken, so that nothing is said twice.
    """
    if situation.is_new and steps:
        gate.force(steps[0][0], situation.phase)
    decisions: list[Decision] = []
    for index, (step, ce) in enumerate(steps):
        transition = gate.update(step, ce, mbe if index == len(steps) - 1 else None)
        if transition is not None:
            kind = "transition" if situation.may_command else "advice"
            decisions.append(Decision(kind=kind, transition=transition))
    return decisions
