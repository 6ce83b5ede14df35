"""The process that holds a target still.

It is apart from the one that the user sees, so that Ctrl-C, SIGTERM, SIGHUP or the death of that one cannot reach it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from entropy_monitor.injection.borrow import Borrowed, BorrowError
from entropy_monitor.injection.frame import kernel_layout
from entropy_monitor.injection.memory import Memory
from entropy_monitor.injection.plan import ADDRESS_MARK, SIZE_MARK, Outcome, Plan
from entropy_monitor.injection.ptrace import Tracee

if TYPE_CHECKING:
    from entropy_monitor.injection.frame import Layout

_MMAP = 9
_READ_WRITE, _PRIVATE_ANONYMOUS = 3, 0x22
_PAGE = 4096
_ATTEMPTS = 3


def main() -> None:
    """Read a plan from standard input, carry it out, and write the outcome."""
    layout = kernel_layout()
    # What cannot be blocked, SIGKILL, is what the frame is for.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    plan = Plan(**json.loads(sys.stdin.buffer.read()))
    gc.disable()
    with contextlib.suppress(OSError):  # where we may, we go before others: the target waits for us
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    outcome = Outcome()
    for _ in range(_ATTEMPTS):
        outcome = _attempt(plan, layout)
        if outcome.reason != "busy":
            break
        time.sleep(0.05)
    try:
        sys.stdout.write(json.dumps(asdict(outcome)))
        sys.stdout.flush()
    except BrokenPipeError:  # the one that asked has died
        os._exit(0)


def _attempt(plan: Plan, layout: Layout) -> Outcome:
    started = time.perf_counter()
    try:
        with Memory(plan.pid, write=True) as memory:
            borrowed = Borrowed(Tracee(plan.pid), memory, plan.sigreturn, layout)
            started = time.perf_counter()
            borrowed.begin()
            if plan.code:
                _queue(plan, borrowed)
            elif not borrowed.wake():
                borrowed.call(plan.add_pending_call, plan.check_signals, 0)
            borrowed.end()
            stopped_s = time.perf_counter() - started
    except BorrowError as error:
        return Outcome(reason=error.reason, detail=error.detail, stopped_s=time.perf_counter() - started)
    except (ProcessLookupError, FileNotFoundError):
        return Outcome(reason="ended")
    except PermissionError as error:
        return Outcome(reason="permission", detail=str(error))
    return Outcome(stopped_s=stopped_s)


def _queue(plan: Plan, borrowed: Borrowed) -> None:
    size = (len(plan.code) + _PAGE) // _PAGE * _PAGE
    borrowed.call(plan.mmap, 0, size, _READ_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
    address = borrowed.results.get(_MMAP, -1)
    if not 0 < address < 1 << 47:
        borrowed.end()
        raise BorrowError("no memory")
    code = plan.code.replace(ADDRESS_MARK, f"{address:#018x}").replace(SIZE_MARK, f"{size:#018x}")
    borrowed.memory.write(address, code.encode("ascii"))
    borrowed.call(plan.add_pending_call, plan.run_simple_string, address)
