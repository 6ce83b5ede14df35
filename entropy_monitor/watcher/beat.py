"""The watcher's heartbeat: written once a second from a thread, whatever the loop is doing."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from entropy_monitor.store import PERIOD_S, WATCHER, write_heartbeat
from entropy_monitor.watcher.detectors.plateau import describe_plateau
from entropy_monitor.watcher.trends import Trends

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from entropy_monitor.store import Objects

logger = logging.getLogger(__name__)

_LAGS_KEPT = 512


class WatcherBeat:
    """Collects what the loop reports, and publishes it."""

    def __init__(self, objects: Objects, control: str) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._lags: deque[float] = deque(maxlen=_LAGS_KEPT)
        self._faults: Counter[str] = Counter()
        self._fields: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "state": "running",
            "control": control,
            "cursor": {},
            "last_measured_step": None,
            **_found(Trends()),
        }
        self._thread = threading.Thread(target=self._work, name="entropy-watcher-beat", daemon=True)

    def reached(self, step: int, cursor: Mapping[int, int], trends: Trends) -> None:
        """Say what an earlier watcher had reached and concluded, or what has been now."""
        with self._lock:
            self._fields["cursor"] = {str(rank): seq for rank, seq in cursor.items()}
            self._fields["last_measured_step"] = step
            self._fields |= _found(trends)

    def lag(self, lag_s: float) -> None:
        """A row was committed `lag_s` seconds after its frame; NaN when none of the step's frames could be read."""
        if math.isfinite(lag_s):
            with self._lock:
                self._lags.append(lag_s)

    def control(self, mode: str) -> None:
        """Say who decides."""
        with self._lock:
            self._fields["control"] = mode

    def fault(self, faults: Mapping[str, int]) -> None:
        """Count faults by kind."""
        with self._lock:
            self._faults.update(faults)

    def __enter__(self) -> Self:
        """Publish the first heartbeat and start.

        Returns:
            This heartbeat.
        """
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the last one."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            self._fields["state"] = "ended"
        self._beat()

    def _work(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._beat()

    def _beat(self) -> None:
        with self._lock:
            lags = np.array(self._lags) if self._lags else None
            p50, p95 = (None, None) if lags is None else np.quantile(lags, [0.5, 0.95]).round(4).tolist()
            fields = {**self._fields, "lag_s": {"p50": p50, "p95": p95}, "faults": dict(self._faults)}
        try:
            write_heartbeat(self._objects, WATCHER, fields)
        except OSError as error:
            logger.warning("heartbeat not written: %s", error)
            self.fault({"heartbeat_failed": 1})


def _found(trends: Trends) -> dict[str, Any]:
    plateau = trends.plateau
    known = plateau.is_stopped
    return {
        "regime": trends.regime,
        "stage": trends.plane.stage,
        "early_stopping": {
            "stopped": plateau.is_stopped,
            "stopped_at": plateau.stopped_at if known else None,
            "earliest": plateau.earliest if known else None,
            "latest": plateau.latest if known else None,
            "advice": describe_plateau(plateau),
        },
    }
