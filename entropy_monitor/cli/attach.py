"""``entropy-monitor attach`` and ``detach``: hooks into, and out of, a running training process."""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from entropy_monitor.errors import AttachError, ConfigError, NoSuchProcessError
from entropy_monitor.injection.ranks import Rank, find_ranks
from entropy_monitor.injection.send import METHODS, Method, choose_route, describe_python, send

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from entropy_monitor.injection.protocol import Reply, Request
    from entropy_monitor.injection.send import Route

_EXIT_NO_PROCESS = 3

Pid = Annotated[int, typer.Argument(help="Process id of the training process.", min=1)]
AllRanks = Annotated[bool, typer.Option("--all-ranks", help="Every rank of its job on this machine.")]
Way = Annotated[str, typer.Option("--method", help=f"Way in: {', '.join(METHODS)}.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and touch nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for every rank's answer.")]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came of the request to one rank."""

    rank: Rank
    route: Route | None = None
    reply: Reply | None = None
    error: AttachError | None = None

    @property
    def name(self) -> str:
        given = self.rank.rank if self.rank.rank is not None else (self.reply or {}).get("rank")
        return f"pid {self.rank.pid}" if given is None else f"rank {given} (pid {self.rank.pid})"

    @property
    def ok(self) -> bool:
        return self.error is None and (self.reply is None or self.reply["ok"])

    @property
    def message(self) -> str:
        if self.error is not None:
            return str(self.error)
        return self.reply["message"] if self.reply is not None else _intention(self.route)

    def as_dict(self) -> dict[str, Any]:
        said: dict[str, Any] = {"rank": self.rank.rank, "ok": self.ok, "message": self.message}
        if self.route is not None:
            said["method"] = self.route.method
            said["python"] = _version(self.route)
            said["stopped_ms"] = None if self.route.stopped_s is None else round(self.route.stopped_s * 1e3, 3)
        return {**said, **(self.reply or {}), "pid": self.rank.pid}


def attach(
    pid: Pid,
    run: Annotated[str, typer.Option(help="Run directory, as the training process sees it.")],
    all_ranks: AllRanks = False,
    method: Way = "auto",
    dry_run: Dry = False,
    every: Annotated[int | None, typer.Option(help="Sample every N-th step.", min=1)] = None,
    steer: Annotated[bool, typer.Option("--steer", help="Allow commands to change training.")] = False,
    wait_s: Wait = 60.0,
    as_json: Json = False,
) -> None:
    """Put hooks into a running training process. It observes; only --steer lets commands change training."""
    options: dict[str, Any] = {"steer": steer} | ({} if every is None else {"every": every})
    request: Request = {"verb": "attach", "run": _absolute(run), "options": options, "wait_s": _checked(wait_s)}
    _carry_out(
        pid, request, all_ranks=all_ranks, method=_method(method), dry_run=dry_run, as_json=as_json, wait_s=wait_s
    )


def detach(
    pid: Pid,
    all_ranks: AllRanks = False,
    method: Way = "auto",
    dry_run: Dry = False,
    wait_s: Wait = 60.0,
    as_json: Json = False,
) -> None:
    """Remove our hooks from a running training process; what it has learnt stays as it is."""
    request: Request = {"verb": "detach", "wait_s": _checked(wait_s)}
    _carry_out(
        pid, request, all_ranks=all_ranks, method=_method(method), dry_run=dry_run, as_json=as_json, wait_s=wait_s
    )


def _carry_out(
    pid: int, request: Request, *, all_ranks: bool, method: Method, dry_run: bool, as_json: bool, wait_s: float
) -> None:
    ranks = find_ranks(pid) if all_ranks else [Rank(pid, None)]
    others = [] if all_ranks or not dry_run else [rank for rank in find_ranks(pid) if rank.pid != pid]
    answers = [_plan(rank, method) for rank in ranks] if dry_run else _ask_all(ranks, request, method, wait_s)
    if as_json:
        ok = all(answer.ok for answer in answers)
        found = {"ranks": [answer.as_dict() for answer in answers], "other_ranks": [rank.pid for rank in others]}
        typer.echo(json.dumps({"ok": ok, "dry_run": dry_run, **found}))
    else:
        for answer in answers:
            _say(answer, alone=len(answers) == 1)
        if others:
            typer.echo(f"other ranks of its job here: {', '.join(str(rank.pid) for rank in others)} (add --all-ranks)")
    if not all(answer.ok for answer in answers):
        gone = all(isinstance(answer.error, NoSuchProcessError) for answer in answers)
        raise typer.Exit(_EXIT_NO_PROCESS if gone else 1)


def _say(answer: _Answer, *, alone: bool) -> None:
    if answer.ok:
        typer.echo(f"{answer.name}: {answer.message}")
    elif alone:
        typer.echo(f"error: {answer.message}", err=True)
    else:
        typer.echo(f"error: {answer.name}: {answer.message}", err=True)


def _plan(rank: Rank, method: Method) -> _Answer:
    try:
        return _Answer(rank, choose_route(rank.pid, method))
    except AttachError as error:
        return _Answer(rank, error=error)


def _ask_all(ranks: Sequence[Rank], request: Request, method: Method, wait_s: float) -> list[_Answer]:
    """Ask all ranks at once: each may wait for the others, as when they agree on an attempt."""
    cancel = threading.Event()

    def ask(planned: _Answer) -> _Answer:
        if planned.route is None:
            return planned
        try:
            reply, route = send(planned.route, request, wait_s, cancel)
        except AttachError as error:
            return _Answer(planned.rank, planned.route, error=error)
        return _Answer(planned.rank, route, reply)

    # A rank that cannot be entered is known before any is: the others would wait for it in vain.
    planned = [_plan(rank, method) for rank in ranks]
    if not all(answer.ok for answer in planned):
        return [answer if not answer.ok else _left_out(answer) for answer in planned]
    with ThreadPoolExecutor(len(planned)) as pool, _ended_like_ctrl_c():
        waiting = [pool.submit(ask, answer) for answer in planned]
        try:
            return [one.result() for one in waiting]
        finally:
            cancel.set()


@contextmanager
def _ended_like_ctrl_c() -> Generator[None]:
    """SIGTERM and SIGHUP as well let us clean up behind us."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _left_out(answer: _Answer) -> _Answer:
    error = AttachError(
        f"expected every rank to be within reach; found one that is not: process {answer.rank.pid} was left alone"
    )
    return _Answer(answer.rank, answer.route, error=error)


def _intention(route: Route | None) -> str:
    if route is None:
        return "nothing"
    python = f"Python {_version(route)}" if route.interpreter else describe_python(route.process.pid)
    return f"would enter by {route.method}, {python}, uid {route.process.uid}, with sufficient rights"


def _version(route: Route) -> str | None:
    return ".".join(map(str, route.interpreter.version)) if route.interpreter else None


def _method(method: str) -> Method:
    if method not in METHODS:
        raise ConfigError(f"expected --method {', '.join(METHODS)}; found {method!r}: choose one")
    return cast("Method", method)


def _absolute(run: str) -> str:
    """The training process may have another working directory."""
    return run if "://" in run else str(Path.cwd() / run)


def _checked(wait_s: float) -> float:
    if not 0 < wait_s < float("inf"):
        raise ConfigError(f"expected --wait-s > 0; found {wait_s}: give a number of seconds")
    return wait_s
