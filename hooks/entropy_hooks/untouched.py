"""While its twin runs, the model is guarded: what reaches it all the same is stopped, and undone."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from entropy_hooks.hidden import all_modules
from entropy_hooks.taps import takes_hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import nn

_CALL = "_compiled_call_impl"
"""What torch runs instead of a module's own call, where it is set."""
_MISSING = object()


class ModelReachedError(RuntimeError):
    """The twin's code has run the model, or written to its attributes."""


@contextlib.contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """Within, this thread cannot call a module of the model; attributes that were set are put back at the end.

    Args:
        model: the user's module, unwrapped.

    Raises:
        ModelReachedError: a module was called, or an attribute set.
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
        written = [name for module, attributes in before for name in _put_back(vars(module), attributes)]
    if written:
        raise ModelReachedError(f"its forward sets {written[0]!r} of the model by a way of its own")


def _refusal(module: nn.Module, compiled: Callable[..., Any] | None, thread: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise ModelReachedError(f"its forward calls a {type(module).__name__} of the model by a way of its own")
        return (compiled or module._call_impl)(*args, **kwargs)  # pyright: ignore[reportPrivateUsage]

    return call


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    added = now.keys() - before.keys()
    for name in added:
        del now[name]
    changed = [name for name, value in before.items() if now.get(name, _MISSING) is not value]
    for name in changed:
        now[name] = before[name]
    return [*added, *changed]
