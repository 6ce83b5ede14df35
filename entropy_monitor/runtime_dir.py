"""The directory of this user's sockets: only its owner may enter it. Standard library only."""

from __future__ import annotations

import os
import stat
import tempfile
from typing import TYPE_CHECKING

from entropy_monitor.injection.protocol import socket_directory

if TYPE_CHECKING:
    from pathlib import Path


def runtime_dir() -> Path:
    """``${XDG_RUNTIME_DIR}/entropy-monitor-UID``, or in the directory for temporary files; made if need be.

    Returns:
        The directory.

    Raises:
        PermissionError: somebody else's directory, file or link stands there.
        OSError: it cannot be made.
    """
    path = socket_directory(os.environ, os.getuid(), tempfile.gettempdir())
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(
            f"expected a directory of user {os.getuid()} at {path}; found one of user {found.st_uid}, or no directory: "
            "remove it, or set XDG_RUNTIME_DIR"
        )
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)
    return path


def socket_path(pid: int) -> Path:
    """Where a process listens, if it does.

    Args:
        pid: its number.

    Returns:
        The path.

    Raises:
        PermissionError: the directory is somebody else's.
        OSError: the directory cannot be made.
    """
    return runtime_dir() / f"{pid}.sock"
