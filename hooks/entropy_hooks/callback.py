"""What the callbacks of all frameworks share: one monitor a training, from its first step to its end."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from entropy_hooks.attach import attach
from entropy_hooks.taps import unwrap
from entropy_monitor.config import load_config

if TYPE_CHECKING:
    import os

    from torch import nn
    from torch.optim import Optimizer

    from entropy_hooks.monitor import Monitor

_unfinished: weakref.WeakKeyDictionary[nn.Module, Monitor] = weakref.WeakKeyDictionary()
"""Monitors of trainings that a callback began and that have not ended: under way, or ended by an exception."""


class TrainingCallback:
    """Attaches when a training begins and detaches when it ends; one object may serve several, one after another.

    A training that raises is detached where the framework tells its callbacks. Where it does not, the next training
    of this model does so, the end of the process, or ``callback.monitor.detach()``.
    """

    def __init__(self, run: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self.run, self.options = run, options
        self.monitor: Monitor | None = None
        """Of the training under way, else of the last one; None before the first."""
        # Wrong options are told here, before a model is loaded.
        load_config(run=run, hooks={name: value for name, value in options.items() if name != "probe"})

    def __getstate__(self) -> dict[str, Any]:
        """Frameworks pickle and copy callbacks; threads and hooks stay with the original.

        Returns:
            The attributes without the monitor.
        """
        return {**self.__dict__, "monitor": None}

    def begin(self, model: nn.Module, optimizer: Optimizer, *, start_step: int, total_steps: int | None) -> None:
        """Attach to a training that is about to begin; the user's own ``start_step`` and ``total_steps`` have priority.

        Args:
            model: the model, wrapped or not.
            optimizer: the optimizer, wrapped or not.
            start_step: optimizer steps done before, when training was resumed.
            total_steps: optimizer steps planned, if that is known.
        """
        self.end()
        inner = unwrap(model)
        if (unfinished := _unfinished.pop(inner, None)) is not None:
            unfinished.detach()  # its optimizer steps no more
        options: dict[str, Any] = {"start_step": start_step, "total_steps": total_steps, **self.options}
        self.monitor = _unfinished[inner] = attach(model, optimizer, run=self.run, **options)

    def end(self) -> None:
        """Write every frame and detach; does nothing where that is done."""
        if self.monitor is not None:
            self.monitor.detach()

    def phase_metrics(self) -> dict[str, float]:
        """What belongs in the framework's own log: the commanded phase, where commands may steer.

        Returns:
            Phase (0 memorize, 1 compress) and the weight in force; nothing for an observer.
        """
        if self.monitor is None or not self.monitor.enabled or not self.monitor.options.steer:
            return {}
        control = self.monitor.phase_control
        return {"entropy/phase": float(control.phase == "compress"), "entropy/weight": control.weight_in_force}
