"""One progress line for a demo run, and its summary."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from entropy_monitor.errors import NotARunError, RunNotFoundError
from entropy_monitor.store import MetricsReader, open_run, read_status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from rich.console import Console

    from entropy_monitor.store import Run

_PRIMARY = "mbe_normalized"
_LINES_WITHOUT_TERMINAL = 10


class DemoProgress:
    """Step, CE, MBE, regime, phase and lag in one line; ten plain lines a run where there is no terminal."""

    def __init__(self, directory: Path, steps: int, console: Console) -> None:
        self._directory, self._steps, self._console = directory, steps, console
        self._run: Run | None = None
        self._reader: MetricsReader | None = None
        self._figures = "waiting for the first frame"
        self._printed = 0
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(self._figures, total=steps)

    def __enter__(self) -> Self:
        """Begin to draw.

        Returns:
            This progress display.
        """
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last line standing."""
        self._bar.stop()

    def refresh(self) -> None:
        """Read the run's state and redraw."""
        if self._run is None:
            with contextlib.suppress(RunNotFoundError, NotARunError):
                self._run = open_run(self._directory)
                self._reader = MetricsReader(self._run.objects)
        if self._run is None or self._reader is None:
            return
        found = read_status(self._run)
        for block in self._reader.read_new():
            ce = block.column("ce")[-1]
            mbe = np.nanmean(block.values[-1, :, block.layout.metrics.index(_PRIMARY)])
            self._figures = f"CE {ce:.3f}  MBE {mbe:.3f}"
        lag = found.watcher_lag_s["p95"]
        line = f"{self._figures}  {found.phase or '-'}  (regime {found.regime})" + (f"  lag {lag:.2f} s" if lag else "")
        step = found.step or 0
        self._bar.update(self._task, completed=step, description=line)
        if not self._console.is_terminal and step * _LINES_WITHOUT_TERMINAL >= (self._printed + 1) * self._steps:
            self._printed = step * _LINES_WITHOUT_TERMINAL // self._steps
            self._console.print(f"step {step}/{self._steps}  {line}", soft_wrap=True)


def summary_lines(run: Run) -> Iterator[str]:
    """What a demo run has shown.

    Yields:
        Lines of text.
    """
    found = read_status(run)
    lag = found.watcher_lag_s
    yield f"frames     {found.frames_committed} committed, {found.frames_dropped} dropped"
    if lag["p95"] is not None:
        yield f"lag        p50 {lag['p50']:.3f} s, p95 {lag['p95']:.3f} s from commit to metrics"
    steps_of = {command.command_id: command.phase for command in run.commands()}
    applied = [(ack.step, steps_of[ack.command_id]) for ack in run.acknowledgements() if ack.status == "applied"]
    entered = [("memorize", 0), *((phase, step) for step, phase in applied if phase != "auto")]
    yield "phases     " + ", ".join(f"{phase} at step {step}" for phase, step in entered)
    metrics = run.metrics(attempt=found.attempt)
    rows = max(1, min(5, metrics.sizes["step"]))
    for label, part in (("before", slice(None, rows)), ("after", slice(-rows, None))):
        chosen = metrics.isel(step=part)
        value, error = float(chosen[_PRIMARY].mean()), float(chosen[f"{_PRIMARY}_se"].mean())
        yield (
            f"MBE {label:6} {value:.3f} ± {error:.3f} nats (row-normalised, mean of layers and {rows} frames, "
            f"n = {chosen[_PRIMARY].attrs['n']} patches), CE {float(chosen['ce'].mean()):.3f} nats"
        )
    if found.faults:
        yield "faults     " + ", ".join(f"{count} x {kind}" for kind, count in found.faults.items())
    yield f"overhead   {found.overhead_words}"
