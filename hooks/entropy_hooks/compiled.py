"""Whether a module is what `torch.compile` has made, asked without a word to the module's own ``__getattr__``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

IN_PLACE = "_compiled_call_impl"
"""Where ``module.compile()`` keeps what runs instead of the module's own call."""


def compiled_original(module: object) -> nn.Module | None:
    """What ``torch.compile(module)`` has wrapped.

    The type alone is asked: a model may answer to any name (with None, with an entry of its configuration), and a
    wrapper that passes every name on to a compiled module is none itself.

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
