"""What is pickled, saved or copied while it is observed holds nothing of ours.

`copyreg.dispatch_table` is asked by pickle, `torch.save`, multiprocessing and `copy` for the class of what they meet.
While one of its objects is observed, a class has an entry there that does what would be done without it (the class's
own ``__reduce__`` and ``__getstate__`` are obeyed) and takes our hooks out of the result.
"""

from __future__ import annotations

import copyreg
import functools
from typing import TYPE_CHECKING, Any

from torch.utils.hooks import RemovableHandle

from entropy_hooks.holders import hold
from entropy_hooks.unhooked import twins_of_handle, twins_of_module

if TYPE_CHECKING:
    from collections.abc import Callable

    from entropy_hooks.unhooked import Twins

    Reducer = Callable[[Any], Any]

_PROTOCOL = 2
"""A reducer is not told the protocol. Torch saves in this one, and objects reduce to the same in later ones."""
_DEPTH = 3
"""A state may lie in a tuple, with slots beside it or as an argument of what rebuilds the object."""


def keep_out(kind: type, holder: object) -> None:
    """From now on our hooks are taken out of whatever is made of objects of a class, until `holders.release`."""
    for each in (kind, RemovableHandle):
        hold(holder, each, functools.partial(_enter, each))


def _enter(kind: type) -> Callable[[], None]:
    previous = copyreg.dispatch_table.get(kind)  # the user's own
    ours = _reducer(_reduce_handle if kind is RemovableHandle else _reduce, previous)
    copyreg.dispatch_table[kind] = ours

    def undo() -> None:
        if copyreg.dispatch_table.get(kind) is not ours:
            return  # somebody has registered theirs since
        if previous is None:
            del copyreg.dispatch_table[kind]
        else:
            copyreg.dispatch_table[kind] = previous

    return undo


def _reducer(reduce: Callable[[Any, Any], Any], previous: Reducer | None) -> Reducer:
    def reducer(thing: Any) -> Any:
        return reduce(thing, thing.__reduce_ex__(_PROTOCOL) if previous is None else previous(thing))

    return reducer


def _reduce(thing: Any, reduced: Any) -> Any:
    twins = twins_of_module(vars(thing))
    return _exchanged(reduced, twins, _DEPTH) if twins and isinstance(reduced, tuple) else reduced


def _reduce_handle(handle: RemovableHandle, reduced: Any) -> Any:
    """A handle reduces to the dictionaries that it removes its hook from."""
    twins = twins_of_handle(handle)
    return _exchanged(reduced, twins, _DEPTH) if twins else reduced


def _exchanged(value: Any, twins: Twins, depth: int) -> Any:
    """A nest of plain tuples and dicts with twins in place of what they stand for.

    Returns:
        A new one, or `value` itself where it has none of them.
    """
    if type(value) is dict:
        keys, items = list(value), list(value.values())  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    elif type(value) is tuple:
        keys, items = None, list(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    else:
        return value
    changed: list[Any] = [twins.get(id(item), item) for item in items]
    if depth:
        changed = [_exchanged(item, twins, depth - 1) for item in changed]
    if all(new is old for new, old in zip(changed, items, strict=True)):
        return value
    return tuple(changed) if keys is None else dict(zip(keys, changed, strict=True))
