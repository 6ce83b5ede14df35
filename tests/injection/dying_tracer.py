"""A shield that is killed in the middle: ``dying_tracer.py operation N`` before its N-th step, ``time MICROSECONDS``
at any moment after it has seized the target. It reads a plan as the shield does.

Exits 0 if it came to the end alive.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from entropy_monitor.injection import memory, ptrace, shield

how, number = sys.argv[1], int(sys.argv[2])
steps = 0


def counted(function):
    def call(*arguments):
        global steps
        steps += 1
        if steps == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return call


def timed(function):
    def call(*arguments):
        # A timer's signal kills at once, inside of a system call or out of it; the shield has blocked it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.setitimer(signal.ITIMER_REAL, number / 1e6)
        return function(*arguments)

    return call


if how == "operation":
    ptrace.Tracee._ptrace = counted(ptrace.Tracee._ptrace)
    memory.Memory.write = counted(memory.Memory.write)
else:
    ptrace.Tracee.seize = timed(ptrace.Tracee.seize)
shield.main()
