"""The training passes of one model: when they begin and end, which of them leads to the step, and what its loss is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

import torch

from entropy_hooks import backward
from entropy_hooks.entry import Entry
from entropy_hooks.loss import LossReading, read_loss
from entropy_hooks.micro_batches import MicroBatches
from entropy_hooks.probe_loss import depends_on
from entropy_hooks.taps import parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from entropy_hooks.faults import Faults
    from entropy_hooks.guard import Guard
    from entropy_hooks.target import Target

_MAX_LOOKS = 3
"""Backward passes of unseen origin whose graph is walked, in search of a model that was compiled meanwhile."""


class PassListener(Protocol):
    """Is told of the passes; exceptions are counted and go no further."""

    def begin_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called in a training pass."""

    def end_forward(self, output: Any) -> None:
        """A call of the model is about to end."""

    def begin_backward(self, loss: LossReading | None) -> None:
        """The backward pass of a training pass begins; None where its loss could not be read."""

    def end_backward(self) -> None:
        """A backward pass has ended."""


class Passes:
    """Tells one listener of the passes, until `remove`."""

    def __init__(self, target: Target, listener: PassListener, guard: Guard, faults: Faults) -> None:
        self._target, self._listener, self._guard, self._faults = target, listener, guard, faults
        self.micro_batches = MicroBatches()
        self._part_handles: list[RemovableHandle] = []
        self._looks = 0
        self.loss: LossReading | None = None
        """Of the newest backward pass of this step."""
        self.on_forward: Callable[[], None] | None = None
        """Is called before the listener when a training pass begins."""
        enter, leave = guard(self._enter, always=True), guard(self._leave, always=True)
        self.entry = Entry(target.called, target.model, enter, leave)
        backward.listen(self)

    @property
    def compiled(self) -> bool:
        """All or a part of the model runs as a compiled graph."""
        return self.entry.compiled

    def open_parts(self) -> None:
        """Watch the model's parts too, for a loop that never calls the model as a whole.

        Called before the layers' own hooks are installed, so that a part is entered before any of them looks; once they
        are, `close_parts` has it left behind them.
        """
        enter = self._guard(self._enter_part, always=True)
        for part in parts(self._target.model, self._target.taps):
            self._part_handles.append(part.register_forward_pre_hook(enter.on(part)))

    def close_parts(self) -> None:
        """Have the parts left after all the layers' own hooks."""
        leave = self._guard(self._leave_part, always=True)
        for part in parts(self._target.model, self._target.taps):
            self._part_handles.append(part.register_forward_hook(leave.on(part), always_call=True))

    def remove(self) -> None:
        """Take everything away."""
        backward.unlisten(self)
        self.entry.remove()
        self._remove_parts()

    def end_step(self) -> None:
        """The optimizer has stepped."""
        self.loss = None
        self.micro_batches.step()

    # ---- forward -----------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.micro_batches.enter_forward(with_gradients=torch.is_grad_enabled()):
            return
        if not self.compiled:  # a graph that was compiled with the hooks is left as it is
            self._remove_parts()  # this loop calls the model as a whole
        if self.on_forward is not None:
            self.on_forward()
        self._listener.begin_forward(args, kwargs)

    def _enter_part(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.micro_batches.enter_part(with_gradients=torch.is_grad_enabled())

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        try:
            self._listener.end_forward(output)
        finally:
            self.micro_batches.leave_forward()

    def _leave_part(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.micro_batches.leave_forward()

    def _remove_parts(self) -> None:
        while self._part_handles:
            self._part_handles.pop().remove()

    # ---- backward ----------------------------------------------------------------------------------------------------

    def before_backward(self, roots: tuple[Any, ...], gradients: Any) -> None:
        """A backward pass from `roots` begins; see `backward.BackwardListener`."""
        self._guard.run(self._begin_backward, roots, gradients)

    def after_backward(self) -> None:
        """The backward pass has ended."""
        self.micro_batches.leave_backward()
        self._listener.end_backward()

    def _begin_backward(self, roots: tuple[Any, ...], gradients: Any) -> None:
        if not self.micro_batches.enter_backward():
            self._look_for_compiled(roots)
            return
        self.loss = None
        try:
            self.loss = read_loss(roots, gradients)
        finally:
            self._listener.begin_backward(self.loss)

    def _look_for_compiled(self, roots: tuple[Any, ...]) -> None:
        """A backward pass whose forward pass was not seen: is it our model's, compiled since we looked?"""
        if self.compiled or self.micro_batches.count or self._looks == _MAX_LOOKS or "torch._dynamo" not in sys.modules:
            return
        self._looks += 1
        tensors = [root for root in roots if isinstance(root, torch.Tensor) and root.grad_fn is not None]
        ours = any(depends_on(root, self._target.model.parameters()) for root in tensors)
        if ours and not self.entry.look_again():
            self._faults.count(
                "not_observed",
                "expected to see the model run; found a backward pass through it alone (compiled inside a larger "
                "function?): compile the model itself, and give attach what torch.compile returned",
            )
