"""``entropy-monitor demo``: trainer, watcher and dashboard on real text, as three processes."""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from entropy_monitor.cli.progress import DemoProgress, summary_lines
from entropy_monitor.cli.supervisor import Children, interruptible
from entropy_monitor.errors import ConfigError, EntropyMonitorError
from entropy_monitor.store import open_run

if TYPE_CHECKING:
    import subprocess
    import threading

_REFRESH_S = 0.5


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 600,
    run: Annotated[Path | None, typer.Option(help="Run directory; runs/demo-TIME by default.")] = None,
    no_dashboard: Annotated[bool, typer.Option("--no-dashboard", help="Without the browser part.")] = False,
    port: Annotated[int, typer.Option(help="Port of the dashboard.")] = 8501,
    seed: Annotated[int, typer.Option(help="Seed of model and batches.")] = 0,
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file; may be repeated. Default: Python's own sources.")
    ] = None,
) -> None:
    """Train a small GPT on real text, watch its phases, and let the controller switch them."""
    from entropy_monitor.demo.settings import DemoSettings
    from entropy_monitor.demo.text import check_files

    check_files(text or [])
    if not no_dashboard:
        _check_port(port)
    console = Console()
    directory = (run or Path(time.strftime("runs/demo-%Y%m%d-%H%M%S"))).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "demo.toml"
    config.write_text(DemoSettings.for_steps(steps).to_toml(), encoding="utf-8")
    token = os.environ.get("ENTROPY_MONITOR_OPERATOR_TOKEN") or secrets.token_urlsafe(12)
    environment = {
        **os.environ,
        "ENTROPY_MONITOR_OPERATOR_TOKEN": token,
        "ENTROPY_MONITOR_KEY": os.environ.get("ENTROPY_MONITOR_KEY") or secrets.token_hex(16),
    }
    files = [argument for path in text or [] for argument in ("--text", str(path))]
    trainer_arguments = ["--run", str(directory), "--steps", str(steps), "--seed", str(seed), "--steer", *files]
    console.print(f"run        {directory}", soft_wrap=True)
    with interruptible() as stop, Children(directory / "logs", environment) as children:
        trainer = children.start("trainer", "entropy_monitor.demo.train", trainer_arguments)
        watcher = children.start(
            "watcher", "entropy_monitor", ["watch", str(directory), "--control", "auto", "--config", str(config)]
        )
        if not no_dashboard:
            children.start("dashboard", "entropy_monitor", ["dashboard", str(directory), "--port", str(port)])
            console.print(f"dashboard  http://127.0.0.1:{port}  operator token  {token}")
        _follow(directory, steps, console, stop, (trainer, watcher))
        _check(children, stop, trainer=trainer, watcher=watcher)
        for line in summary_lines(open_run(directory)):
            console.print(line, soft_wrap=True)
        if not no_dashboard and not stop.is_set():
            console.print("training has ended; the dashboard stays until Ctrl-C")
            while not stop.wait(_REFRESH_S):  # with a limit: the signal may have come to another thread
                pass


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: one just closed is free
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"expected a free port; {port} is not ({error}): name another with --port") from error


def _follow(
    directory: Path,
    steps: int,
    console: Console,
    stop: threading.Event,
    processes: tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]],
) -> None:
    """Show progress until both processes have ended, one has failed, or the user has had enough."""
    with DemoProgress(directory, steps, console) as progress:
        while not stop.is_set():
            codes = [process.poll() for process in processes]
            if any(codes) or None not in codes:
                break
            progress.refresh()
            stop.wait(_REFRESH_S)
        progress.refresh()


def _check(
    children: Children, stop: threading.Event, *, trainer: subprocess.Popen[bytes], watcher: subprocess.Popen[bytes]
) -> None:
    if stop.is_set():
        raise typer.Exit(0)
    for name, process in (("trainer", trainer), ("watcher", watcher)):
        if process.returncode:
            raise EntropyMonitorError(f"the {name} ended with code {process.returncode}: {children.last_words(name)}")
