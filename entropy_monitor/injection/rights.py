"""Why a process may not be traced, and the remedy, in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from entropy_monitor.errors import AttachError, NoSuchProcessError
from entropy_monitor.injection.process import STOPPED, ZOMBIE, Process

_CAP_SYS_PTRACE = 19
_NOBODY = 3
_CONTAINER = "start the container with --cap-add SYS_PTRACE, or attach from the host"
_REMEDIES = "run this as root, start the job with `setpriv --ptracer any CMD`, or start it with `entropy-monitor run`"


def yama_scope() -> int | None:
    """Read how far the kernel restricts ptrace: 0 same user, 1 own descendants, 2 root alone, 3 nobody.

    Returns:
        The scope, or None on a kernel without that restriction.
    """
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii"))
    except OSError:
        return None


def may_trace_all() -> bool:
    """Whether CAP_SYS_PTRACE is effective in this process.

    Returns:
        True if it is.
    """
    return bool(int(_own_status("CapEff"), 16) >> _CAP_SYS_PTRACE & 1)


def seccomp_filtered() -> bool:
    """Whether a seccomp filter, as containers have, stands between this process and the kernel.

    Returns:
        True if one does.
    """
    return _own_status("Seccomp") == "2"


def _own_status(name: str) -> str:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:")), "0")


def check_state(process: Process) -> None:
    """Refuse a process that no right in the world makes answer.

    Args:
        process: as it was just found.

    Raises:
        NoSuchProcessError: it has ended.
        AttachError: it is stopped or traced.
    """
    pid = process.pid
    if process.state in ZOMBIE:
        raise NoSuchProcessError(
            f"expected a running process; found that {pid} ({process.name}) has ended and is a zombie of process "
            f"{process.parent}: start the job again"
        )
    if process.tracer:
        raise AttachError(
            f"expected process {pid} untraced; found it traced by {describe(process.tracer)}: end that first, "
            "a process has one tracer"
        )
    if process.state == STOPPED:
        raise AttachError(f"expected process {pid} running; found it stopped, and it stays so: kill -CONT {pid} first")


def describe(pid: int) -> str:
    """Name a process.

    Returns:
        Its name and number.
    """
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        name = "a process"
    return f"{name} (pid {pid})"


def refuse(process: Process) -> NoReturn:
    """Explain why the kernel has just refused to let us trace a process.

    Args:
        process: the process.

    Raises:
        AttachError: always.
    """
    raise AttachError(f"expected the right to trace process {process.pid}; found {_obstacle(process)}")


def _obstacle(process: Process) -> str:
    """What is in the way, and the remedy."""
    ours, scope = os.geteuid(), yama_scope()
    if may_trace_all():
        if seccomp_filtered():
            return f"a container's seccomp filter: {_CONTAINER}"
        return "a security module or another user namespace in the way: attach from the host as root"
    if ours == 0:
        return f"root without CAP_SYS_PTRACE, as in a container: {_CONTAINER}"
    if ours != process.uid:
        return f"that it belongs to uid {process.uid}, and this is uid {ours}: use sudo"
    if scope == _NOBODY:
        return f"kernel.yama.ptrace_scope {scope}, which allows it to nobody: start the job with `entropy-monitor run`"
    if scope:
        return f"kernel.yama.ptrace_scope {scope}: {_REMEDIES}"
    if seccomp_filtered():
        return f"a container's seccomp filter: {_CONTAINER}"
    return f"a process that protects itself (set-uid, or not dumpable): {_REMEDIES}"
