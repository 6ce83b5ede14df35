"""Sending a request to a training process, by whichever way in is open."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

from entropy_monitor.errors import AttachError, NoSuchProcessError
from entropy_monitor.injection.gdb_route import gdb_unfit, queue_by_gdb
from entropy_monitor.injection.interpreter import is_python, named_version, read_interpreter
from entropy_monitor.injection.mailbox import Mailbox
from entropy_monitor.injection.process import ZOMBIE, read_process, where_blocked
from entropy_monitor.injection.ptrace_route import ptrace_unfit, queue_by_ptrace, wake
from entropy_monitor.injection.remote_exec_route import queue_by_remote_exec, remote_exec_unfit
from entropy_monitor.injection.rights import check_state, refuse
from entropy_monitor.injection.socket_route import ask_socket, listens
from entropy_monitor.injection.stub import package_paths, stub

if TYPE_CHECKING:
    from collections.abc import Callable

    from entropy_monitor.injection.interpreter import Interpreter
    from entropy_monitor.injection.process import Process
    from entropy_monitor.injection.protocol import Reply, Request

Method = Literal["auto", "socket", "remote-exec", "ptrace", "gdb"]
METHODS: tuple[str, ...] = get_args(Method)
GRACE_S = 5.0
"""Longer than the target has for its answer, so that its own words on a timeout are the ones that are shown."""
_POLL_S = 0.01
_LOOK_S, _LOOK_AT_MOST_S = 0.25, 4.0
"""When an unanswered request makes us look after the target: soon, and then ever more rarely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The way that a request to one process takes."""

    process: Process
    method: Method
    interpreter: Interpreter | None
    """None for the socket, which needs to know nothing."""
    stopped_s: float | None = None
    """How long the process stood still, where that was measured."""


def choose_route(pid: int, method: Method = "auto") -> Route:
    """Find the way into a process, touching nothing.

    Args:
        pid: the process.
        method: a way, or ``auto`` for the first that is open: socket, remote-exec, ptrace, gdb.

    Returns:
        The way.

    Raises:
        NoSuchProcessError: there is no such process.
        AttachError: no way is open; the message has the remedy.
    """
    process = read_process(pid)
    if process.state in ZOMBIE:
        check_state(process)
    if method == "socket" or (method == "auto" and listens(process)):
        if not listens(process):
            raise AttachError(
                f"expected process {pid} to listen; found no socket of it: start it with `entropy-monitor run`, or use "
                "another --method"
            )
        return Route(process=process, method="socket", interpreter=None)
    check_state(process)
    try:
        interpreter = read_interpreter(pid)
    except PermissionError:
        refuse(process)
    reasons = {
        "remote-exec": remote_exec_unfit(process, interpreter),
        "ptrace": ptrace_unfit(process, interpreter),
        "gdb": gdb_unfit(interpreter),
    }
    wanted: tuple[Method, ...] = ("remote-exec", "ptrace", "gdb") if method == "auto" else (method,)
    for name in wanted:
        if reasons[name] is None:
            return Route(process=process, method=name, interpreter=interpreter)
    found = "; ".join(f"{name}: {reasons[name]}" for name in wanted)
    raise AttachError(f"expected a way into process {pid}; found {found}: start the job with `entropy-monitor run`")


def describe_python(pid: int) -> str:
    """Name a process's Python as well as rights allow.

    Returns:
        A few words.
    """
    version = named_version(pid)
    if version is not None:
        return f"Python {version[0]}.{version[1]}"
    return "Python of an unknown version" if is_python(pid) else "no Python that we may see"


def send(route: Route, request: Request, wait_s: float, cancel: threading.Event | None = None) -> tuple[Reply, Route]:
    """Send a request and wait for the answer.

    Args:
        route: from `choose_route`.
        request: what is asked.
        wait_s: how long the process may take.
        cancel: set it to give up early; a request that has not begun then never does.

    Returns:
        The answer, and the route with what was measured on it.

    Raises:
        AttachError: the process could not be entered, or did not answer.
    """
    process, interpreter, cancel = route.process, route.interpreter, cancel or threading.Event()
    if interpreter is None:
        return ask_socket(process, request, wait_s + GRACE_S, cancel), route
    with Mailbox(process) as mailbox:
        mapped = route.method != "remote-exec"
        code = stub(request, mailbox.path, package_paths(interpreter.minor), mapped=mapped)
        stopped_s = None
        match route.method:
            case "ptrace":
                stopped_s = queue_by_ptrace(process, interpreter, code).stopped_s
            case "gdb":
                queue_by_gdb(process, interpreter, code)
            case _:
                queue_by_remote_exec(process, interpreter, mailbox.put("request.py", code))
        look = partial(wake, process, interpreter) if route.method == "ptrace" else None
        reply = _await(mailbox, process, wait_s, cancel, look)
    return reply, Route(process=process, method=route.method, interpreter=interpreter, stopped_s=stopped_s)


def _await(
    mailbox: Mailbox, process: Process, wait_s: float, cancel: threading.Event, wake: Callable[[float], None] | None
) -> Reply:
    started = now = time.monotonic()
    deadline, look, pause = now + wait_s + GRACE_S, now + _LOOK_S, _LOOK_S
    while (reply := mailbox.reply()) is None:
        now = time.monotonic()
        if now >= look:
            pause *= 2
            look = now + min(pause, _LOOK_AT_MOST_S)
            if wake is not None:
                wake(now - started)
            if read_process(process.pid).state in ZOMBIE:
                raise NoSuchProcessError(
                    f"expected an answer of process {process.pid}; found that it has ended: see its own output"
                )
        if now >= deadline:
            raise AttachError(
                f"expected an answer of process {process.pid} within {wait_s:.0f} s; found none, "
                f"{where_blocked(process.pid)}: the request is withdrawn; give a longer --wait-s"
            )
        if cancel.wait(_POLL_S):
            raise AttachError(f"expected an answer of process {process.pid}; found that it was given up: send it again")
    return reply
