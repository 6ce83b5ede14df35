"""The metrics table: one row for each (attempt, step), kept for ever, its cursor committed with it.

Four arrays a segment are written in the order ``values``, ``scalars``, ``states``, ``source``; a row exists once its
``source`` does. Each append rewrites the tail chunk of each, so a restarted watcher continues exactly behind the last
whole row. Of the detectors' states only the newest two are kept, in turns: that of the last whole row is one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from entropy_monitor.errors import CorruptFrameError, CorruptMetricsError, StoreError
from entropy_monitor.store import layout
from entropy_monitor.store.arrays import Array, create_group, create_group_path, read_group_attributes
from entropy_monitor.types import PHASES, REGIMES, STAGES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from entropy_monitor.store.objects import Objects


_STATES_KEPT = 2
"""A state is written before its row is committed: the one of the row before must survive until then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsLayout:
    """Names of everything in a metrics row; a change opens a fresh segment."""

    layers: tuple[str, ...]
    metrics: tuple[str, ...]
    """Per layer; a standard error stands beside its metric as ``NAME_se``."""
    scalars: tuple[str, ...]
    """Per row, float64: attempt, step, ..."""
    num_ranks: int
    states: tuple[str, ...] = ()
    """The detectors' states, float64; those of the newest row alone can be read again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsRow:
    """What was concluded from all ranks' frames of one step."""

    values: NDArray[np.float32]
    """Shape ``(L, M)``; NaN is undetermined."""
    scalars: Mapping[str, float]
    source: Mapping[int, int]
    """`seq` of the frame that each rank contributed."""
    states: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsBlock:
    """Consecutive rows of one segment."""

    layout: MetricsLayout
    values: NDArray[np.float32]
    """Shape ``(T, L, M)``."""
    scalars: NDArray[np.float64]
    """Shape ``(T, S)``."""
    source: NDArray[np.int64]
    """Shape ``(T, R)``; -1 where the rank is missing."""

    def column(self, name: str) -> NDArray[np.float64]:
        """One scalar of every row, ``(T,)``; NaN where this segment has no such column.

        Returns:
            The values.
        """
        if name not in self.layout.scalars:
            return np.full(len(self.scalars), np.nan)
        return self.scalars[:, self.layout.scalars.index(name)]


