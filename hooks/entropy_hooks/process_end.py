"""Doing something when this process ends, in children of `multiprocessing` too: those forked skip `atexit`."""

from __future__ import annotations

import atexit
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def at_process_end(task: Callable[[], object]) -> Callable[[], None]:
    """Call a task at the end; twice does no harm to it.

    Returns:
        What takes it back.
    """
    atexit.register(task)
    process, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
    finalizer = None
    if process is not None and util is not None and process.parent_process() is not None:
        finalizer = util.Finalize(None, task, exitpriority=0)

    def take_back() -> None:
        atexit.unregister(task)
        if finalizer is not None:
            finalizer.cancel()

    return take_back
