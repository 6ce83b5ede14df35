"""The ring: bounded disk, and every removed frame counted once."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from entropy_monitor.errors import StoreError
from entropy_monitor.store import (
    FrameWriter,
    MetricsLayout,
    MetricsRow,
    MetricsWriter,
    Retention,
    create_run,
    list_commits,
    list_segments,
    read_status,
    trim_vanished_ranks,
)
from entropy_monitor.store.layout import frames_key, metrics_key, retention_key

from ..synthetic_trainer import flip_byte, frame_data, frame_layout

if TYPE_CHECKING:
    from pathlib import Path

    from entropy_monitor.store import Run

LAYOUT = frame_layout(("a",), aligned=(), token_window=0, gradients=False, num_tokens=8, num_features=2)


def write_frames(run: Run, count: int, *, rank: int = 0, attempt: int = 1) -> list[int]:
    """Frames of one writer incarnation, without a ring."""
    writer = FrameWriter(run.objects, rank, attempt)
    return [writer.write(LAYOUT, frame_data(LAYOUT, step, attempt=attempt)) for step in range(count)]


def measure_through(run: Run, seq: int, rank: int = 0) -> None:
    """A metrics row whose cursor stands at `seq`."""
    layout = MetricsLayout(layers=("a",), metrics=("mbe",), scalars=("attempt", "step"), num_ranks=rank + 1)
    row = MetricsRow(values=np.zeros((1, 1), np.float32), scalars={"attempt": 1, "step": seq}, source={rank: seq})
    MetricsWriter(run.objects).append(layout, row)


def frames_on_disk(run: Run, rank: int = 0) -> int:
    return sum(len(list_commits(run.objects, rank, segment)) for segment in list_segments(run.objects, rank))


@pytest.mark.parametrize("keep", [1, 64, 65, 100])
@pytest.mark.parametrize("lengths", [(300,), (10,) * 30, (1,) * 70, (63, 64, 65, 1, 128)])
def test_the_ring_keeps_at_least_keep_and_at_most_64_more(tmp_path: Path, keep: int, lengths: tuple[int, ...]) -> None:
    run, total = create_run(tmp_path), 0
    for attempt, length in enumerate(lengths, 1):  # a trainer that is killed and started again and again
        writer, retention = FrameWriter(run.objects, 0, attempt), None
        for step in range(length):
            seq = writer.write(LAYOUT, frame_data(LAYOUT, step, attempt=attempt))
            retention = retention or Retention(run.objects, 0, keep)  # as the hooks make it: after the first commit
            retention.committed(seq)
            total += 1
            present = frames_on_disk(run)
            assert min(keep, total) <= present < keep + 64
            assert present + retention.removed == total
    record = run.objects.get_json(retention_key(0)) or {"frames_removed": 0, "frames_removed_unmeasured": 0}
    assert record["frames_removed"] == record["frames_removed_unmeasured"] == total - frames_on_disk(run)
    assert read_status(run).frames_removed_unmeasured == record["frames_removed_unmeasured"]


@pytest.mark.parametrize(("measured_through", "unmeasured"), [(-1, 128), (0, 127), (63, 64), (70, 57), (130, 0)])
def test_what_was_measured_is_not_counted_as_lost(tmp_path: Path, measured_through: int, unmeasured: int) -> None:
    run = create_run(tmp_path)
    seqs = write_frames(run, 140)
    if measured_through >= 0:
        measure_through(run, measured_through)
    retention = Retention(run.objects, 0, 1)
    retention.trim()
    assert (retention.removed, retention.removed_unmeasured) == (128, unmeasured)
    assert list_segments(run.objects, 0) == [2]
    assert frames_on_disk(run) == len(seqs) - 128


def test_another_ranks_cursor_does_not_count(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    write_frames(run, 70, rank=1)
    measure_through(run, 1000, rank=0)
    retention = Retention(run.objects, 1, 1)
    retention.trim()
    assert retention.removed_unmeasured == 64


@pytest.mark.parametrize("left", ["everything", "half of the commits", "no commits", "a lock file", "an empty folder"])
def test_a_kill_in_the_middle_of_a_removal_neither_loses_nor_repeats_a_count(tmp_path: Path, left: str) -> None:
    """The record is written first, so a kill leaves it and some of the files; the next writer clears them."""
    run = create_run(tmp_path)
    write_frames(run, 130)
    segment, saved = tmp_path / frames_key(0, 0), tmp_path / "saved"
    shutil.copytree(segment, saved)
    Retention(run.objects, 0, 66).trim()
    assert list_segments(run.objects, 0) == [1, 2]
    record = run.objects.get_json(retention_key(0))
    shutil.copytree(saved, segment)
    if left == "half of the commits":
        for slot in range(32):
            (segment / "commit" / f"c.{slot}.0").unlink()
    elif left != "everything":
        shutil.rmtree(segment / "commit")
        if left != "no commits":
            shutil.rmtree(segment)
            segment.mkdir()
        if left == "a lock file":
            (segment / "c.0.0.__lock").touch()
    retention = Retention(run.objects, 0, 66)
    assert not segment.exists()
    assert run.objects.get_json(retention_key(0)) == record
    assert (retention.removed, retention.removed_unmeasured) == (64, 64)
    assert frames_on_disk(run) == 66


def test_a_removal_that_fails_is_counted_once_and_tried_again(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    write_frames(run, 65)
    retention = Retention(run.objects, 0, 1)
    blocker = tmp_path / "retention"
    blocker.write_text("")  # a file where the record's directory would be
    with pytest.raises(StoreError):
        retention.trim()
    assert (retention.removed, frames_on_disk(run)) == (0, 65)
    blocker.unlink()
    retention.trim()
    assert (retention.removed, frames_on_disk(run)) == (64, 1)


def test_a_damaged_metrics_table_does_not_unbound_the_disk(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    write_frames(run, 65)
    measure_through(run, 63)
    flip_byte(tmp_path / metrics_key(0) / "source" / "c.0.0", 3)
    retention = Retention(run.objects, 0, 1)
    retention.trim()
    assert frames_on_disk(run) == 1
    assert retention.removed_unmeasured == 64  # nobody can prove the contrary


def test_vanished_ranks_are_trimmed_and_living_ones_are_left_to_themselves(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    for rank in range(4):
        write_frames(run, 70, rank=rank)
    trim_vanished_ranks(run.objects, world_size=2, keep=1)
    assert [frames_on_disk(run, rank) for rank in range(4)] == [70, 70, 6, 6]
    assert read_status(run).frames_removed_unmeasured == 128
