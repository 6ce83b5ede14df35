"""What `torch.jit` makes of an observed model is what it makes of any other.

It would compile every hook that it finds on a module. While a model is observed, it is given a stand-in of the same
class with the same parameters and attributes, but without our hooks: the model itself is not touched.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.jit import _builtins, _recursive

from entropy_hooks.holders import hold
from entropy_hooks.unhooked import twins_of_module

if TYPE_CHECKING:
    from collections.abc import Callable

_CREATE = "create_script_module"
"""A private name of torch's: where there is none, a hooked model cannot be scripted, and all else works."""


def keep_out(holder: object) -> None:
    """From now on scripting overlooks our hooks, until `holders.release`."""
    if hasattr(_recursive, _CREATE):
        hold(holder, _CREATE, _overlook_hooks)


def _overlook_hooks() -> Callable[[], None]:
    original = getattr(_recursive, _CREATE)
    ours = _wrap(original)
    setattr(_recursive, _CREATE, ours)

    def undo() -> None:
        # If somebody wrapped our wrapper, theirs stays: ours finds no hooks then.
        if getattr(_recursive, _CREATE) is ours:
            setattr(_recursive, _CREATE, original)

    return undo


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_script_module(nn_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(_unhooked(nn_module, {}), *args, **kwargs)

    return create_script_module


def _unhooked(module: Any, seen: dict[int, Any]) -> Any:
    """A module without our hooks, down to its last part; one that occurs twice stays one.

    Returns:
        A stand-in, or the module itself where neither it nor a part of it has any.
    """
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return module
    if id(module) not in seen:
        attributes = vars(module)
        twins = twins_of_module(attributes)
        parts = {name: _unhooked(part, seen) for name, part in attributes["_modules"].items()}
        if twins or any(part is not attributes["_modules"][name] for name, part in parts.items()):
            stand_in: nn.Module = object.__new__(type(module))
            vars(stand_in).update({name: twins.get(id(value), value) for name, value in attributes.items()})
            vars(stand_in)["_modules"] = parts
            seen[id(module)] = stand_in
        else:
            seen[id(module)] = module
    return seen[id(module)]


def share_builtin(ours: Callable[..., Any], original: Callable[..., Any]) -> None:
    """A scripted function that calls what we have wrapped compiles to the operator that it calls without us."""
    operator = _builtins._find_builtin(original)  # pyright: ignore
    if operator is not None:
        _builtins._register_builtin(ours, operator)  # pyright: ignore


def forget_builtin(ours: Callable[..., Any]) -> None:
    """The wrapper is gone."""
    _builtins._get_builtin_table().pop(id(ours), None)  # pyright: ignore
