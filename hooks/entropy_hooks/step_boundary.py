"""When one optimizer step ends and the next begins, with one optimizer or several."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from entropy_hooks.placed import Placed
from entropy_hooks.untraced import untraced

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from entropy_hooks.target import Target


class StepBoundary:
    """Calls `before` when the first optimizer is about to step, `after` when the last one has.

    A step is one round of all optimizers. A training pass that begins before all have stepped ends the round (one of
    them steps every second time): the others sit it out. A wrapper's step is one of all that it wraps, and what these
    step within it is a part of it.
    """

    def __init__(self, target: Target, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._before, self._after = before, after
        self._awaited = self._all = frozenset(map(id, target.optimizers))
        self._wraps = {id(wrapper): inner for wrapper, inner in target.wrappers}
        """For each wrapper, the optimizers whose step its own is."""
        self._under_way: set[int] = set()
        """Wrappers that are stepping."""
        self._handles: list[RemovableHandle] = []
        self._hooks: weakref.WeakSet[Placed] = weakref.WeakSet()
        for optimizer in (*target.optimizers, *(wrapper for wrapper, _ in target.wrappers)):
            enter, leave = (self._place(optimizer, act, target.model) for act in (self._enter, self._leave))
            self._handles.append(optimizer.register_step_pre_hook(enter))
            self._handles.append(optimizer.register_step_post_hook(leave))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _place(self, optimizer: Optimizer, act: Callable[..., None], model: nn.Module) -> Placed:
        # `attach(nn.ModuleDict({...}), ...)`: a container that nobody else keeps lives as long as what trains it.
        hook = Placed(optimizer, untraced(act), keeps=model)
        self._hooks.add(hook)
        return hook

    def begin_forward(self) -> None:
        """A training pass begins."""
        if self._awaited != self._all:
            self._end_round()

    def _steps(self, optimizer: Optimizer) -> frozenset[int]:
        return self._wraps.get(id(optimizer), frozenset((id(optimizer),)))

    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._under_way:  # its last step has raised
            self._under_way.clear()
        if not self._steps(optimizer) <= self._awaited:  # it steps again, and no pass was seen between
            self._end_round()
        if self._awaited == self._all and not self._under_way:
            self._before()
        if id(optimizer) in self._wraps:
            self._under_way.add(id(optimizer))

    def _leave(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._wraps:
            if id(optimizer) not in self._under_way:
                return  # the round in which its step began is over
            self._under_way.discard(id(optimizer))
        self._awaited -= self._steps(optimizer)
        if not self._awaited and not self._under_way:
            self._end_round()

    def _end_round(self) -> None:
        self._awaited = self._all
        self._under_way.clear()  # also one whose step has raised
        self._after()
