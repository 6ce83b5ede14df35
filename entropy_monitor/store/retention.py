"""The ring: whole segments older than the newest `keep` committed frames are removed by the writer that owns them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entropy_monitor.errors import CorruptMetricsError, StoreError
from entropy_monitor.store import layout
from entropy_monitor.store.frames import list_commits, list_ranks, list_segments
from entropy_monitor.store.metrics_reader import read_cursor

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
        self._seqs = {segment: set(list_commits(objects, rank, segment)) for segment in list_segments(objects, rank)}

    def committed(self, seq: int) -> None:
        """Count a frame just committed, once, and remove the oldest segments if the ring is full."""
        self._seqs.setdefault(seq // layout.SEGMENT_FRAMES, set()).add(seq)
        self.trim()

    def trim(self) -> None:
        """Remove the oldest segments without which `keep` frames remain; the newest segment always stays."""
        total = sum(len(seqs) for seqs in self._seqs.values())
        for oldest in sorted(self._seqs)[:-1]:
            total -= len(self._seqs[oldest])
            if total < self._keep:
                return
            self._remove(oldest)
            del self._seqs[oldest]  # after the removal: one that failed is tried again at the next commit

    def _remove(self, segment: int) -> None:
        seqs, cursor = list_commits(self._objects, self._rank, segment), self._cursor()
        removed = self.removed + len(seqs)
        unmeasured = self.removed_unmeasured + sum(seq > cursor for seq in seqs)
        # Counted first: a kill in between leaves files to clear, never a frame counted twice or not at all.
        self._objects.put_json(
            layout.retention_key(self._rank),
            {"removed_through": segment, "frames_removed": removed, "frames_removed_unmeasured": unmeasured},
        )
        self.removed, self.removed_unmeasured, self._removed_through = removed, unmeasured, segment
        self._clear(segment)

    def _cursor(self) -> int:
        """The newest measured frame; a damaged table must not keep the disk from being bounded, and proves nothing.

        Returns:
            Its `seq`, -1 where none is known to have been measured.
        """
        try:
            return read_cursor(self._objects).get(self._rank, -1)
        except (CorruptMetricsError, StoreError):
            return -1

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
