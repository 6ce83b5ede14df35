"""Which modules a training loop calls: one pair of global module hooks, for the time of one iteration."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from entropy_hooks.untraced import untraced

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle


def anything_compiled() -> bool:
    """Whether dynamo has compiled something in this process.

    Then no global module hook may be installed: dynamo looks at every compiled frame anew, a module compiled in place
    shows itself as its graph instead of as itself, and ``torch.compile(model)`` warns the user about the hook.

    Returns:
        True from the first `torch.compile` on.
    """
    backends = getattr(sys.modules.get("torch._dynamo.eval_frame"), "cached_backends", {})
    return any(backend is not None for backend in backends.values())  # None: something was excluded from compiling


class RootCalls:
    """Outermost modules that this thread calls with gradients enabled."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._inside: nn.Module | None = None
        self._roots: dict[int, nn.Module] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        """In the order of their first call."""
        return tuple(self._roots.values())

    def listen(self) -> None:
        """Install the hooks."""
        self._handles = [
            register_module_forward_pre_hook(untraced(self._enter)),
            register_module_forward_hook(untraced(self._leave), always_call=True),
        ]

    def stop_listening(self) -> None:
        """Remove the hooks; safe within them and anywhere else on the training thread."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forget(self) -> None:
        """Keep none of them alive."""
        self._roots, self._inside = {}, None

    def end_iteration(self) -> None:
        """No module can be running any more, whatever exceptions have done to the count."""
        self._inside = None

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._inside is None and threading.get_ident() == self._thread and torch.is_grad_enabled():
            self._inside = module
            self._roots.setdefault(id(module), module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._inside is module:
            self._inside = None
