"""Functions and weak references of a model, made to refer to its twin.

A deep copy leaves them as they are: a ``forward`` that somebody has wrapped in a closure, or compiled by itself, would
run the model where the twin is meant, and change what it keeps from call to call.
"""

from __future__ import annotations

import functools
import random
import types
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from entropy_hooks.copies import detached_copy
from entropy_hooks.hidden import OWN_ATTRIBUTES

if TYPE_CHECKING:
    from collections.abc import Iterable

_CHANGEABLE = (list, dict, set, deque, torch.Tensor, torch.Generator, np.ndarray, np.random.Generator, random.Random)
"""What a function may keep in its closure, to be changed at each call."""
_REFERRING = (types.FunctionType, types.MethodType, weakref.ref, functools.partial)
_CONTAINERS = (list, tuple, dict)
_MAX_ENTRIES = 1000
"""Of a container that is looked into."""
_COMPILED_FROM = "_torchdynamo_orig_callable"
"""Where what `torch.compile` makes of a function has the function."""


def rebind(twins: Iterable[nn.Module], copied: dict[int, Any]) -> None:
    """Exchange the functions and weak references among the attributes of a twin's modules.

    Args:
        twins: the modules.
        copied: by the id of an object, its copy.
    """
    exchange = _Exchange(copied)
    for twin in twins:
        attributes = vars(twin)
        for name, value in list(attributes.items()):
            if name not in OWN_ATTRIBUTES and isinstance(value, (*_REFERRING, *_CONTAINERS)):
                attributes[name] = exchange.inside(value)


class _Exchange:
    """What stands in the twin for something of the model's."""

    def __init__(self, copied: dict[int, Any]) -> None:
        self._copied = copied
        self._functions: dict[int, types.FunctionType] = {}

    def __call__(self, value: Any) -> Any:
        value = getattr(value, _COMPILED_FROM, value) if callable(value) else value
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {name: self(keyword) for name, keyword in value.keywords.items()}
            return functools.partial(self(value.func), *map(self, value.args), **keywords)
        if isinstance(value, weakref.ref):
            return weakref.ref(self._copied[id(value())]) if id(value()) in self._copied else value
        if isinstance(value, _CHANGEABLE):
            return self.inside(detached_copy(value, self._copied))
        return self._copied.get(id(value), value)

    def inside(self, value: Any) -> Any:
        """Exchange a value of the twin's own, or what a container of the twin's own holds.

        Returns:
            What to keep in its place.
        """
        if isinstance(value, _REFERRING):
            return self(value)
        if type(value) not in _CONTAINERS or len(value) > _MAX_ENTRIES:
            return value
        if isinstance(value, dict):
            value.update({name: self.inside(entry) for name, entry in value.items() if isinstance(entry, _REFERRING)})
        elif any(isinstance(entry, _REFERRING) for entry in value):
            exchanged = [self.inside(entry) for entry in value]
            if isinstance(value, tuple):
                return tuple(exchanged)
            value[:] = exchanged
        return value

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        if not function.__closure__:
            return function
        if id(function) in self._functions:
            return self._functions[id(function)]
        cells = tuple(types.CellType() for _ in function.__closure__)
        again = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
        )
        again.__kwdefaults__ = function.__kwdefaults__
        self._functions[id(function)] = again  # first: a function may be in its own closure
        for cell, original in zip(cells, function.__closure__, strict=True):
            try:
                contents = original.cell_contents
            except ValueError:  # an empty cell
                continue
            cell.cell_contents = self(contents)
        return again
