"""The way that CPython itself offers since 3.14: ``sys.remote_exec``, called by the target's own interpreter."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_monitor.errors import AttachError
from entropy_monitor.injection.rights import check_state, refuse

if TYPE_CHECKING:
    from entropy_monitor.injection.interpreter import Interpreter
    from entropy_monitor.injection.process import Process

_SINCE = (3, 14)
_LIMIT_S = 30.0
_CALL = "import sys; sys.remote_exec(int(sys.argv[1]), sys.argv[2])"


def remote_exec_unfit(process: Process, interpreter: Interpreter) -> str | None:
    """Why ``sys.remote_exec`` cannot be used, whatever the rights.

    Returns:
        The reason, or None.
    """
    if interpreter.minor < _SINCE:
        return f"sys.remote_exec needs CPython 3.14, and it runs {'.'.join(map(str, interpreter.version))}"
    if _namespace(process.pid) != _namespace(os.getpid()):
        return "its interpreter lies in another container"
    return None


def _namespace(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/mnt").readlink())


def queue_by_remote_exec(process: Process, interpreter: Interpreter, script: str) -> None:
    """Make a process run a file at the next bytecode boundary of its main thread.

    Args:
        process: the process.
        interpreter: its CPython.
        script: path of Python source that the process may read.

    Raises:
        AttachError: it could not be entered.
    """
    if unfit := remote_exec_unfit(process, interpreter):
        raise AttachError(f"expected a process for sys.remote_exec; found that {unfit}: use another --method")
    check_state(process)
    # Root must not run a program that belongs to somebody else as root.
    other = os.geteuid() != process.uid
    try:
        ended = subprocess.run(
            [Path(f"/proc/{process.pid}/exe").readlink(), "-I", "-S", "-c", _CALL, str(process.pid), script],
            user=process.uid if other else None,
            group=process.gid if other else None,
            extra_groups=[] if other else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_LIMIT_S,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise AttachError(
            f"expected sys.remote_exec to return within {_LIMIT_S:.0f} s; found it hanging: use --method ptrace"
        ) from None
    if ended.returncode == 0:
        return
    last = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
    if last and last[0].startswith("PermissionError"):
        refuse(process)
    raise AttachError(
        f"expected sys.remote_exec to succeed; found {last[0] if last else ended.returncode}: use --method ptrace"
    )
