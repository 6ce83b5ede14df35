"""Committed frames as a generator, joined over the ranks.

The bell is a hint, the store is the truth: a rank's commits are listed after every ring and every 250 ms, and each is
yielded exactly once behind the cursor. This is the only module that knows watchdog.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from entropy_monitor.errors import CorruptFrameError, FrameGoneError
from entropy_monitor.store import (
    FrameReader,
    list_attempts,
    list_commits,
    list_ranks,
    list_segments,
    read_attempt,
    read_trainer_heartbeats,
)
from entropy_monitor.store.layout import SEGMENT_FRAMES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from watchdog.observers.api import BaseObserver

    from entropy_monitor.store import Run
    from entropy_monitor.types import Frame

logger = logging.getLogger(__name__)

POLL_S = 0.25
REMEMBERED_STEPS = 1024
"""Steps whose sources are kept, so that a late rank's frame can be pooled with the others'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedStep:
    """One optimizer step, as far as its ranks have committed it."""

    attempt: int
    step: int
    frames: tuple[Frame, ...]
    """With arrays; without the ranks whose frame could not be read."""
    source: Mapping[int, int]
    """`seq` of every rank that committed, readable or not."""
    missing_ranks: tuple[int, ...]
    is_correction: bool
    """An earlier row of this step was written without one of these ranks."""
    faults: Mapping[str, int] = field(default_factory=dict[str, int])
    """``corrupt_frame``, ``frame_gone``, ``rank_missing``."""


class Doorbell:
    """Waits for a commit: woken by a change in ``bell/`` where the filesystem tells, else by the clock."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._rung = threading.Event()
        self._observer: BaseObserver | None = None

    def __enter__(self) -> Self:
        """Begin to listen.

        Returns:
            This doorbell.
        """
        if self._directory is None:
            return self  # an object store rings no bells
        from watchdog.events import FileSystemEventHandler
        from watchdog.observers import Observer

        handler = FileSystemEventHandler()
        handler.on_any_event = lambda event: self._rung.set()
        observer = Observer()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            observer.schedule(handler, str(self._directory), recursive=False)
            observer.start()
        except OSError as error:  # out of inotify instances, or a file in the directory's place
            logger.warning("no file events (%s): the store is polled every %.0f ms", error, 1000 * POLL_S)
        else:
            self._observer = observer
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(5.0)

    def wait(self, stop_event: threading.Event) -> None:
        """Wait for a ring, the poll interval or the end, whichever comes first."""
        deadline = time.monotonic() + POLL_S
        while not stop_event.is_set() and time.monotonic() < deadline:
            if self._rung.wait(0.05):
                self._rung.clear()
                return


class RankFollower:
    """Lists one rank's commits behind a cursor, in order."""

    def __init__(self, run: Run, rank: int, cursor: int) -> None:
        self._objects, self.rank, self._cursor = run.objects, rank, cursor
        self.reader = FrameReader(run.objects, run.run_id, rank)

    def new_commits(self) -> Iterator[int]:
        """Commits that have come since the last call.

        Segments are listed before their commits, so that an older one is drained again after a newer one was seen.

        Yields:
            The `seq` of each, ascending.
        """
        for segment in list_segments(self._objects, self.rank):
            if segment < self._cursor // SEGMENT_FRAMES:
                continue
            for seq in self._commits(segment):
                self._cursor = seq
                yield seq

    def _commits(self, segment: int) -> Iterator[int]:
        """Commits of one segment behind the cursor.

        A directory is not listed in one instant: of two commits of the same moment the listing may have the later one
        alone. So each number below a listed one is asked for by name.

        Yields:
            The `seq` of each, ascending.
        """
        listed = {seq for seq in list_commits(self._objects, self.rank, segment) if seq > self._cursor}
        for seq in range(max(SEGMENT_FRAMES * segment, self._cursor + 1), max(listed, default=-1) + 1):
            if seq in listed or self.reader.is_committed(seq):
                yield seq


class Joiner:
    """Gathers the ranks' frames of one step and says when the step can be measured."""

    def __init__(self, run: Run, timeout_s: float) -> None:
        self._run, self._timeout_s = run, timeout_s
        self._pending: dict[tuple[int, int], dict[int, int]] = {}
        self._first_seen: dict[tuple[int, int], float] = {}
        self._newest: dict[int, tuple[int, int]] = {}
        self._done: dict[tuple[int, int], dict[int, int]] = {}
        self._last_done = (-1, -1)
        self._world_sizes: dict[int, int] = {}

    def remember(self, done: Mapping[tuple[int, int], Mapping[int, int]]) -> None:
        """Take over the steps that an earlier watcher has measured, oldest first."""
        for key, source in done.items():
            self._finish(key, dict(source))

    def add(self, key: tuple[int, int], rank: int, seq: int, now: float) -> None:
        """Take one rank's commit for (attempt, step) `key`."""
        self._pending.setdefault(key, {})[rank] = seq
        self._first_seen.setdefault(key, now)
        self._newest[rank] = max(key, self._newest.get(rank, key))

    def __len__(self) -> int:
        return len(self._pending)

    def ready(
        self, now: float, ended: Collection[int], *, at_once: bool
    ) -> Iterator[tuple[tuple[int, int], dict[int, int], tuple[int, ...]]]:
        """Steps that need wait no longer, in order.

        Args:
            now: monotonic time, seconds.
            ended: ranks that had said goodbye before their commits were last listed.
            at_once: do not wait for missing ranks.

        Yields:
            (attempt, step), the ranks' `seq`, and the missing ranks.
        """
        for key in sorted(self._pending):
            missing = tuple(rank for rank in self._expected(key) if rank not in self._pending[key])
            # A rank that has committed a later step, or has ended, will never give this one.
            awaited = [rank for rank in missing if self._newest.get(rank, key) <= key and rank not in ended]
            late = now - self._first_seen[key] >= self._timeout_s
            if awaited and not (at_once or late):
                return
            source = {**self._done.get(key, {}), **self._pending.pop(key)}
            del self._first_seen[key]
            yield key, source, tuple(rank for rank in missing if rank not in source)
            self._finish(key, source)

    def is_correction(self, key: tuple[int, int]) -> bool:
        """Whether a row for this step, or a later one, has been written before.

        Returns:
            True when it has.
        """
        return key <= self._last_done

    def _finish(self, key: tuple[int, int], source: dict[int, int]) -> None:
        self._done[key] = source
        self._last_done = max(self._last_done, key)
        while len(self._done) > REMEMBERED_STEPS:
            del self._done[next(iter(self._done))]

    def _expected(self, key: tuple[int, int]) -> range:
        attempt = key[0]
        if attempt not in self._world_sizes:
            self._world_sizes[attempt] = int(read_attempt(self._run.objects, attempt).get("world_size", 1))
        return range(self._world_sizes[attempt])


