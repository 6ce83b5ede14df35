"""A kill storm: real trainers, a real watcher and a commander, killed with SIGKILL at random moments and restarted.

What is written is made verifiable. The model's activations are a function of the step alone, so that any mixture of two
frames, and any frame that is half of something else, shows; and each rank keeps a log of its own, appended before and
after the acknowledgements that the store promises.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entropy_monitor.errors import CorruptFrameError, FrameGoneError
from entropy_monitor.store import (
    CommandRequest,
    FrameReader,
    MetricsReader,
    Run,
    issue_command,
    list_acknowledgements,
    list_commands,
    list_commits,
    list_segments,
    open_run,
    read_cursor,
    read_status,
)
from entropy_monitor.store.commands import refusal
from entropy_monitor.store.layout import retention_key

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.process import BaseProcess

RANKS = (0, 1)
LAYERS, FEATURES, BATCH, CONTEXT, PATCHES = 3, 4, 2, 16, 4
KEEP = 128
"""Frames a rank keeps: few, so that the storm also strikes removals."""
STEP_S = 0.004
_KEY = "the storm's key"


@dataclass
class StormReport:
    """What a storm did, and what it found."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter[str])
    attempts: int = 0
    frames_seen: int = 0
    frames_measured: int = 0
    frames_removed: int = 0
    frames_on_disk: int = 0
    rows: int = 0
    corrections: int = 0
    commands: int = 0
    answers: Counter[str] = field(default_factory=Counter[str])
    unanswered: int = 0
    applied: int = 0
    reads: int = 0
    corrupt: int = 0
    half_read: int = 0
    lost: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list[str])

    def lines(self) -> list[str]:
        """The figures as a table."""
        kills = ", ".join(f"{count} {what}" for what, count in sorted(self.kills.items()))
        answers = ", ".join(f"{count} {status}" for status, count in sorted(self.answers.items()))
        return [
            f"seed                 {self.seed}",
            f"kills                {sum(self.kills.values())} ({kills}) in {self.seconds:.0f} s",
            f"attempts             {self.attempts}",
            f"frames committed     {self.frames_seen} seen by the observer, {self.reads} read and checked by it",
            f"frames measured      {self.frames_measured} in {self.rows} rows, {self.corrections} of them corrections",
            f"frames removed       {self.frames_removed} by the ring; {self.frames_on_disk} are on disk",
            f"commands             {self.commands}, {self.unanswered} of {2 * self.commands} answers never given",
            f"answers              {sum(self.answers.values())} ({answers}), {self.applied} logged by the trainers",
            f"corrupt              {self.corrupt}",
            f"half-read            {self.half_read}",
            f"lost                 {self.lost}",
            *(f"VIOLATION            {text}" for text in self.violations),
        ]


# ---- the trainer -----------------------------------------------------------------------------------------------------


def activations_of(step: int) -> np.ndarray:
    """What every layer's every token holds at a step; exact in bfloat16."""
    digits = [(step >> shift) % 16 for shift in (0, 4, 8, 12)]
    return np.array(digits[:FEATURES], np.float32) + 1


