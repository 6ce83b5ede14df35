"""A hook that acts for the one module or optimizer on which it was placed.

It keeps its owner as little alive as any other: a model that is dropped is freed at once, as it would be without us.

However a model is copied, its copy takes the hooks along (a shallow copy even shares their dictionary). In a copy ours
do nothing; and where one is pickled or deep-copied nevertheless, something of Python's own takes its place.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Callable, Iterable

HOOK_FAMILIES = (
    ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    ("_optimizer_step_pre_hooks",),
    ("_optimizer_step_post_hooks",),
)
"""Where torch keeps the hooks of a module or an optimizer, and where it notes under the same keys how to call them."""


class Placed:
    """Calls `act` for `owner` alone, until `remove`."""

    __slots__ = ("__weakref__", "_act", "_owner", "keeps", "twins")

    def __init__(self, owner: object, act: Callable[..., None], keeps: object = None) -> None:
        """Make one.

        Args:
            owner: on what it is placed.
            act: what it does there.
            keeps: what must not go before the owner does.
        """
        self._owner: Callable[[], object] = weakref.ref(owner)
        self._act, self.keeps = act, keeps
        self.twins: dict[int, OrderedDict[int, Any]] = {}
        """Of the dictionaries that it is in; see `unhooked`."""

    def __call__(self, owner: object, *args: Any) -> None:
        """The owner, or a copy of it, is called."""
        if owner is self._owner():
            self._act(owner, *args)

    def remove(self) -> None:
        """Leave the owner, also where the handle was lost, and do nothing any more wherever a reference is left."""
        owner = self._owner()
        if owner is not None:
            _take_out(self, vars(owner))
        self._owner, self.keeps = _nobody, None
        self.twins = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled or deep-copied: a callable that takes anything and does nothing, and that every Python can load.

        Returns:
            What makes it.
        """
        return getattr, (contextlib.nullcontext(), "__exit__")


def _nobody() -> None:
    """Who owns a hook that was removed."""


def remove_lost(owners: Iterable[object], keeps: object) -> None:
    """Take away what was placed for the sake of something, where the handles are lost."""
    for owner in owners:
        for name, *_ in HOOK_FAMILIES:
            for hook in list(vars(owner).get(name, {}).values()):
                if isinstance(hook, Placed) and hook.keeps is keeps:
                    hook.remove()


def _take_out(hook: Placed, attributes: dict[str, Any]) -> None:
    for family in HOOK_FAMILIES:
        hooks = attributes.get(family[0]) or {}
        for key in [key for key, found in list(hooks.items()) if found is hook]:
            for name in family:
                attributes[name].pop(key, None)
