"""A directory in a target's view of the file system, into which it writes its answer."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from typing import TYPE_CHECKING, Self

from entropy_monitor.errors import AttachError
from entropy_monitor.injection.process import read_environ, temporary_directories
from entropy_monitor.injection.protocol import MAX_LINE_BYTES, decode_reply

if TYPE_CHECKING:
    from types import TracebackType

    from entropy_monitor.injection.process import Process
    from entropy_monitor.injection.protocol import Reply

_REPLY = "reply.json"
_MODE = 0o700
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Mailbox:
    """Made for one request, owned by the target's user, and removed at the end."""

    def __init__(self, process: Process) -> None:
        self._name = f"entropy-monitor-answer-{secrets.token_hex(8)}"
        self._parent, above = _open_temporary(process)
        self.path = f"{above}/{self._name}"
        """Where it is, as the target sees it."""
        try:
            os.mkdir(self._name, _MODE, dir_fd=self._parent)
            self._directory = os.open(self._name, _DIRECTORY, dir_fd=self._parent)
        except OSError:
            os.close(self._parent)
            raise
        if os.geteuid() != process.uid:
            os.fchown(self._directory, process.uid, process.gid)

    def put(self, name: str, text: str) -> str:
        """Leave a file that the target may read.

        Returns:
            Its path, as the target sees it.
        """
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=self._directory)
        with os.fdopen(file, "w", encoding="ascii") as opened:
            opened.write(text)
        return f"{self.path}/{name}"

    def reply(self) -> Reply | None:
        """Look for the answer.

        Returns:
            The answer, or None as long as there is none.

        Raises:
            AttachError: what was written is no answer.
        """
        try:
            file = os.open(_REPLY, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._directory)
        except FileNotFoundError:
            return None
        with os.fdopen(file, "rb") as opened:
            line = opened.read(MAX_LINE_BYTES + 1) if stat.S_ISREG(os.fstat(file).st_mode) else b""
        try:
            return decode_reply(line)
        except ValueError as error:
            raise AttachError(str(error)) from None

    def __enter__(self) -> Self:
        """Nothing to do yet.

        Returns:
            This mailbox.
        """
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the directory; a request that comes too late finds it gone and does nothing."""
        with contextlib.suppress(OSError):  # the target's user may have put something of its own there
            for name in os.listdir(self._directory):  # noqa: PTH208 - pathlib has no directory descriptors
                os.unlink(name, dir_fd=self._directory)
            os.rmdir(self._name, dir_fd=self._parent)
        os.close(self._directory)
        os.close(self._parent)


def _open_temporary(process: Process) -> tuple[int, str]:
    """Open the first temporary directory in which a file of the target's user is safe, and name it."""
    tried = temporary_directories(read_environ(process.pid))
    for path in tried:
        place = f"{process.root}{path}"
        try:
            directory = os.open(place, _DIRECTORY)
        except OSError:
            continue
        found = os.fstat(directory)
        shared = found.st_uid == 0 and found.st_mode & 0o1002 == 0o1002
        if found.st_uid == process.uid or shared or process.uid == 0:
            return directory, path.rstrip("/")
        os.close(directory)
    raise AttachError(
        f"expected a temporary directory of process {process.pid}; found none in {', '.join(tried)}: make one"
    )
