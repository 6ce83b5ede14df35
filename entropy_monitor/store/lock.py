"""One watcher a run: a file lock that the kernel frees when its holder dies."""

from __future__ import annotations

import json
import os
import socket
from typing import IO, TYPE_CHECKING

from entropy_monitor.errors import StoreError, WatcherRunningError

if TYPE_CHECKING:
    from types import TracebackType

    from entropy_monitor.store.objects import Objects


class WatcherLock:
    """Held while a watcher runs; a second watcher is told who holds it."""

    def __init__(self, objects: Objects) -> None:
        if objects.path is None:
            raise StoreError(f"expected a run on a local path; found {objects.url}: watch it where its disk is mounted")
        self._path = objects.path / "heartbeat" / "watcher.lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> WatcherLock:
        """Take the lock.

        Returns:
            This lock.

        Raises:
            WatcherRunningError: somebody else has it.
        """
        import fcntl

        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise WatcherRunningError(
                f"expected no other watcher of this run; found one ({holder}): stop it, or read its results"
            ) from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None
