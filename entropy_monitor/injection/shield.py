"""The process that holds a target still.

It is apart from the one that the user sees, so that Ctrl-C, SIGTERM, SIGHUP or the death of that one cannot reach it.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from entropy_monitor.injection.borrow import Borrowed, BorrowError
from entropy_monitor.injection.frame import kernel_layout
from entropy_monitor.injection.memory import Memory
from entropy_monitor.injection.ptrace import Tracee

ADDRESS_MARK, SIZE_MARK = "0xfedcba9876543210", "0xfedcba9876543211"
"""Stand in the code for the address at which it comes to lie, and the size of its mapping."""
_MMAP = 9
_READ_WRITE, _PRIVATE_ANONYMOUS = 3, 0x22
_PAGE = 4096
_ATTEMPTS = 3
_RUNNER = "import sys; sys.path.insert(0, sys.argv[1]); from entropy_monitor.injection.shield import main; main()"
_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do to a target."""

    pid: int
    mmap: int
    add_pending_call: int
    run_simple_string: int
    sigreturn: int
    code: str
    """Empty: queue nothing, only wake the main thread out of a wait for a lock, so that it looks for queued calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was done."""

    reason: str = ""
    """Empty if the code is queued in the target; else one word, see `entropy_monitor.injection.borrow`."""
    detail: str = ""
    stopped_s: float = 0.0
    """How long the target's main thread stood still."""


def inject(plan: Plan) -> Outcome:
    """Queue code in a target, from a shield process.

    Args:
        plan: what to do.

    Returns:
        What was done.
    """
    root = str(Path(__file__).resolve().parents[2])
    shield = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _RUNNER, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
    )
    try:
        out, err = shield.communicate(json.dumps(asdict(plan)).encode(), _LIMIT_S)
    except subprocess.TimeoutExpired:
        shield.kill()  # whatever the target is doing, it comes back by itself
        shield.communicate()
        return Outcome(reason="unresponsive")
    if shield.returncode:
        last = err.decode(errors="replace").strip().splitlines()[-1:]
        return Outcome(reason="shield", detail=last[0] if last else f"exit code {shield.returncode}")
    return Outcome(**json.loads(out))


def main() -> None:
    """Read a plan from standard input, carry it out, and write the outcome."""
    layout = kernel_layout()
    # What cannot be blocked, SIGKILL, is what the frame is for.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    plan = Plan(**json.loads(sys.stdin.buffer.read()))
    gc.disable()
    outcome = Outcome()
    for _ in range(_ATTEMPTS):
        with Memory(plan.pid, write=True) as memory:
            outcome = _attempt(plan, Borrowed(Tracee(plan.pid), memory, plan.sigreturn, layout))
        if outcome.reason != "busy":
            break
        time.sleep(0.05)
    try:
        sys.stdout.write(json.dumps(asdict(outcome)))
        sys.stdout.flush()
    except BrokenPipeError:  # the one that asked has died
        os._exit(0)


def _attempt(plan: Plan, borrowed: Borrowed) -> Outcome:
    started = time.perf_counter()
    try:
        borrowed.begin()
        if plan.code:
            _queue(plan, borrowed)
        else:
            borrowed.wake()
        borrowed.end()
    except BorrowError as error:
        return Outcome(reason=error.reason, detail=error.detail, stopped_s=time.perf_counter() - started)
    except ProcessLookupError:
        return Outcome(reason="ended")
    except PermissionError as error:
        return Outcome(reason="permission", detail=str(error))
    return Outcome(stopped_s=time.perf_counter() - started)


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
