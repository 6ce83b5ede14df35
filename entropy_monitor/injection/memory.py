"""Reading and writing another process's memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class Memory:
    """``/proc/PID/mem``, open; needs the right to trace the process."""

    def __init__(self, pid: int, *, write: bool = False) -> None:
        self._file = os.open(f"/proc/{pid}/mem", (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)

    def read(self, address: int, size: int) -> bytes:
        """Read bytes.

        Returns:
            The bytes.

        Raises:
            OSError: nothing is mapped there.
        """
        return os.pread(self._file, size, address)

    def write(self, address: int, data: bytes) -> None:
        """Write bytes.

        Raises:
            OSError: nothing is mapped there, or not all of it.
        """
        if os.pwrite(self._file, data, address) != len(data):
            raise OSError(f"expected {len(data)} writable bytes at {address:#x}; found fewer")

    def __enter__(self) -> Self:
        """Nothing to do yet.

        Returns:
            This memory.
        """
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        os.close(self._file)
