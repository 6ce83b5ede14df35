"""Finding the tensors in what users pass to a model and get from it."""

from __future__ import annotations

import dataclasses
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_DEPTH = 4
"""Objects within objects."""
_NO_STRUCTURE = (type, FunctionType, MethodType, ModuleType, nn.Module)


def tensors_in(structure: Any, depth: int = _DEPTH) -> tuple[list[torch.Tensor], bool]:
    """All tensors of a structure, in order.

    Args:
        structure: containers that torch knows, dataclasses, and objects with tensors among their attributes.
        depth: objects within objects.

    Returns:
        The tensors, and whether `torch.utils._pytree` reaches all of them, so that it can put others in their place.

    >>> tensors_in((torch.zeros(2), {"a": 1, "b": torch.ones(3)}))
    ([tensor([0., 0.]), tensor([1., 1., 1.])], True)
    """
    if isinstance(structure, torch.Tensor):  # as most often
        return [structure], True
    return _search(structure, depth)


def _search(structure: Any, depth: int) -> tuple[list[torch.Tensor], bool]:
    found, reached = [], True
    for leaf in pytree.tree_leaves(structure):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif depth and (inside := _attributes(leaf)):
            more, _ = _search(inside, depth - 1)
            found += more
            reached = reached and not more
    return found, reached


def _attributes(leaf: Any) -> list[Any]:
    if isinstance(leaf, _NO_STRUCTURE):
        return []
    if dataclasses.is_dataclass(leaf):
        return [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
    return list(getattr(leaf, "__dict__", {}).values())
