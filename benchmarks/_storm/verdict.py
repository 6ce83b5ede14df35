"""What is left of a run is held against what observer and trainers saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from entropy_monitor.store import (
    MetricsReader,
    Run,
    list_acknowledgements,
    list_commands,
    list_commits,
    list_segments,
    read_cursor,
    read_status,
)
from entropy_monitor.store.commands import refusal
from entropy_monitor.store.layout import retention_key

from .struck import KEEP, KEY, RANKS

if TYPE_CHECKING:
    from .observer import Observer
    from .report import StormReport


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
        forged = refusal(command, number, run.run_id, KEY, command.issued_at)
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
