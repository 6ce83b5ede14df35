"""Starting, killing and restarting."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

from entropy_monitor.errors import CorruptFrameError
from entropy_monitor.store import (
    CommandRequest,
    FrameReader,
    Run,
    issue_command,
    list_commits,
    list_segments,
    open_run,
    read_status,
)

from .observer import Observer
from .report import StormReport
from .struck import KEY, RANKS, observe_run, train
from .verdict import judge

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path


class Storm:
    """Starts, kills and restarts; `run` goes through it all."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory, self._random = directory, random.Random(seed)
        self._run_dir, self._stop = directory / "run", directory / "stop"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "entropy_hooks", "entropy_monitor.watcher", train.__module__])
        self._launch = 0
        self._trainers: list[BaseProcess] = []
        self._watcher: BaseProcess | None = None
        self.report = StormReport(seed)

    def run(self, kills: int, *, pause_s: tuple[float, float] = (0.15, 1.2)) -> StormReport:
        """Rage, let everything end cleanly, and judge what is left."""
        began = time.monotonic()
        try:
            self._start_trainers()
            run = self._wait_for_run()
            observer = Observer(run, self.report)
            observer.start()
            self._start_watcher()
            self._rage(run, kills, pause_s)
            self._end_cleanly(run)
            observer.finish()
        finally:
            self._kill([*self._trainers, *([self._watcher] if self._watcher else [])])
        judge(run, observer, self.report, self._read_logs())
        self.report.seconds = time.monotonic() - began
        return self.report

    def _rage(self, run: Run, kills: int, pause_s: tuple[float, float]) -> None:
        while sum(self.report.kills.values()) < kills:
            self._wait_for_progress(run, self._random.random() < 0.5)
            deadline = time.monotonic() + self._random.uniform(*pause_s)
            while time.monotonic() < deadline:
                self._command(run)
                time.sleep(self._random.uniform(0.01, 0.15))
            what = self._random.choice(["trainers", "watcher", "both"])
            self.report.kills[what] += 1
            if what != "watcher":
                self._kill(self._trainers)
            if what != "trainers" and self._watcher is not None:
                self._kill([self._watcher])
            if what != "watcher":
                self._start_trainers()
            if what != "trainers":
                self._start_watcher()

    def _command(self, run: Run) -> None:
        phase = self._random.choice(["memorize", "compress", "auto"])
        key = KEY if self._random.random() < 0.9 else "a wrong key"
        expiry = 300.0 if self._random.random() < 0.8 else 0.05
        request = CommandRequest(phase=phase, reason="storm", issued_by="storm", expires_after_s=expiry)
        issue_command(run.objects, run.run_id, request, key=key)

    def _wait_for_progress(self, run: Run, fully: bool) -> None:
        """Let the restarted processes come up at times, and strike before that at others."""
        before = {rank: len(list_segments(run.objects, rank)) for rank in RANKS} if fully else {}
        deadline = time.monotonic() + (30 if fully else 0)
        while time.monotonic() < deadline:
            newest = max((record["attempt"] for record in run.attempts()), default=0)
            reached = [frame.attempt for frame in self._newest_frames(run)]
            if len(reached) == len(before) and min(reached) == newest and self._launched(run):
                return
            time.sleep(0.05)

    def _launched(self, run: Run) -> bool:
        return any(record.get("launch_id") == f"storm:{self._launch}#1" for record in run.attempts()[-1:])

    @staticmethod
    def _newest_frames(run: Run) -> list[Any]:
        found = []
        for rank in RANKS:
            for segment in reversed(list_segments(run.objects, rank)):
                if seqs := list_commits(run.objects, rank, segment):
                    with contextlib.suppress(CorruptFrameError):
                        found.append(FrameReader(run.objects, run.run_id, rank).read_commit(seqs[-1]))
                    break
        return [frame for frame in found if frame is not None]

    def _start_trainers(self) -> None:
        self._launch += 1
        self._trainers = [
            self._start(train, str(self._run_dir), rank, self._launch, str(self._log(rank)), str(self._stop))
            for rank in RANKS
        ]

    def _start_watcher(self) -> None:
        self._watcher = self._start(observe_run, str(self._run_dir), str(self._directory / "watcher.log"))

    def _start(self, target: Any, *args: Any) -> BaseProcess:
        process = self._context.Process(target=target, args=args)
        process.start()
        return process

    def _log(self, rank: int) -> Path:
        return self._directory / f"trainer.{rank}.log"

    @staticmethod
    def _kill(processes: Sequence[BaseProcess]) -> None:
        for process in processes:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)  # it may not lead its group yet
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()

    def _wait_for_run(self) -> Run:
        deadline = time.monotonic() + 60
        while not (self._run_dir / "store.zarr" / "zarr.json").exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the trainers did not create the run")
            time.sleep(0.02)
        return open_run(self._run_dir)

    def _end_cleanly(self, run: Run) -> None:
        """Let the newest attempt answer what is left, end it, and let the watcher measure what is left."""
        self._wait_for_progress(run, True)
        deadline = time.monotonic() + 30
        while read_status(run).commands_pending and time.monotonic() < deadline:
            time.sleep(0.05)
        self._stop.touch()
        for process in (*self._trainers, self._watcher):
            assert process is not None
            process.join(60)
            if process.exitcode != 0:
                self.report.violations.append(f"a process ended with {process.exitcode} instead of 0")

    def _read_logs(self) -> dict[int, list[Any]]:
        """Each rank's log; the last line of a killed process may be torn."""
        logs: dict[int, list[Any]] = {rank: [] for rank in RANKS}
        for rank in RANKS:
            for line in self._log(rank).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    logs[rank].append(json.loads(line))
        if words := (self._directory / "watcher.log").read_text(encoding="utf-8"):
            self.report.violations.append(f"the watcher said: {words}")
        return logs
