"""Following committed frames: each once, in order, joined over ranks, whatever goes wrong in between."""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from watchdog.observers.api import BaseObserver

from entropy_monitor.store import Retention, create_run, list_commits
from entropy_monitor.store.layout import SEGMENT_FRAMES
from entropy_monitor.watcher import JoinedStep, follow, watch_frames

from ..synthetic_trainer import SyntheticTrainer, flip_byte

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEADLINE_S = 20.0


@dataclass
class Follower:
    """A thread that follows a run and keeps what it was given."""

    trainer: SyntheticTrainer
    options: dict[str, Any] = field(default_factory=dict)
    steps: list[JoinedStep] = field(default_factory=list)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        try:
            for step in watch_frames(self.trainer.run, self.stop, **self.options):
                self.steps.append(step)
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        if self.failure is not None:
            raise self.failure

    def wait_for(self, count: int) -> list[JoinedStep]:
        """The first `count` steps, once they are there."""
        wait_until(lambda: len(self.steps) >= count or not self._thread.is_alive())
        return self.steps[:count]

    def wait_for_end(self) -> list[JoinedStep]:
        """Everything, once the generator has ended by itself."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        assert not self.stop.is_set()
        return self.steps


def wait_until(condition: Callable[[], bool]) -> None:
    """Look every few milliseconds, and give up after a while."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def drained(trainer: SyntheticTrainer, **options: Any) -> list[JoinedStep]:
    """What is committed now."""
    return list(watch_frames(trainer.run, threading.Event(), once=True, **options))


def places(steps: list[JoinedStep]) -> list[tuple[int, int]]:
    return [(step.attempt, step.step) for step in steps]


# ---- one rank --------------------------------------------------------------------------------------------------------


