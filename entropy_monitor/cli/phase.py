"""``entropy-monitor phase``: switch a run's phase and wait until the trainer has answered."""

from __future__ import annotations

import getpass
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from entropy_monitor.errors import ConfigError
from entropy_monitor.store import CommandRequest, issue_command, open_run, read_acknowledgement, read_status
from entropy_monitor.store.commands import DEFAULT_EXPIRY_S

if TYPE_CHECKING:
    from entropy_monitor.store import Run
    from entropy_monitor.types import Acknowledgement, Command

_POLL_S = 0.05


def phase(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    phase: Annotated[Literal["memorize", "compress", "auto"], typer.Argument(help="auto frees the controller again.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit log.")],
    weight: Annotated[float | None, typer.Option(help="Weight of the entropy in the loss.")] = None,
    expires_s: Annotated[
        float, typer.Option(help="Seconds after which the command is not delivered.")
    ] = DEFAULT_EXPIRY_S,
    wait_s: Annotated[float, typer.Option(help="Seconds to wait for every rank's answer.")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Command a phase, and report each rank's answer."""
    if not 0 <= wait_s < float("inf"):
        raise ConfigError(f"expected --wait-s >= 0; found {wait_s}: give a number of seconds")
    opened = open_run(run)
    try:
        request = CommandRequest(
            phase=phase, reason=reason, issued_by=f"cli:{_user()}", weight=weight, expires_after_s=expires_s
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    command = issue_command(opened.objects, opened.run_id, request, key=os.environ.get("ENTROPY_MONITOR_KEY"))
    acks, why = _wait(opened, command, wait_s)
    if as_json:
        typer.echo(json.dumps({"command": asdict(command), "acknowledgements": [asdict(ack) for ack in acks]}))
    else:
        for ack in acks:
            typer.echo(f"rank {ack.rank}: {ack.status} at step {ack.step} ({ack.detail})")
    if why is not None:
        typer.echo(f"error: command {command.command_id} is unacknowledged: {why}", err=True)
    if why is not None or any(ack.status != "applied" for ack in acks):
        raise typer.Exit(1)


def _wait(run: Run, command: Command, wait_s: float) -> tuple[list[Acknowledgement], str | None]:
    """Wait for the answer of every rank of the newest attempt.

    Returns:
        The answers, and why not all have come, or None.
    """
    deadline = time.monotonic() + wait_s
    while True:
        found = read_status(run)  # first: a trainer that has ended since then has answered before
        answers = [read_acknowledgement(run.objects, int(command.command_id), rank) for rank in found.ranks]
        acks = [ack for ack in answers if ack is not None]
        if found.ranks and len(acks) == len(found.ranks):
            return acks, None
        if found.state == "ended":
            return acks, "the run has ended: start the trainer again within the command's expiry"
        if time.monotonic() >= deadline:
            return (
                acks,
                f"the trainer ({found.state}) did not answer within {wait_s:.0f} s; it still may until it expires",
            )
        time.sleep(_POLL_S)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
