"""What the code of a model keeps outside the model: globals, class attributes and closures that its functions name.

A twin runs the same code, which would count, append and cache there a second time. Whether it does so shows in the
training's own pass. Nothing is put back: another thread may have changed it.
"""

from __future__ import annotations

import dis
import pickle
import random
import sys
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from entropy_hooks.hidden import all_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    Look: TypeAlias = list[tuple["_Place", Any, Any]]
    """Each place, what it held, and what that held."""

_NOT_THEIRS = sys.stdlib_module_names | {"torch", "numpy", "triton", "entropy_hooks", "entropy_monitor"}
"""Packages whose functions are not looked into."""
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
_CALLED_BY_TORCH = ("forward", "__call__", "__init__", "__getattr__")
"""Methods that no code of theirs needs to name."""
_MAX_FUNCTIONS = 3000
_MAX_ENTRIES = 10_000
"""Of a container that is looked into: a data set is no counter."""
_CONTAINERS: dict[type, Callable[[Any], Any]] = {
    dict: dict, defaultdict: dict, OrderedDict: dict, Counter: dict, list: list, deque: list, set: set
}  # fmt: skip
"""Python's own alone: a mapping of a user's class may import a module at each look."""
_PLAIN = frozenset({int, float, bool, str, bytes, complex})
_MISSING = object()


@dataclass(frozen=True, slots=True)
class _Place:
    """A name and where it is kept."""

    holder: Any
    """A dictionary, a class or a cell."""
    name: str

    def get(self) -> Any:
        if isinstance(self.holder, types.CellType):
            return _contents(self.holder)
        names = vars(self.holder) if isinstance(self.holder, type) else self.holder
        return names.get(self.name, _MISSING)


