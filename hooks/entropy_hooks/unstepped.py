"""A model that trains while no optimizer of ours is ever seen to step: nothing would be recorded, and nothing said."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entropy_hooks.faults import Faults
    from entropy_hooks.target import Target

MANY_PASSES = 100
"""Backward passes without a step, with parameters that change meanwhile: somebody steps, and we do not see it."""
TOO_MANY_PASSES = 1000
"""Whatever the parameters do (who writes to ``parameter.data`` leaves no trace): nobody accumulates so many."""


class Unstepped:
    """Looks at the backward passes since the last optimizer step, and counts a fault at most once a step."""

    def __init__(self, target: Target, faults: Faults) -> None:
        self._target, self._faults = target, faults
        self._versions: list[int] = []
        self._told = False

    def after_backward(self, count: int) -> None:
        """Another one has ended.

        Args:
            count: how many there have been since the last step.
        """
        if count < MANY_PASSES // 2:
            self._told = False
        elif count == MANY_PASSES // 2:
            self._versions = self._look()
        elif (count == MANY_PASSES and self._look() != self._versions) or (count == TOO_MANY_PASSES and not self._told):
            self._tell(count)

    def _look(self) -> list[int]:
        """How often each trained parameter has been written to: torch counts, and nothing waits for a device.

        Returns:
            Its counts.
        """
        return [parameter._version for parameter in self._target.model.parameters() if parameter.grad is not None]

    def _tell(self, count: int) -> None:
        self._told = True
        names = ", ".join(type(optimizer).__name__ for optimizer in self._target.optimizers)
        self._faults.count(
            "no_step",
            f"expected {names}.step() after the backward passes; found {count} passes and no step (another optimizer "
            "trains this model?): attach with the optimizer whose step() your loop calls",
        )
