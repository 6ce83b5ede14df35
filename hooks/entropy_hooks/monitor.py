"""What `attach` returns."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from entropy_hooks import holders
from entropy_hooks.phase import PhaseControl
from entropy_hooks.process_end import at_process_end

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from torch import nn

    from entropy_hooks.faults import Faults
    from entropy_hooks.session import Session
    from entropy_monitor.config import MonitorOptions
    from entropy_monitor.types import Phase

DETACH_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorStats:
    """What the hooks have done so far on this rank, in this attempt."""

    enabled: bool
    attempt: int
    step: int
    """The optimizer step under way."""
    phase: Phase
    weight: float
    every: int
    frames_committed: int
    frames_dropped: int
    frames_removed_unmeasured: int
    overhead_percent: float | None
    """What observing adds to the training time: sampled steps against the steps between them, on the training thread's
    CPU clock (on CUDA the device's); until they can be compared, the time in our own code, a lower bound."""
    overhead_error_percent: float | None
    """Its standard error; None for a lower bound."""
    overhead_samples: int
    """Sampled steps that were compared with others."""
    overhead_source: str
    faults: Mapping[str, int]


class Monitor:
    """Observes one model. A context manager: leaving it detaches."""

    def __init__(self, options: MonitorOptions, faults: Faults, run_url: str | None = None) -> None:
        self.options = options
        self.run_url = run_url
        """The run it writes to; None when disabled."""
        self.model_name = ""
        """Class of the observed model."""
        self.layers: tuple[str, ...] = ()
        """The observed layers, in model order."""
        self._faults = faults
        self.phase_control = PhaseControl(faults)
        self._session: Session | None = None
        self._last_stats: MonitorStats | None = None
        self._closing = threading.Lock()
        self._forget_at_end: Callable[[], None] = _nothing

    def __repr__(self) -> str:
        return f"Monitor(run={self.run_url!r}, enabled={self.enabled}, step={self.stats().step})"

    @property
    def enabled(self) -> bool:
        """Whether it observes: False after `detach`, when switched off, or when `attach` failed."""
        return self._session is not None

    @property
    def why_disabled(self) -> str:
        """What went wrong, in one line; empty when nothing did."""
        return self._faults.describe()

    def fault(self, kind: str, detail: str) -> None:
        """Count what somebody who attaches for others (a callback) sees go wrong; see `Faults.count`."""
        self._faults.count(kind, detail)

    @property
    def phase(self) -> Phase:
        """The phase that governs the optimizer step under way."""
        return self.phase_control.phase

    def on_phase(self, callback: Callable[[Phase, float], None]) -> None:
        """Call ``callback(phase, weight)`` at each change, between two optimizer steps, on the training thread."""
        self.phase_control.add_callback(callback)

    def stats(self) -> MonitorStats:
        """Counts of this rank and attempt.

        Returns:
            The counts; after `detach`, the last ones.
        """
        session, faults = self._session, self._faults.snapshot()
        if session is None:
            last = self._last_stats or MonitorStats(
                enabled=False,
                attempt=0,
                step=self.options.start_step,
                phase=self.phase,
                weight=self.phase_control.weight,
                every=self.options.every,
                frames_committed=0,
                frames_dropped=0,
                frames_removed_unmeasured=0,
                overhead_percent=None,
                overhead_error_percent=None,
                overhead_samples=0,
                overhead_source="not measured",
                faults=faults,
            )
            return replace(last, enabled=False, faults=faults)
        stated = session.overhead()
        return MonitorStats(
            enabled=True,
            attempt=session.attempt,
            step=session.step,
            phase=self.phase,
            weight=self.phase_control.weight,
            every=session.cadence.every,
            frames_committed=session.writer.committed,
            frames_dropped=session.writer.dropped,
            frames_removed_unmeasured=session.writer.removed_unmeasured,
            overhead_percent=stated.percent,
            overhead_error_percent=stated.error_percent,
            overhead_samples=stated.num_pairs,
            overhead_source=stated.source,
            faults=faults,
        )

    def begin(self, session: Session) -> None:
        """Start an attachment; `attach` calls this once."""
        self._session = session
        with contextlib.ExitStack() as undo:  # a thread may not start
            undo.callback(self._give_up, session)
            session.start(when_over=self._begin_to_close)
            undo.pop_all()
        self._forget_at_end = at_process_end(functools.partial(self.close, EXIT_TIMEOUT_S))
        _live.add(self)

    def _give_up(self, session: Session) -> None:
        self._session = None
        session.remove_hooks()
        session.writer.stop(EXIT_TIMEOUT_S)

    def observes(self, model: nn.Module) -> bool:
        """Whether it observes this model.

        Args:
            model: unwrapped.

        Returns:
            False also when it observes nothing any more.
        """
        session = self._session
        return session is not None and session.observes(model)

    def detach(self) -> None:
        """Remove every hook, write what is queued and say goodbye; calling it again does nothing."""
        self.close(DETACH_TIMEOUT_S)

    def remove_hooks(self) -> None:
        """The part of `detach` that belongs on the training thread; what is queued waits for `close`."""
        if self._session is not None:
            self._session.remove_hooks()

    def close(self, timeout_s: float) -> None:
        """`detach`, with a limit on how long the disk may take."""
        if not self.enabled or not self._closing.acquire(timeout=timeout_s):
            return
        try:
            if (session := self._session) is not None:
                session.close(timeout_s)
                self._last_stats = self.stats()
                self._session = None
                self._forget_at_end()  # last: the end of the process waits for a close that is under way
        finally:
            self._closing.release()

    def close_if_over(self) -> None:
        """`detach` now, and not when the pulse thread sees it, what no optimizer trains any more."""
        if (session := self._session) is not None and session.is_over:
            self.detach()

    def _begin_to_close(self) -> None:
        """The model is gone; this is the thread that `close` waits for."""
        threading.Thread(target=self.detach, name="entropy-close", daemon=True).start()

    def leave_to_parent(self) -> None:
        """In a forked child: remove the hooks and nothing else; threads, queue and run are the parent's."""
        self._faults.forget_threads()
        session, self._session = self._session, None
        if session is not None:
            self._forget_at_end()
            session.remove_hooks()

    def __enter__(self) -> Self:
        """`attach` has done everything already.

        Returns:
            This monitor.
        """
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach."""
        self.detach()


_live: weakref.WeakSet[Monitor] = weakref.WeakSet()


def live_monitors() -> list[Monitor]:
    """Those that observe a model of this process; one whose optimizers are gone is closed at once.

    Returns:
        The monitors, in no particular order.
    """
    for monitor in list(_live):
        monitor.close_if_over()
    return [monitor for monitor in list(_live) if monitor.enabled]


def _nothing() -> None:
    """What is to be done before anything has begun."""


def _leave_to_parent() -> None:
    holders.forget_threads()
    for monitor in list(_live):
        monitor.leave_to_parent()


# A forked child (a DataLoader worker) has the hooks but none of the threads.
os.register_at_fork(after_in_child=_leave_to_parent)
