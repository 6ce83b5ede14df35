"""Running something of ours on the training thread, at a point where no hook dictionary is being iterated.

torch iterates an optimizer's hook dictionaries lazily: to add or remove such a hook from another thread while one runs
would raise "mutated during iteration" out of the user's ``optimizer.step()``. The start of a backward pass is a safe
point: it is outside of every step's hooks, and our wrapper of ``torch.autograd.backward`` is no dictionary.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from entropy_hooks import backward

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_LOOK_AGAIN_S = 0.005


class AtNextBackward:
    """Does a task once: at the start of the next backward pass, unless it is withdrawn before."""

    def __init__(self, task: Callable[[], None]) -> None:
        self._task = task
        self._lock = threading.Lock()
        self._taken = False
        self._error: BaseException | None = None
        self._done = threading.Event()
        backward.listen(self)

    def before_backward(self, roots: tuple[Any, ...], gradients: Any) -> None:
        """Of the first backward pass: do the task, whose exceptions are kept for `wait`."""
        if self._take():
            try:
                self._task()
            except Exception as error:
                self._error = error
            finally:
                self._done.set()

    def after_backward(self) -> None:
        """Nothing."""

    def wait(self, timeout_s: float) -> bool:
        """Wait until the task is done.

        Args:
            timeout_s: how long.

        Returns:
            False when no backward pass came in time; the task may still be done at a later one.

        Raises:
            BaseException: what the task raised.
        """
        done = self._done.wait(max(0.0, timeout_s))
        if self._error is not None:
            raise self._error
        return done

    def withdraw(self) -> bool:
        """Take the task back.

        Returns:
            Whether it will never be done by this object; False when it has been, or is being done.
        """
        return self._take()

    def _take(self) -> bool:
        with self._lock:
            taken, self._taken = self._taken, True
        if not taken:
            backward.unlisten(self)
        return not taken


def do_at_safe_point(task: Callable[[], None], timeout_s: float) -> bool:
    """Do a task at the next backward pass, or here when none comes and no thread is inside an optimizer's step.

    Args:
        task: adds or removes hooks; quick.
        timeout_s: how long to wait for a backward pass.

    Returns:
        Whether it has been done; False when an optimizer's step went on all the time.
    """
    waiting = AtNextBackward(task)
    if waiting.wait(timeout_s) or not waiting.withdraw():
        return waiting.wait(timeout_s)
    deadline = time.monotonic() + timeout_s
    while _is_stepping():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_AGAIN_S)
    task()
    return True


def _is_stepping() -> bool:
    """Whether some thread is inside the wrapper in which torch runs the hooks of ``Optimizer.step``.

    Returns:
        True also when the step is that of an optimizer we do not know.
    """
    frame: FrameType | None
    for frame in sys._current_frames().values():  # pyright: ignore[reportPrivateUsage]
        while frame is not None:
            if frame.f_code.co_filename.endswith("optimizer.py") and "profile_hook_step" in frame.f_code.co_qualname:
                return True
            frame = frame.f_back
    return False