def train(run: str, rank: int, launch: int, log: str, stop: str) -> None:
    """One rank of one launch: trains until the file `stop` exists, and logs what it promised and saw."""
    os.setsid()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(RANKS)),
        "MASTER_ADDR": "storm",
        "MASTER_PORT": str(launch),
        "ENTROPY_MONITOR_KEY": _KEY,
    }
    import torch
    from torch import nn

    from entropy_hooks import attach

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # the store is slow in a storm, and forged commands are part of it

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(FEATURES))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scale

    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
    model.forward = lambda x: _through(model.blocks, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Path(log).open("a", encoding="utf-8", buffering=1) as out:
        monitor = attach(
            model, optimizer, run=run, every=1, patches=PATCHES, keep=KEEP, steer=True, weight_alignment=False
        )
        if not monitor.enabled:
            raise RuntimeError(f"not attached: {monitor.stats().faults}")
        attempt = monitor.stats().attempt
        monitor.on_phase(lambda phase, weight: _say(out, attempt, monitor.stats().step, "applied", phase))
        _say(out, attempt, 0, "attached", monitor.phase)
        step = 0
        while not Path(stop).exists():
            x = torch.from_numpy(activations_of(step)).expand(BATCH, CONTEXT, FEATURES).clone()
            loss = (model(x) - x).sum() + float(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            time.sleep(STEP_S)
        monitor.detach()
        stats = monitor.stats()
        _say(out, attempt, stats.frames_committed, "detached", monitor.phase)
        if unexpected := set(stats.faults) - {"frames_removed_unmeasured", "ring_full", "rejected_command"}:
            _say(out, attempt, step, "fault", f"{ {kind: stats.faults[kind] for kind in unexpected} }")


def _through(blocks: Any, x: Any) -> Any:
    for block in blocks:
        x = block(x)
    return x


def _say(out: Any, attempt: int, step: int, what: str, detail: str) -> None:
    out.write(json.dumps([attempt, step, what, detail]) + "\n")


def observe_run(run: str, log: str) -> None:
    """The watcher, as `entropy-monitor watch` runs it."""
    os.setsid()
    with Path(log).open("a", encoding="utf-8", buffering=1) as out:
        try:
            import torch

            from entropy_monitor.watcher import watch

            torch.set_num_threads(1)
            logging.disable(logging.WARNING)  # that ranks are missing is what a storm is about
            watch(open_run(run), threading.Event())
        except BaseException:
            out.write(traceback.format_exc())
            raise


# ---- the observer ----------------------------------------------------------------------------------------------------


class Observer(threading.Thread):
    """Lists commits and reads frames while others are being killed; believes nothing else."""

    def __init__(self, run: Run, report: StormReport) -> None:
        super().__init__(daemon=True)
        self._run, self._report = run, report
        self._stop_asked = threading.Event()
        self._readers = {rank: FrameReader(run.objects, run.run_id, rank) for rank in RANKS}
        self.commits: dict[int, set[int]] = {rank: set() for rank in RANKS}
        """Every commit ever seen, by rank."""
        self.steps: dict[tuple[int, int], tuple[int, int]] = {}
        """(attempt, step) of every frame read, by (rank, seq)."""
        self.phases: dict[tuple[int, int, int], str] = {}
        """Phase that a frame was trained in, by (rank, attempt, step)."""

    def run(self) -> None:
        """Look again and again; the last look comes after everything has ended."""
        while True:
            last_look = self._stop_asked.is_set()
            for rank in RANKS:
                segments = list_segments(self._run.objects, rank)
                seqs = [seq for segment in segments for seq in list_commits(self._run.objects, rank, segment)]
                for seq in sorted(set(seqs) - self.commits[rank]):
                    self.commits[rank].add(seq)
                    self.check(rank, seq)
            if last_look:
                return
            time.sleep(0.02)

    def finish(self) -> None:
        """Look a last time."""
        self._stop_asked.set()
        self.join()

    def check(self, rank: int, seq: int) -> None:
        """Read one committed frame and compare it with what its step must hold."""
        report = self._report
        try:
            frame = self._readers[rank].read(seq)
        except FrameGoneError:
            return
        except CorruptFrameError as error:
            report.corrupt += 1
            report.violations.append(f"corrupt: {error}")
            return
        if frame is None:
            return  # removed since it was listed
        report.reads += 1
        self.steps[rank, seq] = (frame.attempt, frame.step)
        self.phases[rank, frame.attempt, frame.step] = frame.phase
        activations = frame.activations
        whole = (
            (frame.rank, frame.seq, frame.num_patches) == (rank, seq, PATCHES)
            and frame.scalars["loss"] == frame.step
            and activations.shape == (LAYERS, 8 * PATCHES, FEATURES)
            and np.array_equal(activations, np.broadcast_to(activations_of(frame.step), activations.shape))
        )
        if not whole:
            report.half_read += 1
            report.violations.append(f"rank {rank} seq {seq} says step {frame.step} and holds something else")


# ---- the storm -------------------------------------------------------------------------------------------------------


class Storm:
    """Starts, kills and restarts; `run` goes through it all."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory, self._random = directory, random.Random(seed)
        self._run_dir, self._stop = directory / "run", directory / "stop"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "entropy_hooks", "entropy_monitor.watcher", __name__])
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
        key = _KEY if self._random.random() < 0.9 else "a wrong key"
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


# ---- the verdict -----------------------------------------------------------------------------------------------------


def judge(run: Run, observer: Observer, report: StormReport, logs: dict[int, list[Any]]) -> None:
    """Hold the store against what observer and trainers saw."""
    report.attempts = len(run.attempts())
    _judge_frames(run, observer, report)
    _judge_rows(run, observer, report)
    _judge_commands(run, report, logs)
    for rank, log in logs.items():
        _judge_phases(rank, observer, log, report)
        report.violations += [f"rank {rank}: {entry}" for entry in log if entry[2] == "fault"]
    status = read_status(run)
    if (status.state, status.watcher_state) != ("ended", "ended"):
        report.violations.append(f"expected the end of everything; status says {status.state}, {status.watcher_state}")


def _judge_frames(run: Run, observer: Observer, report: StormReport) -> None:
    measured = _measured(run)
    for rank in RANKS:
        on_disk = {
            seq for segment in list_segments(run.objects, rank) for seq in list_commits(run.objects, rank, segment)
        }
        for seq in sorted(on_disk):
            observer.check(rank, seq)  # once more, at the end
        record = run.objects.get_json(retention_key(rank)) or {}
        removed, through = int(record.get("frames_removed", 0)), int(record.get("removed_through", -1))
        seen = observer.commits[rank]
        absent = seen - on_disk
        # What the observer missed between two looks may have been removed as well: never fewer than it knows of.
        if len(absent) > removed:
            report.lost += len(absent) - removed
            report.violations.append(f"rank {rank}: {len(absent)} frames are gone, the ring says it removed {removed}")
        if stray := [seq for seq in absent if seq // 64 > through]:
            report.lost += len(stray)
            report.violations.append(
                f"rank {rank}: {stray} are gone, the ring removed nothing behind segment {through}"
            )
        unmeasured = [seq for seq in seen if seq not in measured[rank]]
        if still_there := [seq for seq in unmeasured if seq in on_disk]:
            report.lost += len(still_there)
            report.violations.append(f"rank {rank}: {still_there} are on disk and were never measured")
        counted = int(record.get("frames_removed_unmeasured", 0))
        if len(unmeasured) - len(still_there) > counted:
            report.lost += len(unmeasured) - len(still_there) - counted
            report.violations.append(f"rank {rank}: {len(unmeasured)} unmeasured frames, {counted} of them counted")
        if not len(on_disk) < KEEP + 64:
            report.violations.append(f"rank {rank}: {len(on_disk)} frames on disk, the ring allows {KEEP + 63}")
        report.frames_seen += len(seen)
        report.frames_measured += len(measured[rank])
        report.frames_removed += removed
        report.frames_on_disk += len(on_disk)


def _measured(run: Run) -> dict[int, set[int]]:
    measured: dict[int, set[int]] = {rank: set() for rank in RANKS}
    for block in MetricsReader(run.objects).read_new():
        for rank in RANKS:
            measured[rank] |= {int(seq) for seq in block.source[:, rank] if seq >= 0}
    return measured


def _judge_rows(run: Run, observer: Observer, report: StormReport) -> None:
    sources: dict[tuple[int, int], dict[int, int]] = {}
    owner: dict[tuple[int, int], tuple[int, int]] = {}
    cursor: dict[int, int] = {}
    for block in MetricsReader(run.objects).read_new():
        for attempt, step, row in zip(block.column("attempt"), block.column("step"), block.source, strict=True):
            key, source = (int(attempt), int(step)), {rank: int(seq) for rank, seq in enumerate(row) if seq >= 0}
            report.rows += 1
            if key in sources:
                report.corrections += 1
                if not source.items() > sources[key].items():
                    report.violations.append(f"{key} was measured twice: from {sources[key]}, then from {source}")
            sources[key] = source
            for rank, seq in source.items():
                cursor[rank] = max(seq, cursor.get(rank, -1))
                if owner.setdefault((rank, seq), key) != key:
                    report.violations.append(f"rank {rank} seq {seq} is in the rows {owner[rank, seq]} and {key}")
                if observer.steps.get((rank, seq), key) != key:
                    report.violations.append(f"row {key} names seq {seq}, which is {observer.steps[rank, seq]}")
    if cursor != read_cursor(run.objects):
        report.violations.append(f"the cursor says {read_cursor(run.objects)}, the rows say {cursor}")


def _judge_commands(run: Run, report: StormReport, logs: dict[int, list[Any]]) -> None:
    commands = {int(command.command_id): command for command in list_commands(run.objects)}
    acks = {(int(ack.command_id), ack.rank): ack for ack in list_acknowledgements(run.objects)}
    report.commands = len(commands)
    report.answers.update(ack.status for ack in acks.values())
    if sorted(commands) != list(range(1, len(commands) + 1)):
        report.violations.append("the numbers of the commands have gaps")
    for rank in RANKS:
        _judge_rank(rank, commands, acks, logs[rank], report)
    for (number, rank), ack in acks.items():
        command = commands[number]
        forged = refusal(command, number, run.run_id, _KEY, command.issued_at)
        if (ack.status == "rejected") != (forged is not None):
            report.violations.append(f"command {number} of rank {rank} was {ack.status}; expected {forged}")
        if ack.status == "expired" and command.expires_after_s > 60:
            report.violations.append(f"command {number} of rank {rank} expired within its time")


def _judge_rank(rank: int, commands: dict[int, Any], acks: dict[Any, Any], log: list[Any], report: StormReport) -> None:
    """The rank that was alive at the end has answered everything, and each attempt applied what it acknowledged."""
    unanswered = [number for number in commands if (number, rank) not in acks]
    report.unanswered += len(unanswered)
    # The last attempt was given the time to answer everything that the ones before it left open.
    if unanswered:
        report.violations.append(f"rank {rank} never answered {unanswered}")
    logged = [entry for entry in log if entry[2] == "applied"]
    report.applied += len(logged)
    promised = [
        acks[number, rank]
        for number in sorted(commands)
        if (number, rank) in acks and acks[number, rank].status == "applied" and commands[number].phase != "auto"
    ]
    # Both are in the order of the numbers; a kill between answer and application leaves an answer alone.
    position = 0
    for ack in promised:
        if position < len(logged):
            _, step, _, phase = logged[position]
            if (step, phase) == (ack.step, ack.detail):
                position += 1
    if position != len(logged):
        report.violations.append(f"rank {rank} applied {logged[position]} without, or again after, its answer")
    lives = 1 + sum(entry[2] == "attached" for entry in log)
    if len(promised) - len(logged) > lives:
        report.violations.append(f"rank {rank} acknowledged {len(promised)} changes and made {len(logged)}")
    for entry in log:
        if entry[2] == "attached" and entry[3] != "memorize":
            report.violations.append(f"rank {rank}: attempt {entry[0]} began in {entry[3]}")


def _judge_phases(rank: int, observer: Observer, log: list[Any], report: StormReport) -> None:
    """Every frame was trained in the phase that its attempt had applied last."""
    for (frame_rank, attempt, step), phase in sorted(observer.phases.items()):
        if frame_rank == rank:
            applied = [entry[3] for entry in log if entry[0] == attempt and entry[2] == "applied" and entry[1] <= step]
            expected = applied[-1] if applied else "memorize"
            if phase != expected:
                report.violations.append(
                    f"rank {rank} trained step {step} of attempt {attempt} in {phase}; it had applied {expected}"
                )
