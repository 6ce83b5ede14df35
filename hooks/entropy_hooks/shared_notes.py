"""Notes that all ranks of a job can read: the process group's key-value store, never a collective.

A collective in a hook would hang a job in which not every rank calls it. A note is read by whoever asks, when it asks.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class SharedNotes:
    """Notes under one prefix; each operation is one round trip to the store, 0.1 ms on one host."""

    def __init__(self, prefix: str) -> None:
        store: Any = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        # A connection of our own: the job's may be held by somebody who waits for something.
        self._store: Any = store.clone() if hasattr(store, "clone") else store
        self._prefix = prefix
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def write(self, name: str, note: Mapping[str, Any]) -> None:
        """Leave a note for the others."""
        self._store.set(f"{self._prefix}/{name}", json.dumps(note))

    def read(self, name: str) -> dict[str, Any] | None:
        """Look for a note, without waiting for it.

        Returns:
            The note, or None while there is none.
        """
        key = f"{self._prefix}/{name}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def has_all(self, names: Sequence[str]) -> bool:
        """Ask for several notes at once.

        Returns:
            Whether all are there.
        """
        return bool(self._store.check([f"{self._prefix}/{name}" for name in names]))


def share_notes(prefix: str) -> SharedNotes | None:
    """Open the notes of a job that trains on several ranks.

    Args:
        prefix: what tells these notes from others of the job.

    Returns:
        The notes; None for a job of one rank, or of ranks that know nothing of one another.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return SharedNotes(prefix)