class Surroundings:
    """The places that are found once for a model."""

    def __init__(self, model: nn.Module) -> None:
        self._own = frozenset(map(id, all_modules(model).values()))
        self._places: dict[tuple[int, str], _Place] = {}
        self._seen: set[int] = set()
        self._rebound: set[int] = set()
        self._ahead: deque[types.FunctionType] = deque()
        self._classes: dict[int, type] = {}
        self._named = set(_CALLED_BY_TORCH)
        """By the code that was looked into: of a class, its methods of these names may run."""
        for module in all_modules(model).values():
            self._see_class(type(module))
            for value in vars(module).values():
                self._see_code(value, rebound=True)
        self._search()

    def look(self) -> Look:
        """See what is there now.

        Returns:
            What to compare with later.
        """
        return [(place, value, _inside(value)) for place in self._places.values() for value in (place.get(),)]

    def changed_since(self, look: Look) -> str | None:
        """Compare.

        Args:
            look: of before.

        Returns:
            The name of something that has changed since, or None.
        """
        for place, value, inside in look:
            if not _is_equal(place.get(), value) or (inside is not None and not _is_same(_inside(value), inside)):
                return place.name
        return None

    def way_to_model(self, look: Look) -> str | None:
        """Look for the model itself: a registry that its forward asks.

        Args:
            look: of now.

        Returns:
            The name of what leads to it, or None.
        """
        return next((place.name for place, value, inside in look if self._leads_to_model(value, inside)), None)

    def _leads_to_model(self, value: Any, inside: Any) -> bool:
        entries = inside.values() if isinstance(inside, dict) else inside if isinstance(inside, list) else ()
        reached = (entry() if _is(entry, weakref.ref) else entry for entry in (value, *entries))
        return any(id(entry) in self._own for entry in reached)

    # ---- the search --------------------------------------------------------------------------------------------------

    def _search(self) -> None:
        looked = -1
        while looked != (looked := len(self._seen)) and looked < _MAX_FUNCTIONS:
            for kind in list(self._classes.values()):
                made_before = {"__init__"} if issubclass(kind, nn.Module) else set[str]()
                for name in (self._named & vars(kind).keys()) - made_before:
                    self._see_value(kind, name, vars(kind)[name])
            while self._ahead:
                self._look_into(self._ahead.popleft())

    def _see_class(self, kind: type) -> None:
        if id(kind) not in self._classes and _is_theirs(kind.__module__):
            self._classes[id(kind)] = kind
            for parent in kind.__bases__:
                self._see_class(parent)

    def _see_code(self, value: Any, *, rebound: bool = False) -> None:
        """A function, or what stands around one; the twin has a copy of what a rebound one closes over."""
        if _is(value, property):
            value = value.fget
        if _is(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        if _is(value, types.FunctionType) and id(value) not in self._seen and _is_theirs(value.__module__):
            self._seen.add(id(value))
            self._ahead.append(value)
            if rebound:
                self._rebound.add(id(value))

    def _see_value(self, holder: Any, name: str, value: Any) -> None:
        if _is(value, type):
            self._see_class(value)
        elif _is(value, (types.FunctionType, types.MethodType, property, staticmethod, classmethod)):
            self._see_code(value)
        elif not _is(value, _CODE) and not hasattr(type(value), "__get__"):
            self._places.setdefault((id(holder), name), _Place(holder, name))

    def _look_into(self, function: types.FunctionType) -> None:
        self._see_code(getattr(function, "__wrapped__", None))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if id(function) in self._rebound:
                self._see_code(_contents(cell), rebound=True)
            else:
                self._see_value(cell, name, _contents(cell))
        name = function.__name__
        defaults = *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()
        for value in (*defaults, *((vars(function),) if vars(function) else ())):
            if type(value) in _CONTAINERS or _attributes_of(value) is not None:
                self._see_value({name: value}, name, value)
        names, of_globals = set(_names(function.__code__)), None
        self._named |= names
        for name in names & function.__globals__.keys():
            value = function.__globals__[name]
            if not _is(value, _CODE):
                of_globals = set(_globals_of(function.__code__)) if of_globals is None else of_globals
                if name not in of_globals:
                    continue  # an attribute of that name
            self._see_value(function.__globals__, name, value)
            if _is(value, types.ModuleType) and _is_theirs(value.__name__):
                for inner in names & vars(value).keys():
                    self._see_value(vars(value), inner, vars(value)[inner])


def _is_theirs(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] not in _NOT_THEIRS


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _globals_of(code: types.CodeType) -> Iterator[str]:
    yield from (found.argval for found in dis.get_instructions(code) if found.opname.endswith("_GLOBAL"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _MISSING


# ---- what is kept of one value ---------------------------------------------------------------------------------------


def _inside(value: Any) -> Any:
    """What can change in a value while it stays the same object.

    Returns:
        A shallow copy of it; None where nothing can, or it is not looked into.
    """
    if _is(value, random.Random):
        return value.getstate()
    if _is(value, np.random.Generator):
        return pickle.dumps(value.bit_generator.state)
    if _is(value, np.random.RandomState):
        return pickle.dumps(value.get_state())
    if _is(value, np.ndarray):
        return value.copy() if value.size <= _MAX_ENTRIES else None
    if (kind := _CONTAINERS.get(type(value))) is not None:
        return kind(value) if len(value) <= _MAX_ENTRIES else None
    attributes = _attributes_of(value)
    return None if attributes is None else dict(attributes)


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    """As `isinstance`, which would run code of a proxy's that is asked for its class.

    Returns:
        True or False.
    """
    return issubclass(type(value), kind)


def _attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object of a class of theirs: of others it is not known how they are used.

    Returns:
        Its dictionary; None for what is none of these.
    """
    if _is(value, (nn.Module, torch.Tensor, *_CODE)) or not _is_theirs(type(value).__module__):
        return None
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None


def _is_same(now: Any, before: Any) -> bool:
    if type(now) is not type(before):
        return False
    if isinstance(before, dict):
        return len(now) == len(before) and all(_is_equal(now.get(name, _MISSING), before[name]) for name in before)
    if isinstance(before, list):
        return len(now) == len(before) and all(map(_is_equal, now, before))
    if isinstance(before, np.ndarray):
        return now.dtype == before.dtype and now.tobytes() == before.tobytes()
    return now == before


def _is_equal(now: Any, before: Any) -> bool:
    """Whether it is the same object, or the same number or text once more."""
    return now is before or (type(now) is type(before) and type(now) in _PLAIN and now == before)
