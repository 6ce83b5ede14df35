"""Per-step scalars: every optimizer step of every rank, flushed once a second and before each frame's commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entropy_monitor.errors import CorruptFrameError, CorruptMetricsError, StoreError
from entropy_monitor.store import layout
from entropy_monitor.store.arrays import Array, create_group, create_group_path, read_group_attributes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from entropy_monitor.store.objects import Objects

_CHUNK_ROWS = 512


class ScalarsWriter:
    """Writes one rank's per-step scalars; owned by one thread."""

    def __init__(self, objects: Objects, rank: int, attempt: int) -> None:
        self._objects, self._rank, self._attempt = objects, rank, attempt
        self._array: Array | None = None
        self._tail = np.full((_CHUNK_ROWS, len(layout.SCALAR_COLUMNS)), np.nan)
        self._num_rows = 0
        self._flushed_rows = 0

    def append(self, row: Mapping[str, float]) -> None:
        """Take one step's scalars; they are on disk after the next `flush`."""
        slot = self._num_rows % _CHUNK_ROWS
        if slot == 0:
            self.flush()
            self._tail[:] = np.nan
        self._tail[slot] = [row.get(name, np.nan) for name in layout.SCALAR_COLUMNS]
        self._num_rows += 1

    def flush(self) -> None:
        """Write what was appended since the last flush.

        Raises:
            StoreError: the store cannot be written; the rows are kept for the next flush.
        """
        if self._flushed_rows == self._num_rows:
            return
        first = (self._num_rows - 1) // _CHUNK_ROWS * _CHUNK_ROWS
        row_in_segment = first % layout.TABLE_SEGMENT_ROWS
        if self._array is None or (row_in_segment == 0 and self._flushed_rows <= first):
            self._array = self._claim()
        self._array.wait(self._array.write((row_in_segment,), self._tail))
        self._flushed_rows = self._num_rows

    def _claim(self) -> Array:
        create_group_path(self._objects, layout.scalars_key(self._rank))
        names = self._objects.children(layout.scalars_key(self._rank))
        number = max([-1, *layout.numbers(names, r"s(\d{6,})")]) + 1
        attributes = {"columns": list(layout.SCALAR_COLUMNS), "rank": self._rank, "attempt": self._attempt}
        while not create_group(self._objects, layout.scalars_key(self._rank, number), attributes):
            number += 1
        return Array.create(
            self._objects,
            f"{layout.scalars_key(self._rank, number)}/values",
            shape=(layout.TABLE_SEGMENT_ROWS, len(layout.SCALAR_COLUMNS)),
            chunk=(_CHUNK_ROWS, len(layout.SCALAR_COLUMNS)),
            dtype="f8",
            dimensions=("row", "column"),
            fill=float("nan"),
        )


class ScalarsReader:
    """Reads one rank's per-step scalars as they come."""

    def __init__(self, objects: Objects, rank: int) -> None:
        self._objects, self.rank = objects, rank
        self._segment = 0
        self._rows = 0
        self._attempt = 0
        self._array: Array | None = None

    def read_new(self) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Rows written since the last call.

        Yields:
            The attempt, and rows ``(T, S)`` with the columns of `layout.SCALAR_COLUMNS`, oldest first.

        Raises:
            CorruptMetricsError: a chunk cannot be read.
        """
        while True:
            newer = self._objects.exists(f"{layout.scalars_key(self.rank, self._segment + 1)}/zarr.json")
            if self._array is not None or self._open_segment():
                while (rows := self._read_chunk()) is not None:
                    yield self._attempt, rows
            if not newer:
                return
            self._segment, self._rows, self._array = self._segment + 1, 0, None

    def _open_segment(self) -> bool:
        key = layout.scalars_key(self.rank, self._segment)
        attributes = read_group_attributes(self._objects, key)
        if attributes is None:
            return False
        try:
            self._array = Array.open(self._objects, f"{key}/values")
        except StoreError:  # claimed a moment ago, or its writer was killed before its first flush
            return False
        self._attempt = int(attributes["attempt"])
        return True

    def _read_chunk(self) -> NDArray[np.float64] | None:
        assert self._array is not None
        if self._rows == layout.TABLE_SEGMENT_ROWS:
            return None
        chunk = self._rows // _CHUNK_ROWS
        key = f"{layout.scalars_key(self.rank, self._segment)}/values/c.{chunk}.0"
        if not self._objects.exists(key):
            return None
        try:
            rows = self._array.read(slice(self._rows, (chunk + 1) * _CHUNK_ROWS))
        except CorruptFrameError as error:
            raise CorruptMetricsError(str(error)) from error
        rows = rows[np.isfinite(rows[:, 0])]
        if len(rows) == 0:
            return None
        self._rows += len(rows)
        return rows
