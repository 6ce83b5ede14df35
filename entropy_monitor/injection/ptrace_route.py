"""The built-in way into a process that does not listen: x86-64 Linux, CPython 3.11 or newer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from entropy_monitor.errors import AttachError, NoSuchProcessError
from entropy_monitor.injection.frame import FUTEX
from entropy_monitor.injection.plan import Outcome, Plan
from entropy_monitor.injection.process import blocking_call
from entropy_monitor.injection.rights import check_state, refuse

if TYPE_CHECKING:
    from entropy_monitor.injection.interpreter import Interpreter
    from entropy_monitor.injection.process import Process


_RUNNER = "import sys; sys.path.insert(0, sys.argv[1]); from entropy_monitor.injection.shield import main; main()"
_LIMIT_S = 60.0
_LOST_AFTER_S = 1.5


def ptrace_unfit(process: Process, interpreter: Interpreter) -> str | None:
    """Why the built-in way cannot be gone, whatever the rights.

    Returns:
        The reason, or None.
    """
    if os.uname().machine != "x86_64":
        return f"the built-in way is for x86-64, this is {os.uname().machine}"
    if process.shadow_stack:
        return "the process has a shadow stack"
    if interpreter.mmap is None or interpreter.sigreturn is None:
        return "no C library that we know is mapped"
    return None


def queue_by_ptrace(process: Process, interpreter: Interpreter, code: str) -> Outcome:
    """Make a process run code at the next bytecode boundary of its main thread.

    Args:
        process: the process.
        interpreter: its CPython.
        code: Python source, with the marks for its address and size.

    Returns:
        How long it stood still.

    Raises:
        AttachError: it could not be entered; it goes on as if nothing had been.
    """
    if unfit := ptrace_unfit(process, interpreter):
        raise AttachError(f"expected a process that ptrace can enter; found that {unfit}: use --method gdb")
    check_state(process)
    outcome = _inject(_plan(process, interpreter, code))
    if outcome.reason:
        _refuse(process, outcome)
    return outcome


def wake(process: Process, interpreter: Interpreter, waited_s: float) -> None:
    """Have the main thread of a process look once more whether a call is queued.

    If it waits for a lock, it is woken for that. If it does not, and a long time has gone by, the note that a call is
    queued may have been lost: up to CPython 3.12 it is not written in one step, and we may have been in the middle.

    Args:
        process: the process.
        interpreter: its CPython.
        waited_s: how long the queued call has not been made.
    """
    if blocking_call(process.pid) == FUTEX or waited_s > _LOST_AFTER_S:
        _inject(_plan(process, interpreter, ""))  # a refusal changes nothing: the call stays queued


def _plan(process: Process, interpreter: Interpreter, code: str) -> Plan:
    return Plan(
        pid=process.pid,
        mmap=interpreter.mmap or 0,
        add_pending_call=interpreter.add_pending_call,
        run_simple_string=interpreter.run_simple_string,
        sigreturn=interpreter.sigreturn or 0,
        code=code,
        check_signals=interpreter.check_signals,
    )


def _inject(plan: Plan) -> Outcome:
    """Carry out a plan, in a shield process."""
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


def _refuse(process: Process, outcome: Outcome) -> NoReturn:
    pid = process.pid
    match outcome.reason:
        case "permission":
            refuse(process)
        case "ended":
            raise NoSuchProcessError(f"expected a running process; found that {pid} has ended: start the job again")
        case "stopped":
            raise AttachError(
                f"expected process {pid} running; found it stopped, and it stays so: kill -CONT {pid} first"
            )
        case "unresponsive":
            raise AttachError(
                f"expected the main thread of process {pid} to stop within 5 s; found it in an uninterruptible wait "
                "(disk or driver): try again later"
            )
        case "busy":
            raise AttachError(
                f"expected process {pid} to take a call; found its interpreter busy with another: try again"
            )
        case _:
            found = f"{outcome.reason} {outcome.detail}".strip()
            raise AttachError(f"expected to enter process {pid}; found {found}: it goes on unharmed; use --method gdb")
