"""What `torch.compile` has made, and whether it is at work in this thread."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import _guards

if TYPE_CHECKING:
    from torch import nn

IN_PLACE = "_compiled_call_impl"
"""Where ``module.compile()`` keeps what runs instead of the module's own call."""


def compiled_original(module: object) -> nn.Module | None:
    """What ``torch.compile(module)`` has wrapped.

    The type alone is asked, and never the module's ``__getattr__``: a model may answer to any name (with None, with an
    entry of its configuration), and a wrapper that passes every name on to a compiled module is none itself.

    Args:
        module: any object.

    Returns:
        The user's module; None where `module` is no such wrapper.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # nothing can be compiled before it is imported
    wrapper = getattr(dynamo, "OptimizedModule", None)
    if wrapper is None or not issubclass(type(module), wrapper):
        return None
    return vars(module).get("_modules", {}).get("_orig_mod")  # none yet, where another thread is making it


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether somebody has called ``module.compile()``.

    Returns:
        True or False.
    """
    return vars(module).get(IN_PLACE) is not None


def only_compiled_part(model: nn.Module) -> nn.Module | None:
    """A direct child that is compiled, and has all the parameters that are trained.

    Args:
        model: any module.

    Returns:
        The child, or its wrapper; None without such a one.
    """
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for part in model.children():
        if compiled_original(part) is not None or is_compiled_in_place(part):
            return part if trained <= {id(parameter) for parameter in part.parameters()} else None
    return None


def compiles_here() -> bool:
    """While `torch.compiler.is_compiling`, which is true in all threads of the process: is it this one that compiles?

    Returns:
        Whether this thread compiles, or exports.
    """
    return _guards.CompileContext.try_get() is not None or _guards.TracingContext.try_get() is not None
