"""An optimizer's own count of its steps, as Adam and its relatives keep it in their state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.optim import Optimizer


class OwnCount:
    """The count at the moment this is made, on the training thread; a device is never waited for there."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._value: int | None = None
        self._copy: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        step = _first_step(optimizer)
        if isinstance(step, torch.Tensor) and step.is_cuda:
            self._copy = torch.empty_like(step, device="cpu", pin_memory=True).copy_(step, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        elif isinstance(step, torch.Tensor):
            self._value = int(step.item()) if step.device.type == "cpu" else None
        elif isinstance(step, int | float):
            self._value = int(step)

    def read(self, *, wait: bool) -> int | None:
        """The count.

        Args:
            wait: wait for the device that holds it; never on the training thread.

        Returns:
            The count; None when the optimizer keeps none, or when it is not here yet.
        """
        if self._copy is not None and self._copied is not None:
            if wait:
                self._copied.synchronize()
            if self._copied.query():
                self._value, self._copy = int(self._copy.item()), None
        return self._value


def _first_step(optimizer: Optimizer) -> object:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)  # never by index: it is a defaultdict
            if isinstance(state, dict) and "step" in state:
                return state["step"]
    return None
