"""``entropy-monitor watch``: the daemon."""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from entropy_monitor.cli.supervisor import interruptible
from entropy_monitor.config import load_config
from entropy_monitor.errors import CorruptFrameError, NotARunError, RunNotFoundError, WatcherRunningError
from entropy_monitor.store import FrameReader, list_ranks, open_run, read_cursor

if TYPE_CHECKING:
    import threading

    from entropy_monitor.config import MonitorConfig
    from entropy_monitor.store import Run

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.25


def watch(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; a run that does not exist yet is waited for.")],
    control: Annotated[
        Literal["off", "advise", "auto"] | None,
        typer.Option(help="What the GAPT controller may do: nothing, say what it would do, or switch phases."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Measure what is committed now, and leave.")] = False,
    config: Annotated[Path | None, typer.Option(help="Configuration; ./monitor.toml if there is one.")] = None,
) -> None:
    """Measure runs as they train; a restart continues where it stood, and measures no frame twice."""
    loaded = load_config(watch={"control": control}, path=config)
    with interruptible() as stop_event, ThreadPoolExecutor(len(runs), "watch") as pool:
        pending = {pool.submit(_watch_one, run, stop_event, loaded, once=once) for run in runs}
        # Woken now and then: the system may give a signal to another thread, and only this one runs the handler.
        while pending:
            done, pending = wait(pending, timeout=_LOOK_AGAIN_S, return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                stop_event.set()
            for future in done:
                future.result()


def _watch_one(path: Path, stop_event: threading.Event, config: MonitorConfig, *, once: bool) -> None:
    run = _wait_for_run(path, stop_event, once=once)
    if run is None:
        return
    import torch

    from entropy_monitor.watcher import watch as watch_run

    # Beside a busy trainer a second thread costs more in waiting than it computes (docs/decisions.md).
    torch.set_num_threads(1)
    present = _newest_commits(run) if once else {}
    while True:
        try:
            num_rows = watch_run(run, stop_event, config.watch, gapt=config.gapt, once=once)
        except WatcherRunningError:
            if not once:
                raise
            if all(read_cursor(run.objects).get(rank, -1) >= seq for rank, seq in present.items()):
                return
            if stop_event.wait(_LOOK_AGAIN_S):
                return
        else:
            logger.info("%s: %d steps measured", path, num_rows)
            return


def _wait_for_run(path: Path, stop_event: threading.Event, *, once: bool) -> Run | None:
    """Open a run, waiting until its trainer has created it.

    Returns:
        The run, or None when stopped before.

    Raises:
        RunNotFoundError: nothing is there, and nobody waits for it.
        NotARunError: something else is there.
    """
    while not stop_event.is_set():
        try:
            return open_run(path)
        except (RunNotFoundError, NotARunError) as error:
            if once or path.is_file():
                raise
            logger.info("waiting: %s", error)
            stop_event.wait(_LOOK_AGAIN_S)
    return None


def _newest_commits(run: Run) -> dict[int, int]:
    """The newest committed `seq` of each rank, of those whose record can be read: no other gets a row.

    Returns:
        Rank to `seq`.
    """
    newest: dict[int, int] = {}
    for rank in list_ranks(run.objects):
        reader = FrameReader(run.objects, run.run_id, rank)
        for seq in reader.seqs():
            with contextlib.suppress(CorruptFrameError):
                newest[rank] = seq if reader.read_commit(seq) is not None else newest.get(rank, -1)
    return newest
