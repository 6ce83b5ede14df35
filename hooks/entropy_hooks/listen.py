"""The cooperative socket: ``entropy-monitor attach`` and ``detach`` without any debugger.

One JSON line in, one out; the verbs are fixed, and no code is ever taken. The directory is its owner's alone, and the
kernel says who is on the other side.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

from entropy_hooks.process_end import at_process_end
from entropy_hooks.remote import submit
from entropy_monitor.runtime_dir import socket_path

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger("entropy_hooks")

MAX_REQUEST_BYTES = 65536
_REQUEST_TIMEOUT_S = 5.0
"""How long the other side may take to say what it wants."""
_MAX_CONNECTIONS = 8
_listener: _Listener | None = None


def listen() -> Path | None:
    """Let ``entropy-monitor attach PID`` and ``detach PID`` of the same user into this process.

    The socket is closed when the process ends. A forked child has none until it calls this itself; calling it twice
    does nothing.

    Returns:
        The socket; None when it could not be opened, which is logged.
    """
    global _listener
    if _listener is not None:
        return _listener.path
    try:
        _listener = _Listener(socket_path(os.getpid()))
    except OSError as error:
        logger.warning("no socket for `entropy-monitor attach` (training goes on): %s", error)
        return None
    at_process_end(close)
    return _listener.path


def close() -> None:
    """Close and remove the socket; without one, nothing."""
    global _listener
    listener, _listener = _listener, None
    if listener is not None:
        listener.close()


def _leave_to_parent() -> None:
    global _listener
    listener, _listener = _listener, None
    if listener is not None:
        listener.forget()


os.register_at_fork(after_in_child=_leave_to_parent)


class _Listener:
    """An open socket and the thread that serves it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pid = os.getpid()
        self._connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            # Whoever sees the path can connect: a socket refuses between being bound and listening.
            unheard = path.with_suffix(".new")
            unheard.unlink(missing_ok=True)
            self._socket.bind(str(unheard))
            unheard.chmod(0o600)
            self._socket.listen(_MAX_CONNECTIONS)
            unheard.replace(path)  # what bears our number there was left by a process that is gone
        except OSError:
            self._socket.close()
            raise
        threading.Thread(target=self._serve, name="entropy-listen", daemon=True).start()

    def close(self) -> None:
        if os.getpid() == self._pid:  # a handler of the parent's, run at the end of a forked child
            with contextlib.suppress(OSError):
                self.path.unlink()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()

    def forget(self) -> None:
        """In a forked child: thread and file are the parent's."""
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            if not self._connections.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._answer, args=(connection,), name="entropy-request", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        def reply(answer: dict[str, Any]) -> None:
            with contextlib.suppress(OSError):  # the other side has gone: what it asked for is done all the same
                connection.sendall(json.dumps(answer).encode() + b"\n")

        try:
            with connection:
                try:
                    request = _read_request(connection)
                except (OSError, ValueError, RecursionError) as error:
                    reply({"ok": False, "pid": os.getpid(), "message": " ".join(str(error).split())})
                    _let_them_read(connection)
                else:
                    submit(request, reply)
        finally:
            self._connections.release()


def _let_them_read(connection: socket.socket) -> None:
    """Closed with something unread, a socket would take the refusal back from who is still sending."""
    with contextlib.suppress(OSError):
        connection.settimeout(_REQUEST_TIMEOUT_S)
        connection.shutdown(socket.SHUT_WR)
        for _ in range(MAX_REQUEST_BYTES // 4096):
            if not connection.recv(4096):
                return


def _read_request(connection: socket.socket) -> dict[str, Any]:
    """One JSON object from a process of the same user.

    Returns:
        The object.

    Raises:
        PermissionError: the process is another user's.
        ValueError: it is no JSON object on one line, or too long.
    """
    if (uid := _peer_uid(connection)) not in (None, os.getuid()):
        raise PermissionError(f"expected a request of user {os.getuid()}; found one of user {uid}: become that user")
    connection.settimeout(_REQUEST_TIMEOUT_S)
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(4096)
        line += part
        if not part or len(line) > MAX_REQUEST_BYTES:
            raise ValueError(
                f"expected one line of at most {MAX_REQUEST_BYTES} bytes; found {len(line)} without an end: shorten it"
            )
    connection.settimeout(None)
    request = json.loads(line)
    if not isinstance(request, dict):
        raise ValueError('expected a JSON object such as {"verb": "ping"}; found something else: send one')
    return request


def _peer_uid(connection: socket.socket) -> int | None:
    """Who is on the other side.

    Returns:
        The user; None where the system cannot say, and the directory's mode alone keeps others out.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]
