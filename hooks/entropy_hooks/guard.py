"""What stands between our hooks and the training job."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from entropy_hooks import holders, unsaved, unscripted
from entropy_hooks.compiled import compiles_here
from entropy_hooks.placed import Placed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import nn

    from entropy_hooks.faults import Faults
    from entropy_hooks.meter import Meter

# Dynamo takes the first for True and looks no further; in a frame that it does not trace, it is False.
_is_traced, _is_compiling = torch.compiler.is_dynamo_compiling, torch.compiler.is_compiling
_transform_level: Callable[[], int | None] = getattr(torch._C._functorch, "maybe_current_level", lambda: None)  # pyright: ignore
"""None outside the transforms of `torch.func`; a private name of torch's."""


class Hook(Placed):
    """A hook on one module; the first argument of its action is that module.

    In a graph that is being compiled it leaves no trace.
    """

    __slots__ = ("_always", "_guard")

    def __init__(self, module: nn.Module, action: Callable[..., None], guard: Guard, *, always: bool) -> None:
        super().__init__(module, action)
        self._guard, self._always = guard, always

    def __call__(self, owner: object, *args: Any) -> None:
        """The module, or a copy of it, is called."""
        if _is_traced() or (_is_compiling() and compiles_here()):
            return
        guard = self._guard
        if (self._always or guard.active) and owner is self._owner() and guard.observes():
            guard.run(self._act, owner, *args)


@dataclass(frozen=True, slots=True)
class Guarded:
    """An action that is yet to be placed."""

    guard: Guard
    action: Callable[..., None]
    always: bool

    def on(self, module: nn.Module) -> Hook:
        """Place it.

        Args:
            module: whose hook it will be; for a copy of it, the hook does nothing.

        Returns:
            What to register, once.
        """
        hook = Hook(module, self.action, self.guard, always=self.always)
        self.guard.hooks.add(hook)
        unscripted.keep_out(self.guard)
        unsaved.keep_out(type(module), self.guard)
        if (later := getattr(module, "cls_to_become", None)) is not None:  # a lazy module's, from its first pass on
            unsaved.keep_out(later, self.guard)
        return hook


class Guard:
    """Counts the time of hooks and their exceptions: neither may reach the training job."""

    def __init__(self, faults: Faults, meter: Meter) -> None:
        self._faults, self._meter = faults, meter
        self.active = False
        """Hooks that are not always called have something to do in this step."""
        self.transformed = False
        """In this step a hook was called inside a transform of `torch.func`, which is not observed."""
        self._silent = False
        self.hooks: weakref.WeakSet[Hook] = weakref.WeakSet()
        """Those that are placed, and in copies."""

    def __call__(self, hook: Callable[..., None], *, always: bool = False) -> Guarded:
        """Make a hook harmless.

        Args:
            hook: what to call.
            always: also on a step on which hooks are not active.

        Returns:
            What makes a hook for each module.
        """
        return Guarded(self, hook, always)

    def release(self) -> None:
        """The hooks have been removed: any that is left in some copy is dead from now on."""
        for hook in list(self.hooks):
            hook.remove()
        self.hooks.clear()
        holders.release(self)

    def observes(self) -> bool:
        """Whether the module that runs now is run for its training, and by torch's own autograd.

        Returns:
            False while silenced, while `torch.jit.trace` records and inside `torch.func.grad`, `vmap` and the like.
        """
        if self._silent or torch._C._get_tracing_state() is not None:  # pyright: ignore
            return False
        if _transform_level() is not None:
            self.transformed = True
            return False
        return True

    def run(self, action: Callable[..., object], *args: Any) -> None:
        """Call something of ours."""
        with self._meter:
            try:
                action(*args)
            except Exception as error:
                self._faults.count("hook_error", error)

    @contextlib.contextmanager
    def silenced(self) -> Generator[None]:
        """Within, the model runs for our own sake: nothing is observed, counted or steered."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False
