"""One command in the foreground, as if this process were the command: signals, terminal and exit code are its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""Exit codes of a command that could not be started, as shells give them."""
_PASSED_ON = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGTSTP,
    signal.SIGCONT,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
_FROM_KERNEL = 0x80
"""``si_code`` of a signal that the terminal gave to the whole foreground group: the command has had it, too."""
_PR_SET_PDEATHSIG = 1


def run_in_foreground(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command until it ends.

    Args:
        command: program and arguments; inherits stdin, stdout, stderr and the process group.
        environment: its environment.

    Returns:
        Its exit code; 128 + n when signal n ended it; 126 or 127 when it could not be started.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
    die_with_parent = _die_with_parent()

    def prepare_child() -> None:
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        try:
            process = subprocess.Popen(command, env=environment, preexec_fn=prepare_child)
        except OSError as error:
            found = isinstance(error, FileNotFoundError)
            print(f"error: expected a command; {command[0]!r}: {error.strerror}: check its name", file=sys.stderr)
            return NOT_FOUND if found else NOT_EXECUTABLE
        process.returncode = code = _follow(process.pid)
        return code if code >= 0 else 128 - code
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(pid: int) -> int:
    """Pass signals on until the process has ended.

    Returns:
        Its exit code, or minus the signal that ended it.
    """
    while True:
        arrived = signal.sigwaitinfo(_PASSED_ON | {signal.SIGCHLD})
        if arrived.si_signo != signal.SIGCHLD:
            if arrived.si_code != _FROM_KERNEL:
                os.kill(pid, arrived.si_signo)
            continue
        changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if not changed:
            continue
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        os.kill(os.getpid(), signal.SIGSTOP)  # the shell is to see the job stopped; its SIGCONT is passed on


def _die_with_parent() -> Any:
    """SIGKILL cannot be passed on: Linux is asked to kill the command when this process dies.

    Returns:
        What the child calls before it becomes the command.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return (lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)) if prctl is not None else lambda: None
