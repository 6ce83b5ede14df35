"""What is pickled, saved or copied while it is observed holds nothing of ours.

`copyreg.dispatch_table` is asked by pickle, `torch.save`, multiprocessing and `copy` for the class of what they meet.
While one of its objects is observed, a class has an entry there that does what would be done without it (the class's
own ``__reduce__`` and ``__getstate__`` are obeyed) and takes our hooks out of the result.
"""

from __future__ import annotations

import copyreg
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.utils.hooks import RemovableHandle

from entropy_hooks.placed import without_ours

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Callable

    Reducer = Callable[[Any], Any]

_PROTOCOL = 2
"""A reducer is not told the protocol. Torch saves in this one, and objects reduce to the same in later ones."""
_DEPTH = 3
"""A state may lie in a tuple, with slots beside it or as an argument of what rebuilds the object."""


@dataclass(slots=True)
class _Entry:
    """Of one class in the table."""

    previous: Reducer | None
    """The user's own."""
    ours: Reducer
    holders: set[int] = field(default_factory=set[int])


_entries: dict[type, _Entry] = {}
_twins: dict[int, OrderedDict[int, Any]] = {}
"""By the id of a dictionary of hooks, what stands for it. A handle that the user keeps must name the same one."""


def keep_out(kind: type, holder: object) -> None:
    """From now on our hooks are taken out of whatever is made of objects of a class, until `release`."""
    for each in (kind, RemovableHandle):
        if each not in _entries:
            previous = copyreg.dispatch_table.get(each)
            reduce = _reduce_handle if each is RemovableHandle else _reduce
            entry = _entries[each] = _Entry(previous, _reducer(reduce, previous))
            copyreg.dispatch_table[each] = entry.ours
        _entries[each].holders.add(id(holder))


def release(holder: object) -> None:
    """The hooks of a holder are gone; the last one of a class leaves the table as it was."""
    for kind, entry in list(_entries.items()):
        entry.holders.discard(id(holder))
        if entry.holders:
            continue
        del _entries[kind]
        if copyreg.dispatch_table.get(kind) is entry.ours:  # else somebody has registered theirs since
            if entry.previous is None:
                del copyreg.dispatch_table[kind]
            else:
                copyreg.dispatch_table[kind] = entry.previous
    if not _entries:
        _twins.clear()


def _reducer(reduce: Callable[[Any, Any], Any], previous: Reducer | None) -> Reducer:
    def reducer(thing: Any) -> Any:
        return reduce(thing, thing.__reduce_ex__(_PROTOCOL) if previous is None else previous(thing))

    return reducer


def _reduce(thing: Any, reduced: Any) -> Any:
    twins = without_ours(vars(thing))
    return _exchanged(reduced, _kept(twins), _DEPTH) if twins and isinstance(reduced, tuple) else reduced


def _reduce_handle(handle: RemovableHandle, reduced: Any) -> Any:
    """A handle reduces to the dictionaries that it removes its hook from."""
    return _exchanged(reduced, _twins, _DEPTH) if _twins else reduced


def _kept(twins: dict[int, OrderedDict[int, Any]]) -> dict[int, OrderedDict[int, Any]]:
    for key, twin in twins.items():
        if key not in _twins or list(_twins[key].items()) != list(twin.items()):
            _twins[key] = twin
        twins[key] = _twins[key]
    return twins


def _exchanged(value: Any, twins: dict[int, OrderedDict[int, Any]], depth: int) -> Any:
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
