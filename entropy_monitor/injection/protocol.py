"""What the asking side and a training process say to each other: one JSON line each way, fixed verbs, never code.

The cooperative socket stands at ``${XDG_RUNTIME_DIR or tmp}/entropy-monitor-UID/PID.sock`` as the *training process*
sees it: directory 0700, socket 0600. A process entered from outside is given the same request and answers with the same
reply, by a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

Verb = Literal["attach", "detach", "ping"]
MAX_LINE_BYTES = 1 << 20


class Request(TypedDict):
    """What is asked of a training process."""

    verb: Verb
    run: NotRequired[str]
    """Absolute path or URL of the run directory, for ``attach``."""
    options: NotRequired[dict[str, Any]]
    """Fields of `entropy_monitor.config.MonitorOptions`, for ``attach``."""
    wait_s: NotRequired[float]
    """The answer must come within this time, for ``attach``."""


class Reply(TypedDict):
    """What a training process answers; further keys tell pid, rank, run, attempt, step, model and layers."""

    ok: bool
    message: str
    """One line."""


def socket_directory(environ: Mapping[str, str], uid: int, tmp: str = "/tmp") -> Path:
    """Where a process with this environment keeps its socket.

    Args:
        environ: environment of the training process.
        uid: real user of the training process, as it sees it itself.
        tmp: ``tempfile.gettempdir()`` of the training process.

    Returns:
        The directory, as the training process sees it.
    """
    return Path(environ.get("XDG_RUNTIME_DIR") or tmp) / f"entropy-monitor-{uid}"


def socket_path(pid: int, environ: Mapping[str, str], uid: int, tmp: str = "/tmp") -> Path:
    """Where process `pid` listens: its own ``os.getpid()``, which in a container is not the host's number.

    Args:
        pid: the training process, in its own numbering.
        environ: its environment.
        uid: its ``os.getuid()``.
        tmp: its ``tempfile.gettempdir()``.

    Returns:
        The socket's path, as the training process sees it.
    """
    return socket_directory(environ, uid, tmp) / f"{pid}.sock"


def encode(message: Mapping[str, Any]) -> bytes:
    """Write a request or a reply.

    Returns:
        One line, its newline included.
    """
    return json.dumps(message, separators=(",", ":"), default=str).encode("ascii") + b"\n"


def decode_reply(line: bytes) -> Reply:
    """Read and check a reply.

    Returns:
        The reply.

    Raises:
        ValueError: it is no reply.
    """
    if len(line) > MAX_LINE_BYTES or not line.endswith(b"\n"):
        raise ValueError(f"expected one JSON line of at most {MAX_LINE_BYTES} bytes; found {len(line)} bytes")
    try:
        reply = json.loads(line)
    except ValueError as error:
        raise ValueError(f"expected one JSON line; found {line[:80]!r}: {error}") from None
    if (
        not isinstance(reply, dict)
        or not isinstance(reply.get("ok"), bool)
        or not isinstance(reply.get("message"), str)
    ):
        raise ValueError(f"expected a reply with ok and message; found {line[:80]!r}: use a client of the same version")
    return cast("Reply", reply)
