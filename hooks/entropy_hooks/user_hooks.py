"""Hooks that others have put on a model's modules: the user's own, and those that are a part of what it computes."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from torch.nn.modules import module as global_hooks

from entropy_hooks.hidden import all_modules
from entropy_hooks.placed import Placed
from entropy_hooks.taps import takes_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TORCH_S_OWN = ("torch.nn.utils.", "torch.ao.")
"""Where torch's own hooks are defined that belong to what a module computes: weight norm, spectral norm, pruning; the
observers of quantization."""
_REQUIRES_GRADIENTS = "make_inputs_require_grads"
"""What transformers and PEFT put on an embedding, so that checkpointing differentiates through frozen layers."""


def hooks_everywhere() -> bool:
    """Whether somebody has global module hooks, which would be called for the twin too.

    Returns:
        True or False.
    """
    return any(getattr(global_hooks, f"_global{name}", None) for name in _KINDS)


def every_hook(module: nn.Module) -> Iterator[Any]:
    """Hooks of all kinds, those for saving and loading too.

    Args:
        module: any.

    Yields:
        What was registered.
    """
    for name, value in vars(module).items():
        if "hook" in name and isinstance(value, dict):
            yield from value.values()


def keep_computing(module: nn.Module) -> None:
    """Take all others out of a copy of a module than those that belong to what it computes."""
    for name in _KINDS:
        hooks = vars(module)[name]
        vars(module)[name] = OrderedDict((key, hook) for key, hook in hooks.items() if is_computing(hook))


def user_hooked(model: nn.Module) -> str | None:
    """Look for hooks of the user's that are called when the model runs, or its backward pass.

    Args:
        model: the user's module, unwrapped.

    Returns:
        Where the first was found; None without any.
    """
    for path, module in all_modules(model).items():
        if takes_hooks(module):
            hooks = [hook for name in _KINDS for hook in vars(module)[name].values()]
            if not all(isinstance(hook, Placed) or is_computing(hook) for hook in hooks):
                return path or type(module).__name__
    return None


def is_computing(hook: Any) -> bool:
    """Whether a hook belongs to what the module computes, and keeps nothing.

    Returns:
        True or False.
    """
    from_torch = str(getattr(hook, "__module__", "")).startswith(_TORCH_S_OWN)
    return from_torch or getattr(hook, "__name__", "") == _REQUIRES_GRADIENTS
