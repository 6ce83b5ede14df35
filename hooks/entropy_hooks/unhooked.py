"""The dictionaries of hooks as they are without ours, for a module and for the handles of its user's hooks."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeAlias

from entropy_hooks.holders import locked
from entropy_hooks.placed import HOOK_FAMILIES, Placed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

Twins: TypeAlias = "dict[int, OrderedDict[int, Any]]"
"""By the id of a dictionary that names a hook of ours, its twin that does not."""


def twins_of_module(attributes: Mapping[str, Any]) -> Twins:
    """The twins of a module's dictionaries.

    Args:
        attributes: the module's ``__dict__``.

    Returns:
        The twins; empty where none of our hooks is on it.
    """
    twins: Twins = {}
    for family in HOOK_FAMILIES:
        twins |= _twins([attributes.get(name) for name in family])
    return twins


def twins_of_handle(handle: RemovableHandle) -> Twins:
    """The twins of the dictionaries that a handle removes its hook from: the same ones that their module has.

    Returns:
        The twins; empty where none of our hooks is in them.
    """
    return _twins([handle.hooks_dict_ref(), *(reference() for reference in handle.extra_dict_ref)])


def _twins(family: Sequence[Mapping[int, Any] | None]) -> Twins:
    """The twins of dictionaries with the same keys, of which the first names the hooks.

    Our hooks keep them, so that a handle names the same twin as its module; and nobody else does, since a twin names
    hooks of the user's, which may hold their model.

    Returns:
        The twins; empty where none of the hooks is ours.
    """
    hooks = family[0] or {}
    ours = {key: hook for key, hook in list(hooks.items()) if isinstance(hook, Placed)}
    if not ours:
        return {}
    with locked():
        twins = {
            id(found): OrderedDict((key, value) for key, value in list(found.items()) if key not in ours)
            for found in family
            if found is not None
        }
        kept = next((hook.twins for hook in ours.values() if _are_alike(hook.twins, twins)), twins)
        for hook in ours.values():
            hook.twins = kept
        return kept


def _are_alike(one: Mapping[int, Mapping[int, Any]], other: Mapping[int, Mapping[int, Any]]) -> bool:
    return one.keys() == other.keys() and all(
        list(twin) == list(other[key]) and all(value is other[key][name] for name, value in twin.items())
        for key, twin in one.items()
    )
