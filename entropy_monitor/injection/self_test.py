"""Whether this machine lets us trace a process at all: tried on a child."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time

from entropy_monitor.injection.ptrace import Kind, Tracee

_PATIENCE_S = 5.0


def trace_a_child() -> str | None:
    """Start a child, stop it by ptrace, read its registers and let it go.

    Returns:
        None if all went well, else what did not, in a few words.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"built in for x86-64 Linux, this is {platform.machine()} {platform.system()}"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            return _trace(Tracee(child.pid))
        except OSError as error:
            return error.strerror or str(error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.kill(child.pid, signal.SIGKILL)


def _trace(tracee: Tracee) -> str | None:
    tracee.seize()
    tracee.interrupt()
    stop = tracee.wait(time.monotonic() + _PATIENCE_S)
    if stop is None or stop.kind is not Kind.TRAP:
        return "it did not stop"
    tracee.registers()
    tracee.detach()
    return None
