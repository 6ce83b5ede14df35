"""Copies of what users pass to a model, and of models, that nobody else can change."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

_Value = TypeVar("_Value")


def detached_copy(value: _Value, kept: dict[int, Any] | None = None) -> _Value:
    """Copy with everything in it, whatever objects hold the tensors.

    A deep copy makes objects anew without calling their constructors, and a tensor that two of them share stays shared.

    Args:
        value: any structure of containers, dataclasses, modules and tensors; tensors may be results of a graph.
        kept: by the id of an object, what stands for it in the copy; is filled with all that is copied.

    Returns:
        The same structure with detached clones of its tensors.

    Raises:
        Exception: whatever an object in it raises that cannot be copied (a generator: TypeError).

    >>> tokens = torch.zeros(2)
    >>> kept = detached_copy({"tokens": tokens})
    >>> _ = tokens.fill_(1)
    >>> kept["tokens"].tolist()
    [0.0, 0.0]
    """
    with _DetachedTensors():
        return copy.deepcopy(value, kept)


class _DetachedTensors(TorchFunctionMode):
    """Within, a deep copy takes a tensor's values alone; torch itself refuses one that is the result of a graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))