def test_frames_come_once_each_and_in_order_while_they_are_written(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    with Follower(trainer) as follower:
        for step in range(150):  # three segments
            trainer.commit(step)
        follower.wait_for(150)
        trainer.end()
        steps = follower.wait_for_end()
    assert places(steps) == [(1, step) for step in range(150)]
    for joined in steps:
        (frame,) = joined.frames
        assert (frame.step, joined.source) == (joined.step, {0: frame.seq})
        assert frame.activations.shape == (2, 32, 6)
        assert (joined.missing_ranks, joined.is_correction, dict(joined.faults)) == ((), False, {})


def test_a_frame_is_seen_soon_after_its_bell(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    with Follower(trainer) as follower:
        trainer.commit(0)
        follower.wait_for(1)
        began = time.monotonic()
        trainer.commit(1)
        follower.wait_for(2)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("reached", [0, 1, 63, 64, 100, 129])
def test_a_restart_continues_behind_the_cursor(tmp_path: Path, reached: int) -> None:
    trainer = SyntheticTrainer(tmp_path)
    trainer.commit_all(range(130))
    before = drained(trainer)[: reached + 1]
    cursor = before[-1].source
    assert places(drained(trainer, cursor=cursor)) == [(1, step) for step in range(reached + 1, 130)]


def test_a_stop_ends_after_the_step_in_hand(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    trainer.commit_all(range(10))
    stop, given = threading.Event(), []
    for joined in watch_frames(trainer.run, stop):
        given.append(joined.step)
        if len(given) == 3:
            stop.set()
    assert given == [0, 1, 2]
    assert list(watch_frames(trainer.run, stop)) == []


def test_once_gives_what_is_there_and_does_not_wait(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    assert drained(trainer) == []
    trainer.commit(0, rank=1)
    began = time.monotonic()
    (joined,) = drained(trainer, join_timeout_s=1000.0)
    assert time.monotonic() - began < 10
    assert (joined.missing_ranks, joined.source) == ((0,), {1: 0})


def test_a_run_without_an_attempt_is_waited_for(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    stop = threading.Event()
    threading.Timer(0.4, stop.set).start()
    assert list(watch_frames(run, stop)) == []


def test_a_new_attempt_follows_the_old_one(tmp_path: Path) -> None:
    first = SyntheticTrainer(tmp_path)
    with Follower(first) as follower:
        first.commit_all(range(3))
        follower.wait_for(3)
        second = SyntheticTrainer(tmp_path)
        second.commit_all(range(2))
        follower.wait_for(5)
        second.end()
        steps = follower.wait_for_end()
    assert places(steps) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert [next(iter(step.source.values())) // SEGMENT_FRAMES for step in steps] == [0, 0, 0, 1, 1]
    assert not any(step.is_correction for step in steps)


def test_a_commit_that_a_listing_overlooked_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directories are not listed in one instant: of two new names the listing may have the later one alone."""
    trainer = SyntheticTrainer(tmp_path)
    trainer.commit_all(range(5))
    monkeypatch.setattr(follow, "list_commits", lambda *args: [seq for seq in list_commits(*args) if seq != 2])
    assert places(drained(trainer)) == [(1, step) for step in range(5)]


# ---- the bell --------------------------------------------------------------------------------------------------------


def test_without_file_events_polling_carries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_instances(self: BaseObserver) -> None:
        raise OSError(errno.EMFILE, "inotify instance limit reached")

    monkeypatch.setattr(BaseObserver, "start", out_of_instances)
    trainer = SyntheticTrainer(tmp_path)
    with Follower(trainer) as follower:
        trainer.commit_all(range(3))
        follower.wait_for(3)
        trainer.commit_all(range(3, 5))
        follower.wait_for(5)
        trainer.end()
        assert places(follower.wait_for_end()) == [(1, step) for step in range(5)]
    assert "the store is polled every 250 ms" in caplog.text


@pytest.mark.parametrize("is_there_first", [True, False])
def test_a_bell_that_never_rings_is_only_slower(tmp_path: Path, is_there_first: bool) -> None:
    trainer = SyntheticTrainer(tmp_path)
    bell = tmp_path / "bell"
    if is_there_first:
        bell.write_text("no directory")
    with Follower(trainer) as follower:
        if not is_there_first:
            wait_until(bell.exists)
            bell.rmdir()
            bell.write_text("no directory")
        trainer.commit_all(range(3))
        assert len(follower.wait_for(3)) == 3


def test_rings_without_commits_give_nothing(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    with Follower(trainer) as follower:
        wait_until((tmp_path / "bell").exists)
        for _ in range(20):
            trainer.run.objects.put("bell/r00000", b"7")
        trainer.commit(0)
        follower.wait_for(1)
        trainer.end()
        assert len(follower.wait_for_end()) == 1


# ---- several ranks ---------------------------------------------------------------------------------------------------


def test_two_ranks_are_joined_by_step(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    with Follower(trainer, {"join_timeout_s": 1000.0}) as follower:
        for step in range(5):
            trainer.commit(step, rank=0)
        for step in range(5):
            trainer.commit(step, rank=1)
        follower.wait_for(5)
        trainer.end()
        steps = follower.wait_for_end()
    assert places(steps) == [(1, step) for step in range(5)]
    for joined in steps:
        assert [frame.rank for frame in joined.frames] == [0, 1]
        assert set(joined.source) == {0, 1}
        assert not joined.faults


def test_a_missing_rank_is_named_after_the_timeout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=3)
    with Follower(trainer, {"join_timeout_s": 0.3}) as follower:
        trainer.commit(0, rank=0)
        trainer.commit(0, rank=2)
        (joined,) = follower.wait_for(1)
    assert joined.missing_ranks == (1,)
    assert [frame.rank for frame in joined.frames] == [0, 2]
    assert joined.faults == {"rank_missing": 1}
    assert "step 0 of attempt 1 is measured without rank 1" in caplog.text


def test_a_step_waits_for_its_ranks_until_the_timeout(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    with Follower(trainer, {"join_timeout_s": 1000.0}) as follower:
        trainer.commit(0, rank=0)
        trainer.commit(1, rank=0)
        time.sleep(0.4)  # longer than the poll
        assert follower.steps == []
        trainer.commit(0, rank=1)
        assert places(follower.wait_for(1)) == [(1, 0)]


def test_a_rank_that_went_on_without_a_frame_is_not_waited_for(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    with Follower(trainer, {"join_timeout_s": 1000.0}) as follower:
        trainer.commit(0, rank=0)
        trainer.commit(1, rank=1)  # it dropped step 0
        (joined,) = follower.wait_for(1)
        assert (joined.step, joined.missing_ranks) == (0, (1,))


def test_a_rank_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    with Follower(trainer, {"join_timeout_s": 1000.0}) as follower:
        trainer.commit_all(range(2))
        follower.wait_for(2)
        trainer.end(1)
        trainer.commit(2, rank=0)
        steps = follower.wait_for(3)
        assert steps[2].missing_ranks == (1,)
        trainer.end()
        follower.wait_for_end()


def test_what_a_rank_committed_before_it_ended_is_never_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last frame and the goodbye come between the listing of commits and the question who has ended."""
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    trainer.commit(0, rank=0)
    gather, pending = follow._gather, [1]

    def gather_then_end(follower: Any, *args: Any) -> None:
        gather(follower, *args)
        if follower.rank == 0 and pending:
            pending.clear()
            trainer.commit(0, rank=1)
            trainer.end()

    monkeypatch.setattr(follow, "_gather", gather_then_end)
    steps = list(watch_frames(trainer.run, threading.Event(), join_timeout_s=1000.0))
    assert [(step.missing_ranks, step.is_correction) for step in steps] == [((), False)]


def test_a_killed_attempt_does_not_hold_up_the_next_one(tmp_path: Path) -> None:
    first = SyntheticTrainer(tmp_path, world_size=2)
    with Follower(first, {"join_timeout_s": 1000.0}) as follower:
        first.commit(0, rank=0)  # then both are killed
        second = SyntheticTrainer(tmp_path, world_size=2)
        second.commit_all([0])
        steps = follower.wait_for(2)
    assert places(steps) == [(1, 0), (2, 0)]
    assert steps[0].missing_ranks == (1,)


def test_a_late_frame_gives_a_correction_pooled_with_the_others(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    with Follower(trainer, {"join_timeout_s": 0.2}) as follower:
        trainer.commit(0, rank=0)
        follower.wait_for(1)
        trainer.commit(0, rank=1)
        first, second = follower.wait_for(2)
    assert (first.missing_ranks, first.is_correction, list(first.source)) == ((1,), False, [0])
    assert (second.missing_ranks, second.is_correction) == ((), True)
    assert [frame.rank for frame in second.frames] == [0, 1]
    assert second.source == {0: 0, 1: 0}


def test_a_late_frame_after_a_restart_is_pooled_as_well(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    trainer.commit_all([0])
    trainer.commit(1, rank=0)
    before = drained(trainer)
    assert before[1].missing_ranks == (1,)
    trainer.commit(1, rank=1)
    done = {(step.attempt, step.step): step.source for step in before}
    (late,) = drained(trainer, cursor={0: 1, 1: 0}, done=done)
    assert (late.is_correction, late.source, [frame.rank for frame in late.frames]) == (True, {0: 1, 1: 1}, [0, 1])


# ---- what is damaged or gone -----------------------------------------------------------------------------------------


def test_a_corrupt_frame_is_counted_and_the_next_ones_come(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    seqs = [trainer.commit(step) for step in range(4)]
    flip_byte(trainer.frame_path(seqs[1], 0, "g0"), 100)
    steps = drained(trainer)
    assert places(steps) == [(1, step) for step in range(4)]
    assert [len(step.frames) for step in steps] == [1, 0, 1, 1]
    assert [dict(step.faults) for step in steps] == [{}, {"corrupt_frame": 1}, {}, {}]
    assert steps[1].source == {0: 1}  # it is behind us: a restart does not read it again


def test_one_ranks_corrupt_frame_leaves_the_other_ranks(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    trainer.commit_all([0])
    flip_byte(trainer.frame_path(0, 1, "alignment"), 5)
    (joined,) = drained(trainer)
    assert ([frame.rank for frame in joined.frames], joined.source) == ([0], {0: 0, 1: 0})


def test_a_damaged_commit_record_is_counted_with_the_next_step(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    seqs = [trainer.commit(step) for step in range(3)]
    trainer.frame_path(seqs[1], 0, "commit").write_bytes(b"short")
    steps = drained(trainer)
    assert places(steps) == [(1, 0), (1, 2)]
    assert sum(step.faults.get("corrupt_frame", 0) for step in steps) == 1


def test_frames_that_the_ring_removed_are_passed_over(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    trainer.commit_all(range(70))
    generator = watch_frames(trainer.run, threading.Event(), once=True)
    assert next(generator).step == 0
    Retention(trainer.run.objects, 0, 1).trim()  # all but the last six, after they were listed
    rest = list(generator)
    assert places(rest) == [(1, step) for step in range(1, 70)]
    assert [len(step.frames) for step in rest] == [0] * 63 + [1] * 6
    assert sum(step.faults.get("frame_gone", 0) for step in rest) == 63
