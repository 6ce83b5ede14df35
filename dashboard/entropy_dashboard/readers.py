"""One incremental reader a run, shared by all viewers: every look costs what is new, not what there is."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from entropy_dashboard.history import LayerHistory, ScalarHistory
from entropy_monitor.errors import EntropyMonitorError
from entropy_monitor.store import (
    EventLog,
    MetricsReader,
    Run,
    RunStatus,
    ScalarsReader,
    acknowledged_numbers,
    list_commands,
    open_run,
    read_status,
)
from entropy_monitor.store.layout import ROOT, SCALAR_COLUMNS, ack_key
from entropy_monitor.types import Acknowledgement, Command, PhaseEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from pathlib import Path

ENTROPIES = ("mbe_normalized", "mbe", "mbe_centered")
"""Kinds of matrix-based entropy; the first is the paper's and the default."""
ALIGNMENTS = ("alignment_weight", "alignment_activation")
"""Kinds of CE-MBE gradient alignment; the first is the paper's and the default."""
LAYER_METRICS = tuple(f"{name}{suffix}" for name in (*ENTROPIES, *ALIGNMENTS) for suffix in ("", "_se"))
ROW_SCALARS = ("ce", "phase", "regime", "num_patches", "num_tokens", "num_ranks")
STEP_COLUMNS = ("loss", "phase", "wall_time_s")

_MAX_TABLES = 64
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run as of the last look."""

    status: RunStatus
    commands: tuple[Command, ...]
    acks: tuple[Acknowledgement, ...]
    events: tuple[PhaseEvent, ...]
    """All of them, oldest first."""
    problems: tuple[str, ...]
    """What could not be read, in words."""
    run_id: str


class RunReader:
    """Follows one run; thread safe."""

    def __init__(self, path: Path, min_age_s: float = 0.4) -> None:
        self.path = path
        self.lock = threading.RLock()
        """Held while histories are read; `refresh` and `table` take it themselves."""
        self._min_age_s = min_age_s
        self._snapshot: Snapshot | None = None
        self._looked_at = -float("inf")
        self._identity: tuple[int, int] | None = None

    def refresh(self) -> Snapshot:
        """Read what is new, at most once in `min_age_s` for all viewers together.

        Returns:
            The run's state.

        Raises:
            EntropyMonitorError: the run cannot be read at all; the message says why and what to do.
        """
        with self.lock:
            if self._snapshot is not None and time.monotonic() - self._looked_at < self._min_age_s:
                return self._snapshot
            self._reopen_if_replaced()
            status = read_status(self._run)
            found = (self._read_metrics(), self._read_scalars(), self._read_words(status.ranks or [0]))
            problems = [text for text in found if text]
            self._snapshot = Snapshot(
                status=status,
                commands=tuple(self._commands),
                acks=tuple(self._acks.values()),
                events=tuple(self._events),
                problems=tuple(problems),
                run_id=self._run.run_id,
            )
            self._looked_at = time.monotonic()
            return self._snapshot

    @property
    def run(self) -> Run:
        """The open run; `refresh` has been called before."""
        return self._run

    def table(self, key: Hashable, make: Callable[[], T]) -> T:
        """Something computed from the histories, kept until what it shows has changed.

        Args:
            key: names the view; what `make` closes over must be in it.
            make: computes it.

        Returns:
            The kept or fresh result.
        """
        with self.lock:
            full_key = (key, self.version)
            if full_key not in self._tables:
                if len(self._tables) >= _MAX_TABLES:
                    del self._tables[next(iter(self._tables))]
                self._tables[full_key] = make()
            return self._tables[full_key]

    def _reopen_if_replaced(self) -> None:
        """A run directory may be removed and made again under the same name."""
        try:
            stat = (self.path / ROOT / "zarr.json").stat()
            identity = (stat.st_ino, stat.st_mtime_ns)
        except OSError:
            identity = None
        if identity is not None and identity == self._identity:
            return
        self._snapshot = self._identity = None
        self._run = open_run(self.path)
        objects = self._run.objects
        self.layers = LayerHistory(LAYER_METRICS, ROW_SCALARS)
        """Every measured step."""
        self.steps = ScalarHistory(STEP_COLUMNS, SCALAR_COLUMNS)
        """Every optimizer step of the lowest rank; reaches further than `layers`, with or without a watcher."""
        self.version = 0
        """Grows with every change of either history."""
        self._metrics = MetricsReader(objects)
        self._scalars: ScalarsReader | None = None
        self._event_log = EventLog(objects)
        self._events: list[PhaseEvent] = []
        self._commands: list[Command] = []
        self._acks: dict[tuple[int, int], Acknowledgement] = {}
        self._tables: dict[Hashable, Any] = {}
        self._identity = identity

    def _read_metrics(self) -> str | None:
        return self._consume(self._metrics.read_new(), self.layers.append)

    def _read_scalars(self) -> str | None:
        if self._scalars is None:
            self._scalars = ScalarsReader(self._run.objects, 0)
        return self._consume(self._scalars.read_new(), lambda block: self.steps.append(*block))

    def _consume(self, blocks: Iterator[T], take: Callable[[T], int | None]) -> str | None:
        try:
            for block in blocks:
                self.version += take(block) is not None
        except EntropyMonitorError as error:
            # What came before the damage is whole and stays on the page.
            return str(error)
        return None

    def _read_words(self, ranks: Sequence[int]) -> str | None:
        objects = self._run.objects
        try:
            self._events.extend(self._event_log.read_new())
            known = int(self._commands[-1].command_id) if self._commands else 0
            self._commands.extend(list_commands(objects, known + 1))
            for rank in ranks:
                for number in acknowledged_numbers(objects, rank):
                    fields = None if (number, rank) in self._acks else objects.get_json(ack_key(number, rank))
                    if fields is not None:
                        self._acks[number, rank] = Acknowledgement(**fields)
        except (EntropyMonitorError, TypeError, ValueError) as error:
            return f"An event, a command or an acknowledgement cannot be read ({error}); newer ones are not shown."
        return None


def usual_step_time(reader: RunReader) -> float | None:
    """Median time of the last optimizer steps, for judging whether a trainer hangs.

    Returns:
        Seconds, or None before there are two steps.
    """
    recent = reader.steps.values.shown(max(0, len(reader.steps.order.steps) - 64))
    times = np.diff(recent[:, STEP_COLUMNS.index("wall_time_s")])
    times = times[np.isfinite(times) & (times > 0)]
    return float(np.median(times)) if len(times) else None
