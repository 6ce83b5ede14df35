"""While its twin runs, the model is guarded: a call that reaches it is stopped, an attribute that is set noticed."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from entropy_hooks.contained import ReachedOutError
from entropy_hooks.hidden import all_modules
from entropy_hooks.taps import takes_hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import nn

_CALL = "_compiled_call_impl"
"""What torch runs instead of a module's own call, where it is set."""
_MISSING = object()


@contextlib.contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """Within, this thread cannot call a module of the model.

    Args:
        model: the user's module, unwrapped.

    Raises:
        ReachedOutError: a module was called; or an attribute was set, which stays: another thread may have done it.
    """
    before = [(module, dict(vars(module))) for module in all_modules(model).values() if takes_hooks(module)]
    thread = threading.get_ident()
    for module, attributes in before:
        vars(module)[_CALL] = _refusal(module, attributes.get(_CALL), thread)
    try:
        yield
    finally:
        for module, attributes in before:
            if _CALL in attributes:
                vars(module)[_CALL] = attributes[_CALL]
            else:
                del vars(module)[_CALL]
    for module, attributes in before:
        if (name := _changed(vars(module), attributes)) is not None:
            raise ReachedOutError(f"sets {name!r} of the model by a way of its own (or another thread has)")


def _refusal(module: nn.Module, compiled: Callable[..., Any] | None, thread: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise ReachedOutError(f"calls a {type(module).__name__} of the model by a way of its own")
        return (compiled or module._call_impl)(*args, **kwargs)  # pyright: ignore[reportPrivateUsage]

    return call


def _changed(now: dict[str, Any], before: dict[str, Any]) -> str | None:
    names = [*before, *(now.keys() - before.keys())]
    return next((name for name in names if now.get(name, _MISSING) is not before.get(name, _MISSING)), None)
