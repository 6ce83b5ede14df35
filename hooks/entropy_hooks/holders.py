"""What is changed in Python and torch, for all of the process, while somebody needs it.

The first holder of a change has it made. The last one has it undone, when it releases what it holds or is gone itself.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from contextlib import AbstractContextManager

_lock = threading.RLock()
"""Taken again by a thread that has it where the garbage collector finds a holder in between."""
_held: weakref.WeakKeyDictionary[object, set[Hashable]] = weakref.WeakKeyDictionary()
"""By holder, the names of the changes that it needs."""
_undo: dict[Hashable, Callable[[], None]] = {}
"""By name, what undoes each change that is in place."""


def hold(holder: object, change: Hashable, make: Callable[[], Callable[[], None]]) -> None:
    """Have a change in place until the holder releases it.

    Args:
        holder: who needs it; it is not kept alive.
        change: its name.
        make: makes it where it is not in place yet, and returns what undoes it.
    """
    with _lock:
        if holder not in _held:
            weakref.finalize(holder, _undo_unheld).atexit = False
        _held.setdefault(holder, set()).add(change)  # first: from here on nobody undoes it
        if change not in _undo:
            _undo[change] = make()


def release(holder: object) -> None:
    """Let go of all that somebody holds; what nobody else holds is undone."""
    with _lock:
        _held.pop(holder, None)
        _undo_unheld()


def locked() -> AbstractContextManager[object]:
    """For what the holders share beside the changes.

    Returns:
        What keeps other threads out of this module, too.
    """
    return _lock


def forget_threads() -> None:
    """In a forked child: the lock may have been held by a thread that does not exist here."""
    global _lock
    _lock = threading.RLock()


def _undo_unheld() -> None:
    with _lock:
        wanted: set[Hashable] = set().union(*_held.values())
        for change in _undo.keys() - wanted:
            if (undo := _undo.pop(change, None)) is not None:
                undo()
