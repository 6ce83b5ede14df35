"""The training passes of one model: when they begin and end, which of them leads to the step, and what its loss is."""

from __future__ import annotations

import functools
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.hooks import unserializable_hook

from entropy_hooks import backward
from entropy_hooks.entry import Entry
from entropy_hooks.loss import LossReading, read_loss
from entropy_hooks.micro_batches import MicroBatches
from entropy_hooks.probe_loss import depends_on
from entropy_hooks.structures import tensors_in
from entropy_hooks.taps import parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from entropy_hooks.capture import Capture
    from entropy_hooks.faults import Faults
    from entropy_hooks.guard import Guard
    from entropy_hooks.kept import Kept
    from entropy_hooks.target import Target

_MAX_LOOKS = 3
"""Backward passes of unseen origin whose graph is walked, in search of a model that was compiled meanwhile."""


class PassListener(Protocol):
    """Is told of the passes; exceptions are counted and go no further."""

    def begin_pass(self) -> None:
        """A training pass begins, `Passes.current`."""

    def begin_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In it, the model as a whole is called."""

    def end_forward(self, output: Any) -> None:
        """That call is about to end."""

    def begin_backward(self, seen: Pass) -> None:
        """The backward pass of a training pass has reached its output; it is the newest of those that were reached."""

    def end_backward(self) -> None:
        """That backward pass has ended."""


@dataclass(slots=True, eq=False)
class Pass:
    """One training pass."""

    number: int
    thread: int
    """Where it runs; its backward pass is called from the same thread."""
    capture: Capture | None = None
    """What the listener gathers of it."""
    kept: Kept | None = None
    """What the listener keeps of it, to run it again."""
    announced: bool = False
    """Its output tells when a gradient comes. Else the next backward pass is taken for its own."""
    num_backwards: int = 0
    """Backward passes that have reached it; a loop may run several, one for each loss."""
    loss: LossReading | None = None
    """Of these."""

    @property
    def consumed(self) -> bool:
        """Its backward pass has come."""
        return self.num_backwards > 0


class Passes:
    """Tells one listener of the passes, until `remove`.

    Whether a backward pass is ours is told by a gradient that comes to our model's output, since another model's loss
    may be differentiated between our forward and our backward pass, in this thread or in another.
    """

    def __init__(self, target: Target, listener: PassListener, guard: Guard, faults: Faults) -> None:
        self._target, self._listener, self._guard, self._faults = target, listener, guard, faults
        self.micro_batches = MicroBatches()
        self._part_handles: list[RemovableHandle] = []
        self._looks = 0
        self.current: Pass | None = None
        """The newest training pass, until the step in which it was consumed has ended."""
        self.newest: Pass | None = None
        """The newest pass that a backward pass has reached: a checkpointed block runs again in it."""
        self._num_passes = 0
        self._backward: _Backward | None = None
        """The backward pass under way in the thread of the newest pass, be it ours or not."""
        self.loss: LossReading | None = None
        """Of the newest backward pass of this step."""
        self.on_forward: Callable[[], None] | None = None
        """Is called before the listener when a training pass begins."""
        enter, leave = guard(self._enter, always=True), guard(self._leave, always=True)
        self.entry = Entry(target, enter, leave)
        backward.listen(self)

    @property
    def compiled(self) -> bool:
        """All or a part of the model runs as a compiled graph."""
        return self.entry.compiled

    @property
    def roots(self) -> tuple[Any, ...]:
        """Of the backward pass under way."""
        return () if self._backward is None else self._backward.roots

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
        self.current = self.newest = None

    def end_step(self) -> None:
        """The optimizer has stepped."""
        self.loss = None
        if self.newest is not None:
            self.newest.kept = None  # an output that the user collects holds the pass
        if self.current is not None and self.current.consumed:
            self.current.kept = None
            self.current = None
        self.newest = None
        self.micro_batches.step()

    # ---- forward -----------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.micro_batches.enter_forward(module, with_gradients=torch.is_grad_enabled()):
            return
        if not self.compiled:  # a graph that was compiled with the hooks is left as it is
            self._remove_parts()  # this loop calls the model as a whole
        self._begin_pass()
        self._listener.begin_forward(args, kwargs)

    def _enter_part(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.micro_batches.enter_part(module, with_gradients=torch.is_grad_enabled()):
            self.begin_if_consumed()

    def begin_if_consumed(self) -> None:
        """A layer runs: in the pass under way, or in a new one, as in a call that runs backward several times."""
        if self.current is None or self.current.consumed:
            self._begin_pass()

    def _begin_pass(self) -> None:
        if self.on_forward is not None:
            self.on_forward()
        self._num_passes += 1
        self.micro_batches.begin()
        self.current = Pass(self._num_passes, threading.get_ident())
        self._listener.begin_pass()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        try:
            if self.micro_batches.in_forward:
                self._announce(output)
            self._listener.end_forward(output)
        finally:
            self.micro_batches.leave_forward(module)

    def _leave_part(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        try:
            if self.micro_batches.in_forward and self.micro_batches.num_calls == 1:
                self._announce(output)
        finally:
            self.micro_batches.leave_forward(module)

    def _announce(self, output: Any) -> None:
        """Have the tensors that leave the model tell when their gradients come."""
        current = self.current
        if current is None:
            return
        for leaf in tensors_in(output)[0]:
            # What has no history of its own (a parameter) would keep the hook for ever.
            if leaf.grad_fn is not None:
                # Who saves this output is not warned of our hook on it.
                leaf.register_hook(unserializable_hook(functools.partial(self._announced, current)))
                current.announced = True

    def _remove_parts(self) -> None:
        while self._part_handles:
            self._part_handles.pop().remove()

    # ---- backward ----------------------------------------------------------------------------------------------------

    def before_backward(self, roots: tuple[Any, ...], gradients: Any) -> None:
        """A backward pass from `roots` begins; see `backward.BackwardListener`."""
        current, thread = self.current, threading.get_ident()
        if self._target.is_gone:
            return
        if current is None or current.thread == thread:
            self._guard.run(self._begin_backward, thread, roots, gradients)

    def after_backward(self) -> None:
        """The backward pass has ended."""
        if self._backward is not None and self._backward.thread == threading.get_ident():
            reached, self._backward = self._backward.reached, None
            self.micro_batches.leave_backward()
            if reached:
                self._guard.run(self._listener.end_backward)

    def _begin_backward(self, thread: int, roots: tuple[Any, ...], gradients: Any) -> None:
        current = self.current
        if current is None:
            self._look_for_compiled(roots)
            return
        self._backward = under_way = _Backward(thread, roots)
        try:
            under_way.loss = read_loss(roots, gradients)
        finally:
            if not current.announced and not current.consumed:
                self._consume(current, under_way)

    def _announced(self, seen: Pass, gradient: torch.Tensor) -> None:
        """A tensor hook: the gradient of a pass's output has come."""
        if self._backward is not None:
            self._guard.run(self.reach, seen)

    def reach(self, seen: Pass) -> bool:
        """A gradient has come to a pass: to its output, or to a layer whose hook is called before that of the output.

        Returns:
            Whether it is that of a backward pass of its own, and not of `torch.autograd.grad` or of an older pass.
        """
        under_way = self._backward
        if under_way is None:
            return False
        if not seen.consumed or (seen is self.newest and seen.number not in under_way.reached):
            self._consume(seen, under_way)
        return seen.number in under_way.reached

    def first_loss(self, seen: Pass) -> LossReading | None:
        """A gradient has come: whose loss is it?

        Returns:
            The loss of the pass's own first backward pass; None in any other.
        """
        return seen.loss if self.reach(seen) and seen.num_backwards == 1 else None

    def _consume(self, seen: Pass, under_way: _Backward) -> None:
        self.micro_batches.enter_backward(again=seen.consumed)
        seen.num_backwards += 1
        seen.loss = under_way.loss if seen.loss is None or under_way.loss is None else seen.loss.plus(under_way.loss)
        self.loss = seen.loss
        is_newest = seen.number > max(under_way.reached, default=0)
        under_way.reached.add(seen.number)
        if is_newest:
            self.newest = seen
            self._listener.begin_backward(seen)

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


@dataclass(slots=True)
class _Backward:
    thread: int
    roots: tuple[Any, ...]
    """What it was called with."""
    loss: LossReading | None = None
    reached: set[int] = field(default_factory=set[int])
    """Numbers of the passes that it has reached."""
