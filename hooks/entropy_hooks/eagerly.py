"""Having what is compiled run as it was written, in one thread alone.

`torch.compiler.set_stance` is for the whole process: meanwhile another thread's compiled model would run eagerly too,
and of two threads that set it the last to leave may leave it set. The stance that dynamo asks for is therefore one that
answers each thread for itself.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Generator

_EAGER = "force_eager"
_lock = threading.Lock()


class _Thread(threading.local):
    """How often a thread is to run eagerly: once within the other, perhaps."""

    def __init__(self) -> None:
        self.entered: set[object] = set()


_this_thread = _Thread()


class _EachThread:
    """A stance that is what it was before, except in threads that are to run eagerly."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.num_entered = 0

    @property
    def stance(self) -> str:
        """What dynamo asks at each call of something compiled."""
        return _EAGER if _this_thread.entered else self.before.stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before, name)


@contextlib.contextmanager
def run_eagerly() -> Generator[None]:
    """Within, what has been compiled runs in this thread as it was written; nothing is compiled, now or afterwards.

    It may be left in another thread than it was entered in.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:  # nothing can be compiled yet; importing it takes a second
        yield
    elif not hasattr(dynamo, "_stance"):  # a private name of torch's
        with torch.compiler.set_stance(_EAGER):
            yield
    else:
        token, entered = object(), _this_thread.entered
        stance = _enter(dynamo)
        entered.add(token)
        try:
            yield
        finally:
            entered.discard(token)
            _leave(dynamo, stance)


def _enter(dynamo: Any) -> _EachThread:
    with _lock:
        found = dynamo._stance
        if not isinstance(found, _EachThread):
            found = dynamo._stance = _EachThread(found)
        found.num_entered += 1
        return found


def _leave(dynamo: Any, stance: _EachThread) -> None:
    with _lock:
        stance.num_entered -= 1
        # If the user has set another since, theirs stays: ours answers with what was before, wherever it is kept.
        if not stance.num_entered and dynamo._stance is stance:
            dynamo._stance = stance.before
