"""A run: everything that one training job, its watcher and its operators have written."""

from __future__ import annotations

import heapq
import json
import time
import uuid
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from entropy_monitor.errors import (
    CorruptFrameError,
    CorruptRunError,
    FrameGoneError,
    NotARunError,
    RunNotFoundError,
    StoreError,
)
from entropy_monitor.store import layout
from entropy_monitor.store.arrays import create_group
from entropy_monitor.store.attempts import list_attempts, read_attempt
from entropy_monitor.store.commands import list_acknowledgements, list_commands
from entropy_monitor.store.events import EventLog
from entropy_monitor.store.frame_reader import FrameReader
from entropy_monitor.store.frames import list_ranks
from entropy_monitor.store.objects import Objects
from entropy_monitor.store.scalars import ScalarsReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import xarray as xr
    import zarr

    from entropy_monitor.types import Acknowledgement, Command, Frame, PhaseEvent

_ROOT_METADATA = f"{layout.ROOT}/zarr.json"
_FORMAT = 1


def was_deleted(objects: Objects) -> bool:
    """Whether the run is gone, for writers that would otherwise bring a deleted directory back to life."""
    in_its_place = objects.path is not None and objects.path.exists() and not objects.path.is_dir()
    return not objects.exists(_ROOT_METADATA) and not in_its_place  # a file there: let the failing write say so


class CorruptFrameWarning(UserWarning):
    """A committed frame could not be read and was left out."""


class Run:
    """A run opened for reading; `open_run` makes one."""

    def __init__(self, objects: Objects, run_id: str, created: float) -> None:
        self.objects = objects
        self.run_id = run_id
        self.created = created
        """Unix time at which the run was created, seconds."""

    def __repr__(self) -> str:
        return f"Run({self.objects.url!r}, run_id={self.run_id!r})"

    @property
    def zarr(self) -> zarr.Group:
        """The run's arrays as a plain, read-only zarr group."""
        import zarr

        return zarr.open_group(f"{self.objects.url}/{layout.ROOT}", mode="r")

    def frames(self, *, arrays: bool = True) -> Iterator[Frame]:
        """Committed frames of all ranks that retention has kept, by attempt and step.

        Args:
            arrays: False reads the commit records alone.

        Yields:
            The frames; one that is damaged is left out with a `CorruptFrameWarning`.
        """
        ranks = [self._rank_frames(rank, arrays=arrays) for rank in list_ranks(self.objects)]
        yield from heapq.merge(*ranks, key=lambda frame: (frame.attempt, frame.step, frame.rank))

    def _rank_frames(self, rank: int, *, arrays: bool) -> Iterator[Frame]:
        reader = FrameReader(self.objects, self.run_id, rank)
        for seq in reader.seqs():
            try:
                frame = reader.read(seq, arrays=arrays)
            except FrameGoneError:
                continue
            except CorruptFrameError as error:
                warnings.warn(CorruptFrameWarning(str(error)), stacklevel=2)
                continue
            if frame is not None:
                yield frame

    def metrics(self, attempt: int | Literal["latest", "all"] = "latest") -> xr.Dataset:
        """Every measured figure with its standard error, over (step, layer).

        Args:
            attempt: ``latest`` gives each step once, from the newest attempt that reached it; ``all`` every measured
                row in commit order; a number, that attempt.

        Returns:
            The dataset; a variable that was never measured is NaN.
        """
        from entropy_monitor.store.dataset import metrics_dataset

        return metrics_dataset(self.objects, attempt)

    def scalars(self, *, rank: int = 0, attempt: int | Literal["latest", "all"] = "latest") -> xr.Dataset:
        """Every optimizer step of one rank: loss, lr, wall_time_s, ..., over (step).

        Args:
            rank: whose scalars.
            attempt: as in `metrics`.

        Returns:
            The dataset.
        """
        from entropy_monitor.store.dataset import scalars_dataset

        blocks = list(ScalarsReader(self.objects, rank).read_new())
        rows = np.concatenate([rows for _, rows in blocks]) if blocks else np.empty((0, len(layout.SCALAR_COLUMNS)))
        attempts = np.concatenate([np.full(len(rows), a) for a, rows in blocks]) if blocks else np.empty(0, np.int64)
        return scalars_dataset(rows, attempts, attempt)

    def events(self) -> list[PhaseEvent]:
        """Regime changes, transitions, advice, alerts and faults.

        Returns:
            The events, oldest first.
        """
        return EventLog(self.objects).read_new()

    def commands(self) -> list[Command]:
        """Every well-formed command.

        Returns:
            The commands, oldest first.
        """
        return list_commands(self.objects)

    def acknowledgements(self) -> list[Acknowledgement]:
        """Every rank's answer to every command.

        Returns:
            The acknowledgements, by command and rank.
        """
        return list_acknowledgements(self.objects)

    def attempts(self) -> list[dict[str, Any]]:
        """The record of each start of the trainer.

        Returns:
            The records, oldest first.
        """
        return [read_attempt(self.objects, number) for number in list_attempts(self.objects)]


def open_run(url: str | Path) -> Run:
    """Open a run for reading.

    Args:
        url: its directory.

    Returns:
        The run.

    Raises:
        RunNotFoundError: there is nothing.
        NotARunError: there is something else.
        CorruptRunError: its root metadata cannot be read.
    """
    objects = Objects(url)
    if objects.path is not None and not objects.path.exists():
        raise RunNotFoundError(f"expected a run at {objects.url}; found nothing: check the path, or start the trainer")
    try:
        value = objects.get(_ROOT_METADATA)
    except StoreError as error:
        raise NotARunError(f"expected a run directory at {objects.url}; {error}") from error
    if value is None:
        raise NotARunError(f"expected {_ROOT_METADATA} in {objects.url}; found none: this is no run directory")
    try:
        attributes = json.loads(value)["attributes"]
        run_id, created, version = attributes["run_id"], float(attributes["created"]), attributes["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptRunError(
            f"expected run metadata in {objects.url}/{_ROOT_METADATA}; found {len(value)} bytes that cannot be read "
            f"({type(error).__name__}): restore the file, the frames beside it are untouched"
        ) from error
    if version != _FORMAT:
        raise CorruptRunError(
            f"expected store format {_FORMAT}; found {version} in {objects.url}: use the version of entropy-monitor "
            "that wrote it"
        )
    return Run(objects, run_id, created)


def create_run(url: str | Path) -> Run:
    """Open a run, creating it first if there is none.

    Args:
        url: its directory.

    Returns:
        The run.

    Raises:
        StoreError: the place cannot be written.
        NotARunError: the place is no directory.
    """
    from entropy_monitor import __version__

    objects = Objects(url)
    if objects.path is not None and objects.path.exists() and not objects.path.is_dir():
        raise NotARunError(f"expected a directory for the run at {objects.url}; found a file: name another place")
    attributes = {"run_id": uuid.uuid4().hex, "created": time.time(), "format": _FORMAT, "version": __version__}
    create_group(objects, layout.ROOT, attributes)
    return open_run(url)
