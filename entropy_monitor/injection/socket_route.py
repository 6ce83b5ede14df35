"""Asking a training process that listens: no right to trace it is needed."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_monitor.errors import AttachError
from entropy_monitor.injection.process import read_environ, temporary_directories
from entropy_monitor.injection.protocol import MAX_LINE_BYTES, decode_reply, encode, socket_path

if TYPE_CHECKING:
    import threading
    from collections.abc import Generator

    from entropy_monitor.injection.process import Process
    from entropy_monitor.injection.protocol import Reply, Request

_CONNECT_S = 5.0
_POLL_S = 0.1


def find_socket(process: Process) -> Path | None:
    """Find where a process listens.

    Args:
        process: the process.

    Returns:
        The socket, through the process's own root directory, or None if it does not listen.
    """
    try:
        environ = read_environ(process.pid)
    except OSError:  # another user's: its socket is closed to us as well
        return None
    for tmp in temporary_directories(environ):
        inner = socket_path(process.inner_pid, environ, process.inner_uid, tmp)
        outer = Path(f"{process.root}{inner}")
        with contextlib.suppress(OSError):
            if outer.is_socket() and outer.parent.stat().st_uid == process.uid:
                return outer
    return None


def ask_socket(process: Process, request: Request, wait_s: float, cancel: threading.Event) -> Reply:
    """Send a request and wait for the answer.

    Args:
        process: the process that is to answer.
        request: what is asked.
        wait_s: how long to wait.
        cancel: set it to give up early.

    Returns:
        The answer.

    Raises:
        AttachError: it does not listen, does not answer, or somebody else does.
    """
    path = find_socket(process)
    if path is None:
        raise AttachError(
            f"expected process {process.pid} to listen; found no socket of it: start it with `entropy-monitor run`, or "
            "use another --method"
        )
    with socket.socket(socket.AF_UNIX) as connection, _short(path) as short:
        connection.settimeout(_CONNECT_S)
        try:
            connection.connect(short)
            _check_peer(connection, process)
            connection.sendall(encode({**request}))
            return decode_reply(_line(connection, time.monotonic() + wait_s, cancel))
        except TimeoutError:
            raise AttachError(
                f"expected an answer of process {process.pid} within {wait_s:.0f} s; found none: give a longer --wait-s"
            ) from None
        except (OSError, ValueError) as error:
            raise AttachError(f"expected an answer on {path}; found {error}: use another --method") from error


def listens(process: Process) -> bool:
    """Whether somebody answers at the socket of a process, without saying anything to it.

    Returns:
        True if a connection is accepted.
    """
    path = find_socket(process)
    if path is None:
        return False
    with socket.socket(socket.AF_UNIX) as connection, _short(path) as short:
        connection.settimeout(_CONNECT_S)
        try:
            connection.connect(short)
        except OSError:  # left behind by a process that was killed, whose number was given away again
            return False
    return True


@contextlib.contextmanager
def _short(path: Path) -> Generator[str]:
    """Name a socket in less than the 108 bytes that an address may have."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _check_peer(connection: socket.socket, process: Process) -> None:
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if pid not in {process.pid, 0}:  # 0: a process that our namespace does not know
        raise AttachError(f"expected process {process.pid} at its socket; found process {pid}: use another --method")


def _line(connection: socket.socket, deadline: float, cancel: threading.Event) -> bytes:
    line = b""
    connection.settimeout(_POLL_S)
    while not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES and not cancel.is_set():
        try:
            part = connection.recv(1 << 16)
        except TimeoutError:
            if time.monotonic() >= deadline:
                raise
            continue
        if not part:
            break
        line += part
    return line
