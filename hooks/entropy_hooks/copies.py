"""Copies of what users pass to a model, and of models, that nobody else can change."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_Value = TypeVar("_Value")


def detached_copy(value: _Value, kept: dict[int, Any] | None = None) -> _Value:
    """Copy with everything in it, whatever objects hold the tensors.

    A deep copy makes objects anew without calling their constructors, and a tensor that two of them share stays shared.

    Args:
        value: any structure of containers, dataclasses, modules and tensors; tensors may be results of a graph.
        kept: by the id of an object, what stands for it in the copy; is filled with all that is copied.

    Returns:
        The same structure with detached clones of its tensors; a leaf that requires a gradient still does.

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


def copy_of_model(model: nn.Module, kept: dict[int, Any]) -> nn.Module:
    """Copy a model, whatever it keeps: tensors that are views of one another stay such.

    Args:
        model: any module.
        kept: as in `detached_copy`.

    Returns:
        The copy.

    Raises:
        Exception: whatever an object in it raises that cannot be copied.
    """
    with _DetachedResults():
        return copy.deepcopy(model, kept)


class _DetachedResults(TorchFunctionMode):
    """Within, a deep copy takes the values of what is the result of a graph, which torch itself refuses to copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and self.separates(args[0]):
            original: torch.Tensor = args[0]
            copied = original.detach().clone()
            return copied.requires_grad_() if original.is_leaf and original.requires_grad else copied
        return func(*args, **(kwargs or {}))

    def separates(self, tensor: torch.Tensor) -> bool:
        """Whether it is copied by itself, and not by torch with the memory that it is a view of."""
        return not tensor.is_leaf


class _DetachedTensors(_DetachedResults):
    """The same for all tensors: an argument may be a view of a whole data set."""

    def separates(self, tensor: torch.Tensor) -> bool:
        return True
