"""``entropy-monitor status``: the state of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entropy_monitor.store import open_run, read_status

if TYPE_CHECKING:
    from entropy_monitor.store import RunStatus


def status(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Show heartbeat, step, regime, phase, lag, drops and faults of a run."""
    found = read_status(open_run(run))
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _lines(found):
        table.add_row(f"[bold]{name}[/]", value)
    Console().print(table)


def _lines(found: RunStatus) -> list[tuple[str, str]]:
    lag = found.watcher_lag_s
    unmeasured = f", {found.frames_removed_unmeasured} removed unmeasured" if found.frames_removed_unmeasured else ""
    return [
        ("run", found.run_id),
        ("trainer", f"{found.state}, attempt {found.attempt}, heartbeat {_seconds(found.heartbeat_age_s)} ago"),
        ("step", f"{_text(found.step)}, last step {_seconds(found.last_step_age_s)} ago"),
        ("ranks", _ranks(found)),
        (
            "phase",
            f"{_text(found.phase)}, weight {_text(found.weight)}, {'steered' if found.steer else 'observe-only'}",
        ),
        ("regime", found.regime),
        ("stage", found.stage),
        ("early stopping", found.early_stopping["advice"]),
        ("frames", f"{found.frames_committed} committed, {found.frames_dropped} dropped{unmeasured}"),
        ("watcher", f"{found.watcher_state}, control {found.control}, measured to {_text(found.last_measured_step)}"),
        ("lag", f"p50 {_seconds(lag['p50'])}, p95 {_seconds(lag['p95'])} from commit to metrics"),
        ("commands pending", str(found.commands_pending)),
        ("overhead", found.overhead_words),
        ("faults", ", ".join(f"{count} x {kind}" for kind, count in found.faults.items()) or "none"),
    ]


def _ranks(found: RunStatus) -> str:
    missing = f"; silent: {', '.join(map(str, found.missing_ranks))}" if found.missing_ranks else ""
    return (", ".join(map(str, found.ranks)) or "none") + missing


def _text(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f} s"
