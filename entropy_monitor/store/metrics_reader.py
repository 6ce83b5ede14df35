"""Reads the metrics table: rows as they come, and where a restarted watcher continues."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entropy_monitor.errors import CorruptFrameError, CorruptMetricsError, StoreError
from entropy_monitor.store import layout
from entropy_monitor.store.arrays import Array, read_group_attributes
from entropy_monitor.store.metrics import (
    STATES_KEPT,
    MetricsBlock,
    MetricsLayout,
    advance,
    list_metrics_segments,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from entropy_monitor.store.objects import Objects


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


def read_cursor(objects: Objects) -> dict[int, int]:
    """Newest measured `seq` of each rank, as the metrics table has it.

    Returns:
        Rank to `seq`; empty before the first row.

    Raises:
        CorruptMetricsError: a chunk of it cannot be read.
    """
    numbers = list_metrics_segments(objects)
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
        cursor = advance(cursor, {rank: int(seq) for rank, seq in enumerate(source.max(axis=0)) if seq >= 0})
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
    for number in reversed(list_metrics_segments(objects)):
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
        CorruptMetricsError: they cannot be read, or an older version has not written any.
    """
    for number in reversed(list_metrics_segments(objects)):
        num_rows = sum(len(block.scalars) for block in MetricsReader(objects, number, number + 1).read_new())
        if num_rows:
            key = layout.metrics_key(number)
            names = (read_group_attributes(objects, key) or {}).get("states", [])
            parity = (num_rows - 1) % STATES_KEPT
            try:
                values = Array.open(objects, f"{key}/states").read(parity)
            except (CorruptFrameError, StoreError) as error:
                raise CorruptMetricsError(str(error)) from error
            return dict(zip(names, values.tolist(), strict=False))
    return {}
