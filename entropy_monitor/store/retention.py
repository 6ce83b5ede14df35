"""The ring: whole segments older than the newest `keep` committed frames are removed by the writer that owns them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entropy_monitor.store import layout
from entropy_monitor.store.frames import list_commits, list_ranks, list_segments
from entropy_monitor.store.metrics import read_cursor

if TYPE_CHECKING:
    from entropy_monitor.store.objects import Objects


class Retention:
    """Bounds one rank's frames on disk to ``keep + 64``, and counts what nobody had measured."""

    def __init__(self, objects: Objects, rank: int, keep: int) -> None:
        self._objects, self._rank, self._keep = objects, rank, keep
        record = objects.get_json(layout.retention_key(rank)) or {}
        self.removed = int(record.get("frames_removed", 0))
        self.removed_unmeasured = int(record.get("frames_removed_unmeasured", 0))
        self._removed_through = int(record.get("removed_through", -1))
        # A writer killed in the middle of a removal has counted it already: only the files are left to clear.
        for segment in list_segments(objects, rank):
            if segment <= self._removed_through:
                self._clear(segment)
        segments = list_segments(objects, rank)
        self._counts = {segment: len(list_commits(objects, rank, segment)) for segment in segments}

    def committed(self, seq: int) -> None:
        """Count a frame just committed, and remove the oldest segments if the ring is full."""
        segment = seq // layout.SEGMENT_FRAMES
        self._counts[segment] = self._counts.get(segment, 0) + 1
        self.trim()

    def trim(self) -> None:
        """Remove the oldest segments without which `keep` frames remain; the newest segment always stays."""
        total = sum(self._counts.values())
        for oldest in sorted(self._counts)[:-1]:
            total -= self._counts[oldest]
            if total < self._keep:
                return
            del self._counts[oldest]
            self._remove(oldest)

    def _remove(self, segment: int) -> None:
        seqs = list_commits(self._objects, self._rank, segment)
        cursor = read_cursor(self._objects).get(self._rank, -1)
        self.removed += len(seqs)
        self.removed_unmeasured += sum(seq > cursor for seq in seqs)
        self._removed_through = segment
        # Counted first: a kill in between leaves files to clear, never a frame counted twice or not at all.
        self._objects.put_json(
            layout.retention_key(self._rank),
            {
                "removed_through": segment,
                "frames_removed": self.removed,
                "frames_removed_unmeasured": self.removed_unmeasured,
            },
        )
        self._clear(segment)

    def _clear(self, segment: int) -> None:
        key = layout.frames_key(self._rank, segment)
        for seq in list_commits(self._objects, self._rank, segment):
            self._objects.delete(layout.commit_key(self._rank, seq))
        self._objects.delete_tree(key)


def trim_vanished_ranks(objects: Objects, world_size: int, keep: int) -> None:
    """Apply the ring to the frames of ranks that no longer exist; rank 0 owns them."""
    for rank in list_ranks(objects):
        if rank >= world_size:
            Retention(objects, rank, keep).trim()