def watch_frames(
    run: Run,
    stop_event: threading.Event,
    *,
    cursor: Mapping[int, int] | None = None,
    done: Mapping[tuple[int, int], Mapping[int, int]] | None = None,
    join_timeout_s: float = 10.0,
    once: bool = False,
) -> Iterator[JoinedStep]:
    """Follow a run's committed frames, each exactly once.

    Args:
        run: the run.
        stop_event: ends the generator after the step in hand.
        cursor: newest `seq` of each rank that has been measured; older frames are not given.
        done: sources of measured steps by (attempt, step), against which late frames are corrections.
        join_timeout_s: how long a step waits for missing ranks.
        once: give what is committed now, without waiting for missing ranks, and end.

    Yields:
        Steps in the order of (attempt, step); corrections as they come. Ends when every rank has ended and all its
        commits have been given.
    """
    followers: dict[int, RankFollower] = {}
    joiner = Joiner(run, join_timeout_s)
    joiner.remember(done or {})
    faults: Counter[str] = Counter()
    bell = run.objects.path / "bell" if run.objects.path is not None else None
    with Doorbell(bell) as doorbell:
        while not stop_event.is_set():
            # Asked before the store is read: whatever a rank committed before it ended is read now.
            ended, has_ended = _ended_ranks(run)
            last_round = once or has_ended
            for rank in list_ranks(run.objects):
                follower = followers.setdefault(rank, RankFollower(run, rank, (cursor or {}).get(rank, -1)))
                _gather(follower, joiner, faults)
            for key, source, missing in joiner.ready(time.monotonic(), ended, at_once=last_round):
                yield _read_step(followers, key, source, missing, joiner, faults)
                faults.clear()
                if stop_event.is_set():
                    return
            if last_round:
                return
            doorbell.wait(stop_event)


def _gather(follower: RankFollower, joiner: Joiner, faults: Counter[str]) -> None:
    for seq in follower.new_commits():
        try:
            commit = follower.reader.read_commit(seq)
        except CorruptFrameError as error:
            logger.warning("%s", error)
            faults["corrupt_frame"] += 1
            continue
        if commit is None:
            faults["frame_gone"] += 1
        else:
            joiner.add((commit.attempt, commit.step), follower.rank, seq, time.monotonic())


def _read_step(
    followers: Mapping[int, RankFollower],
    key: tuple[int, int],
    source: Mapping[int, int],
    missing: tuple[int, ...],
    joiner: Joiner,
    earlier_faults: Counter[str],
) -> JoinedStep:
    faults = Counter(earlier_faults)
    frames: list[Frame] = []
    for rank, seq in sorted(source.items()):
        try:
            frame = followers[rank].reader.read(seq)
        except CorruptFrameError as error:
            logger.warning("%s", error)
            faults["corrupt_frame"] += 1
            continue
        except FrameGoneError:
            frame = None
        if frame is None:
            faults["frame_gone"] += 1
        else:
            frames.append(frame)
    if missing:
        faults["rank_missing"] += len(missing)
        logger.warning(
            "step %d of attempt %d is measured without rank %s", key[1], key[0], ", ".join(map(str, missing))
        )
    return JoinedStep(
        attempt=key[0],
        step=key[1],
        frames=tuple(frames),
        source=source,
        missing_ranks=missing,
        is_correction=joiner.is_correction(key),
        faults=faults,
    )


def _ended_ranks(run: Run) -> tuple[frozenset[int], bool]:
    """Ranks of the newest attempt that have said goodbye.

    Returns:
        The ranks, and whether they are all.
    """
    attempt = max([0, *list_attempts(run.objects)])
    beats = read_trainer_heartbeats(run.objects)
    ended = frozenset(
        rank for rank, beat in beats.items() if beat.get("attempt") == attempt and beat.get("state") == "ended"
    )
    world_size = int(read_attempt(run.objects, attempt).get("world_size", 1))
    return ended, attempt > 0 and ended >= frozenset(range(world_size))
