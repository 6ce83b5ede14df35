"""Appends rows to the metrics table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from entropy_monitor.errors import StoreError
from entropy_monitor.store import layout
from entropy_monitor.store.arrays import Array, create_group, create_group_path
from entropy_monitor.store.metrics import STATES_KEPT, advance, list_metrics_segments
from entropy_monitor.store.metrics_reader import read_cursor
from entropy_monitor.types import PHASES, REGIMES, STAGES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from entropy_monitor.store.metrics import MetricsLayout, MetricsRow
    from entropy_monitor.store.objects import Objects


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
        starts = (first, first, self._num_rows % STATES_KEPT, first)
        for array, start, buffer in zip(self._arrays, starts, self._buffers, strict=True):
            array.wait(array.write((start,), buffer))
        self._num_rows += 1
        self.cursor = advance(self.cursor, row.source)

    def _claim(self, metrics_layout: MetricsLayout) -> None:
        number = max([-1, *list_metrics_segments(self._objects)]) + 1
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
            kept = (STATES_KEPT, 1) if name == "states" else (rows, chunk)
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
