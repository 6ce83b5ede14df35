"""A hook that acts for the one module or optimizer on which it was placed, and how to see an object without ours.

It keeps its owner as little alive as any other: a model that is dropped is freed at once, as it would be without us.

However a model is copied, its copy takes the hooks along (a shallow copy even shares their dictionary). In a copy ours
do nothing; and where one is pickled or deep-copied nevertheless, something of Python's own takes its place.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_COMPANIONS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}
"""Where torch keeps the hooks of a module, and where it notes under the same keys how to call them."""


class Placed:
    """Calls `act` for `owner` alone, until `remove`."""

    __slots__ = ("__weakref__", "_act", "_keeps", "_owner")

    def __init__(self, owner: object, act: Callable[..., None], keeps: object = None) -> None:
        """Make one.

        Args:
            owner: on what it is placed.
            act: what it does there.
            keeps: what must not go before the owner does.
        """
        self._owner: Callable[[], object] = weakref.ref(owner)
        self._act, self._keeps = act, keeps

    def __call__(self, owner: object, *args: Any) -> None:
        """The owner, or a copy of it, is called."""
        if owner is self._owner():
            self._act(owner, *args)

    def remove(self) -> None:
        """Do nothing any more, wherever a reference is left."""
        self._owner, self._keeps = _nobody, None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled or deep-copied: a callable that takes anything and does nothing, and that every Python can load.

        Returns:
            What makes it.
        """
        return getattr, (contextlib.nullcontext(), "__exit__")


def _nobody() -> None:
    """Who owns a hook that was removed."""


def without_ours(attributes: Mapping[str, Any]) -> dict[int, OrderedDict[int, Any]]:
    """The hooks of a module as they are without us.

    Args:
        attributes: the module's ``__dict__``.

    Returns:
        By the id of a dictionary that names a hook of ours, its twin that does not; empty where there is none.
    """
    twins: dict[int, OrderedDict[int, Any]] = {}
    for name, companions in _COMPANIONS.items():
        hooks: Mapping[int, Any] = attributes.get(name) or {}
        if ours := {key for key, hook in hooks.items() if isinstance(hook, Placed)}:
            for each in (name, *companions):
                found = attributes[each]
                twins[id(found)] = OrderedDict((key, value) for key, value in found.items() if key not in ours)
    return twins
