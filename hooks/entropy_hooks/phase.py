"""The phase in force, and the callbacks that want to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from entropy_hooks.delivery import Pending
    from entropy_hooks.faults import Faults
    from entropy_hooks.pulse import Pulse
    from entropy_monitor.types import Phase

DEFAULT_WEIGHT = 0.03


class PhaseControl:
    """Applies commands at optimizer-step boundaries, each at most once; an attempt starts in memorize."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._callbacks: list[Callable[[Phase, float], None]] = []
        self.phase: Phase = "memorize"
        self.weight = DEFAULT_WEIGHT

    @property
    def weight_in_force(self) -> float:
        """Weight that the loss carries now: 0 while memorizing."""
        return self.weight if self.phase == "compress" else 0.0

    def add_callback(self, callback: Callable[[Phase, float], None]) -> None:
        """Call ``callback(phase, weight)`` after each change, on the training thread."""
        self._callbacks.append(callback)

    def apply_pending(self, pulse: Pulse, step: int) -> None:
        """Take the commands that have come, in order, before step `step` begins.

        The acknowledgement is created first: if the trainer is killed in between, the command counts as applied and is
        never applied again.
        """
        for pending in pulse.delivery.due(step):
            if pulse.answer(pending.number, "applied", step, _describe(pending)):
                self._apply(pending)

    def _apply(self, pending: Pending) -> None:
        command = pending.command
        if command.phase == "auto":
            return
        self.phase = command.phase
        # Absolute: what an earlier command had set does not linger.
        self.weight = DEFAULT_WEIGHT if command.weight is None else command.weight
        for callback in self._callbacks:
            try:
                callback(self.phase, self.weight_in_force)
            except Exception as error:  # the user's code, but not the user's training step
                self._faults.count("callback_failed", error)


def _describe(pending: Pending) -> str:
    if pending.command.phase == "auto":
        return "the controller is free again; phase and weight stay as they are"
    return pending.command.phase
