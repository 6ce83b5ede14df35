"""What stands between our hooks and the training job."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from entropy_hooks.faults import Faults
    from entropy_hooks.meter import Meter


class Guard:
    """Counts the time of hooks and their exceptions: neither may reach the training job."""

    def __init__(self, faults: Faults, meter: Meter) -> None:
        self._faults, self._meter = faults, meter
        self.active = False
        """Hooks that are not always called have something to do in this step."""
        self._silent = False

    def __call__(self, hook: Callable[..., None], *, always: bool = False) -> Callable[..., None]:
        """Make a hook harmless.

        Args:
            hook: what to call.
            always: also on a step on which hooks are not active.

        Returns:
            The hook, which does nothing while silenced. In a graph that is being compiled it leaves no trace.
        """

        def guarded(*args: Any) -> None:
            if torch.compiler.is_compiling():
                return
            if (always or self.active) and not self._silent:
                self.run(hook, *args)

        return guarded

    def run(self, action: Callable[..., object], *args: Any) -> None:
        """Call something of ours."""
        with self._meter:
            try:
                action(*args)
            except Exception as error:
                self._faults.count("hook_error", error)

    @contextlib.contextmanager
    def silenced(self) -> Generator[None]:
        """Within, the model runs for our own sake: nothing is observed, counted or steered."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False