class MetricsWriter:
    """Appends rows; only the process that holds the run's watcher lock may have one."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        create_group_path(objects, layout.metrics_key())
        self.cursor = read_cursor(objects)
        """Newest measured `seq` of each rank."""
        self._layout: MetricsLayout | None = None
        self._arrays: tuple[Array, Array, Array, Array] | None = None
        self._buffers: tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]] | None = None
        self._num_rows = 0

    def append(self, metrics_layout: MetricsLayout, row: MetricsRow) -> None:
        """Append one row and advance the cursor, in one commit.

        Args:
            metrics_layout: the row's names.
            row: its values.

        Raises:
            StoreError: the store cannot be written; the row does not exist.
        """
        if metrics_layout != self._layout or self._num_rows == layout.TABLE_SEGMENT_ROWS:
            self._claim(metrics_layout)
        assert self._arrays is not None
        assert self._buffers is not None
        slot = self._num_rows % layout.TABLE_CHUNK_ROWS
        values, scalars, states, source = self._buffers
        if slot == 0:
            values[:], scalars[:], source[:] = np.nan, np.nan, -1
        values[slot] = row.values
        scalars[slot] = [row.scalars.get(name, np.nan) for name in metrics_layout.scalars]
        states[0, : len(metrics_layout.states)] = [row.states.get(name, np.nan) for name in metrics_layout.states]
        source[slot] = [row.source.get(rank, -1) for rank in range(metrics_layout.num_ranks)]
        first = self._num_rows - slot
        starts = (first, first, self._num_rows % _STATES_KEPT, first)
        for array, start, buffer in zip(self._arrays, starts, self._buffers, strict=True):
            array.wait(array.write((start,), buffer))
        self._num_rows += 1
        self.cursor = _advance(self.cursor, row.source)

    def _claim(self, metrics_layout: MetricsLayout) -> None:
        number = max([-1, *_segments(self._objects)]) + 1
        attributes = {
            "layers": list(metrics_layout.layers),
            "metrics": list(metrics_layout.metrics),
            "columns": list(metrics_layout.scalars),
            "states": list(metrics_layout.states),
            "num_ranks": metrics_layout.num_ranks,
            "cursor": {str(rank): seq for rank, seq in self.cursor.items()},
            "phase": {"flag_values": list(range(len(PHASES))), "flag_meanings": " ".join(PHASES)},
            "regime": {"flag_values": list(range(len(REGIMES))), "flag_meanings": " ".join(REGIMES)},
            "stage": {"flag_values": list(range(len(STAGES))), "flag_meanings": " ".join(STAGES)},
        }
        key = layout.metrics_key(number)
        if not create_group(self._objects, key, attributes):
            raise StoreError(f"expected metrics segment {number} to be new; another watcher writes this run: stop one")
        rows, chunk, nan = layout.TABLE_SEGMENT_ROWS, layout.TABLE_CHUNK_ROWS, float("nan")
        cells = (len(metrics_layout.layers), len(metrics_layout.metrics))
        # A zarr array has no dimension of size 0.
        num_scalars, num_states = len(metrics_layout.scalars), max(1, len(metrics_layout.states))

        def create(name: str, shape: tuple[int, ...], dtype: str, dimensions: tuple[str, ...], fill: float) -> Array:
            kept = (_STATES_KEPT, 1) if name == "states" else (rows, chunk)
            return Array.create(
                self._objects,
                f"{key}/{name}",
                shape=(kept[0], *shape),
                chunk=(kept[1], *shape),
                dtype=dtype,
                dimensions=dimensions,
                fill=fill,
            )

        self._arrays = (
            create("values", cells, "f4", ("row", "layer", "metric"), nan),
            create("scalars", (num_scalars,), "f8", ("row", "column"), nan),
            create("states", (num_states,), "f8", ("parity", "state"), nan),
            create("source", (metrics_layout.num_ranks,), "i8", ("row", "rank"), -1),
        )
        self._buffers = (
            np.full((chunk, *cells), np.nan, np.float32),
            np.full((chunk, num_scalars), np.nan),
            np.full((1, num_states), np.nan),
            np.full((chunk, metrics_layout.num_ranks), -1, np.int64),
        )
        self._layout, self._num_rows = metrics_layout, 0


class MetricsReader:
    """Reads rows as they come; a second call of `read_new` gives only what was appended in between."""

    def __init__(self, objects: Objects, segment: int = 0, stop: int | None = None) -> None:
        self._objects = objects
        self._segment, self._stop = segment, stop
        self._rows = 0
        self._open: tuple[MetricsLayout, tuple[Array, Array, Array]] | None = None

    def read_new(self) -> Iterator[MetricsBlock]:
        """Rows appended since the last call.

        Yields:
            Blocks of consecutive rows, oldest first.

        Raises:
            CorruptMetricsError: a chunk of a committed row cannot be read.
        """
        while self._segment != self._stop:
            # Looked for before the read: whatever the older segment got, it has been read when the newer one is opened.
            newer = self._objects.exists(f"{layout.metrics_key(self._segment + 1)}/zarr.json")
            if self._open is not None or self._open_segment():
                while (block := self._read_chunk()) is not None:
                    yield block
            if not newer:
                return
            self._segment, self._rows, self._open = self._segment + 1, 0, None

    def _open_segment(self) -> bool:
        key = layout.metrics_key(self._segment)
        attributes = read_group_attributes(self._objects, key)
        if attributes is None:
            return False
        try:
            values, scalars, source = (
                Array.open(self._objects, f"{key}/{name}") for name in ("values", "scalars", "source")
            )
        except StoreError:  # claimed a moment ago, or its writer was killed before it had any row
            return False
        metrics_layout = MetricsLayout(
            layers=tuple(attributes["layers"]),
            metrics=tuple(attributes["metrics"]),
            scalars=tuple(attributes["columns"]),
            states=tuple(attributes.get("states", ())),
            num_ranks=attributes["num_ranks"],
        )
        self._open = (metrics_layout, (values, scalars, source))
        return True

    def _read_chunk(self) -> MetricsBlock | None:
        assert self._open is not None
        metrics_layout, (values, scalars, source) = self._open
        if self._rows == layout.TABLE_SEGMENT_ROWS:
            return None
        chunk_start = self._rows // layout.TABLE_CHUNK_ROWS * layout.TABLE_CHUNK_ROWS
        key = f"{layout.metrics_key(self._segment)}/source/c.{chunk_start // layout.TABLE_CHUNK_ROWS}.0"
        if not self._objects.exists(key):
            return None
        stop = chunk_start + layout.TABLE_CHUNK_ROWS
        try:
            rows_source = source.read(slice(self._rows, stop))
            count = int((rows_source >= 0).any(axis=1).sum())
            if count == 0:
                return None
            rows = slice(self._rows, self._rows + count)
            block = MetricsBlock(
                layout=metrics_layout, values=values.read(rows), scalars=scalars.read(rows), source=rows_source[:count]
            )
        except CorruptFrameError as error:
            raise CorruptMetricsError(str(error)) from error
        self._rows += count
        return block


def _segments(objects: Objects) -> list[int]:
    return layout.numbers(objects.children(layout.metrics_key()), r"s(\d{6,})")


def _advance(cursor: Mapping[int, int], source: Mapping[int, int]) -> dict[int, int]:
    return {**cursor, **{rank: max(seq, cursor.get(rank, -1)) for rank, seq in source.items()}}


def read_cursor(objects: Objects) -> dict[int, int]:
    """Newest measured `seq` of each rank, as the metrics table has it.

    Returns:
        Rank to `seq`; empty before the first row.

    Raises:
        CorruptMetricsError: a chunk of it cannot be read.
    """
    numbers = _segments(objects)
    if not numbers:
        return {}
    key = layout.metrics_key(numbers[-1])
    attributes = read_group_attributes(objects, key) or {}
    cursor = {int(rank): int(seq) for rank, seq in attributes.get("cursor", {}).items()}
    chunks = layout.numbers(objects.children(f"{key}/source"), r"c\.(\d+)\.0")
    # A silent rank may be absent from the newest chunk, so every chunk of the segment is asked.
    for chunk in chunks:
        start = chunk * layout.TABLE_CHUNK_ROWS
        try:
            source = Array.open(objects, f"{key}/source").read(slice(start, start + layout.TABLE_CHUNK_ROWS))
        except CorruptFrameError as error:
            raise CorruptMetricsError(str(error)) from error
        cursor = _advance(cursor, {rank: int(seq) for rank, seq in enumerate(source.max(axis=0)) if seq >= 0})
    return cursor


def read_tail(objects: Objects, num_rows: int) -> list[MetricsBlock]:
    """The newest rows, from which a restarted watcher continues; every restart has begun a segment of its own.

    Args:
        objects: the run.
        num_rows: how many rows at least, if there are so many.

    Returns:
        Blocks, oldest first; empty before the first row.
    """
    blocks: list[MetricsBlock] = []
    for number in reversed(_segments(objects)):
        blocks = [*MetricsReader(objects, number, number + 1).read_new(), *blocks]
        if sum(len(block.scalars) for block in blocks) >= num_rows:
            break
    return blocks


def read_states(objects: Objects) -> dict[str, float]:
    """The detectors' states as they were after the newest row.

    Args:
        objects: the run.

    Returns:
        Values by name; empty before the first row.

    Raises:
        CorruptMetricsError: they cannot be read.
    """
    for number in reversed(_segments(objects)):
        num_rows = sum(len(block.scalars) for block in MetricsReader(objects, number, number + 1).read_new())
        if num_rows:
            key = layout.metrics_key(number)
            names = (read_group_attributes(objects, key) or {}).get("states", [])
            parity = (num_rows - 1) % _STATES_KEPT
            try:
                values = Array.open(objects, f"{key}/states").read(parity)
            except CorruptFrameError as error:
                raise CorruptMetricsError(str(error)) from error
            return dict(zip(names, values.tolist(), strict=False))
    return {}
