"""Where the cost of a sampled step goes on the training thread, measured inside our own code.

Functions of the hooks are wrapped for the time of a measurement; nested ones are counted once, in the inner one. This
sees what two blocks of steps cannot tell apart, but not what our memory traffic costs the model's own operations.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING
from unittest import mock

from _contenders import ours

from entropy_hooks import frame, meter, session, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from _gpt import Job


class Profile:
    """Exclusive thread time by label, of the thread that made it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._thread = threading.get_ident()
        self._open: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        now = time.thread_time()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def enter(self, label: str) -> None:
        if threading.get_ident() == self._thread:
            self._switch()
            self._open.append(label)

    def leave(self) -> None:
        if threading.get_ident() == self._thread:
            self._switch()
            self._open.pop()

    def wrap(self, label: str | Callable[..., str], function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            self.enter(label if isinstance(label, str) else label(*args))
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return wrapped


@contextlib.contextmanager
def _patched(profile: Profile, job: Job) -> Iterator[None]:
    def kind(*_: object) -> str:
        return "select and copy gradients" if job.in_backward else "select and copy activations"

    places: list[tuple[object, str, str | Callable[..., str]]] = [
        (tokens.PatchSample, "select", kind),
        (tokens.PatchSample, "token_windows", "frame assembly"),
        (tokens.PatchSampler, "draw", "drawing patches"),
        (session, "reduce_layers", "weight-space alignment"),
        (session, "gradient_norm", "gradient norm"),
        (frame.FrameAssembler, "assemble", "frame assembly"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, label in places:
            stack.enter_context(mock.patch.object(owner, name, profile.wrap(label, getattr(owner, name))))
        enter, leave = meter.Meter.__enter__, meter.Meter.__exit__

        def entered(self: meter.Meter) -> None:
            profile.enter("bookkeeping")
            enter(self)

        def left(self: meter.Meter, *args: object) -> None:
            leave(self, *args)
            profile.leave()

        stack.enter_context(mock.patch.object(meter.Meter, "__enter__", entered))
        stack.enter_context(mock.patch.object(meter.Meter, "__exit__", left))
        yield


def breakdown(job: Job, directory: Path, steps: int) -> dict[str, float]:
    """Milliseconds of a sampled step's cost by part, with everything on and every=1; and of a step as a whole."""
    profile = Profile()
    with _patched(profile, job), ours(every=1)(job, directory) as attached:
        for _ in range(3):
            job.step()
        attached.drain()
        profile.seconds.clear()
        begun = time.thread_time()
        for _ in range(steps):
            job.step()
            attached.drain()  # so that no frame is dropped: a dropped one costs less
        whole = time.thread_time() - begun
    return {
        **{name: 1e3 * seconds / steps for name, seconds in sorted(profile.seconds.items())},
        "all of it": 1e3 * sum(profile.seconds.values()) / steps,
        "a sampled step, with the model's own work": 1e3 * whole / steps,
    }
