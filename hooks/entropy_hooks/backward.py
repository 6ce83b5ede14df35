"""One reference-counted wrapper of `torch.autograd.backward`, shared by all monitors of the process.

One patch sees `Tensor.backward`, GradScaler, Accelerate, Lightning and the Hugging Face Trainer. While it is on the
stack, gradient hooks record and inject; `torch.autograd.grad` and other calls pass untouched.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd.graph import GradientEdge

from entropy_hooks.holders import hold, release
from entropy_hooks.unscripted import forget_builtin, share_builtin
from entropy_hooks.untraced import untraced

if TYPE_CHECKING:
    from collections.abc import Callable


class BackwardListener(Protocol):
    """Is told of every backward pass; must not raise."""

    def before_backward(self, roots: tuple[Any, ...], gradients: Any) -> None:
        """A backward pass from `roots` is about to begin."""

    def after_backward(self) -> None:
        """The backward pass has ended, with or without an exception."""


_listeners: list[BackwardListener] = []
_depth = threading.local()
"""How many calls of the wrapper are on each thread's stack."""


def listen(listener: BackwardListener) -> None:
    """Tell a listener of every backward pass from now on."""
    hold(listener, "torch.autograd.backward", _wrap_backward)
    _listeners.append(listener)


def unlisten(listener: BackwardListener) -> None:
    """Stop telling it; the last one to leave restores the original function."""
    with contextlib.suppress(ValueError):  # it is told no more
        _listeners.remove(listener)
    release(listener)


def _wrap_backward() -> Callable[[], None]:
    original = torch.autograd.backward
    ours = _wrap(original)
    share_builtin(ours, original)
    torch.autograd.backward = ours

    def undo() -> None:
        # If somebody wrapped our wrapper, theirs stays: with no listener left, ours only passes calls on.
        if torch.autograd.backward is ours:
            torch.autograd.backward = original
            forget_builtin(ours)

    return undo


def _tell_before(listeners: tuple[BackwardListener, ...], roots: tuple[Any, ...], gradients: Any) -> None:
    for listener in listeners:
        listener.before_backward(roots, gradients)


def _tell_after(listeners: tuple[BackwardListener, ...]) -> None:
    for listener in listeners:
        listener.after_backward()


def _wrap(original: Callable[..., None]) -> Callable[..., None]:
    tell_before, tell_after = untraced(_tell_before), untraced(_tell_after)

    @functools.wraps(original)
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        listeners = tuple(_listeners)
        if not listeners:
            return original(tensors, grad_tensors, *args, **kwargs)
        if torch.overrides.is_tensor_like(tensors) or isinstance(tensors, GradientEdge):
            roots = (tensors,)
        else:
            roots = tensors = tuple(tensors)  # an iterator can be read only once
        # A reentrant call (checkpointing) is a part of the outer pass, not one of its own.
        outermost = getattr(_depth, "calls", 0) == 0
        if outermost:
            tell_before(listeners, roots, grad_tensors)
        _depth.calls = getattr(_depth, "calls", 0) + 1
        try:
            original(tensors, grad_tensors, *args, **kwargs)
        finally:
            _depth.calls -= 1
            if outermost:
                tell_after(listeners)
        return None

    return backward
