"""What a writer does when the store takes nothing more: it raises, nothing is visible, and later it goes on.

A file-size limit stands in for a full disk: it makes the kernel refuse writes in the same place, on any machine.
"""

from __future__ import annotations

import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

from entropy_monitor.errors import StoreError
from entropy_monitor.store import (
    CommandRequest,
    EventLog,
    FrameReader,
    FrameWriter,
    MetricsLayout,
    MetricsReader,
    MetricsRow,
    MetricsWriter,
    ScalarsReader,
    ScalarsWriter,
    create_run,
    issue_command,
    list_commands,
    write_heartbeat,
)
from entropy_monitor.store.layout import frames_key
from entropy_monitor.types import PhaseEvent

from ..synthetic_trainer import frame_data, frame_layout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond that; what is open already is safe."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))  # Python ignores the signal that goes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 50, 100, 1000])
def test_a_frame_that_does_not_fit_is_invisible_and_the_next_one_is_fine(tmp_path: Path, limit: int) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    writer = FrameWriter(run.objects, 0, 1)
    first = writer.write(layout, frame_data(layout, 0))
    with files_limited_to(limit):
        for step in (1, 2):
            with pytest.raises(StoreError):
                writer.write(layout, frame_data(layout, step))
    assert [frame.step for frame in run.frames()] == [0]
    later = [writer.write(layout, frame_data(layout, step)) for step in (3, 4)]
    assert [frame.step for frame in run.frames()] == [0, 3, 4]
    assert first < later[0] < later[1]
    assert writer.claimed == [0]


@pytest.mark.parametrize("what", ["group", "array"])
def test_a_segment_that_cannot_be_made_is_made_later(tmp_path: Path, what: str) -> None:
    """A claim that failed half-way does not make the writer take itself for its own successor."""
    run, layout, wider = create_run(tmp_path), frame_layout(), frame_layout(num_features=7)
    writer = FrameWriter(run.objects, 0, 1)
    writer.write(layout, frame_data(layout, 0))
    segment = tmp_path / frames_key(0, 0)
    group_size, array_size = (segment / name / "zarr.json" for name in ("", "g0"))
    limit = {"group": 10, "array": group_size.stat().st_size + 20}[what]
    assert limit < array_size.stat().st_size
    with files_limited_to(limit):
        for _ in range(2):
            with pytest.raises(StoreError):
                writer.write(wider, frame_data(wider, 1))
    assert [frame.step for frame in run.frames()] == [0]
    writer.write(wider, frame_data(wider, 2))
    writer.write(layout, frame_data(layout, 3))
    assert [frame.step for frame in run.frames()] == [0, 2, 3]
    assert len(writer.claimed) == {"group": 3, "array": 5}[what]


def test_a_commit_record_that_cannot_be_written_leaves_no_frame(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    layout = frame_layout(("a",), num_tokens=8, num_features=1, aligned=(), token_window=0, gradients=False)
    writer = FrameWriter(run.objects, 0, 1)
    writer.write(layout, frame_data(layout, 0))
    shard = next((tmp_path / frames_key(0, 0) / "g0").glob("c.0.*"))
    assert shard.stat().st_size < 80 < 88  # the data fit, the record does not
    with files_limited_to(80), pytest.raises(StoreError):
        writer.write(layout, frame_data(layout, 1))
    assert next((tmp_path / frames_key(0, 0) / "g0").glob("c.1.*")).exists()
    reader = FrameReader(run.objects, run.run_id, 0)
    assert list(reader.seqs()) == [0]
    assert reader.read(1) is None
    writer.write(layout, frame_data(layout, 2))
    assert [frame.step for frame in run.frames()] == [0, 2]


def test_scalars_that_do_not_fit_are_kept_for_the_next_flush(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    writer = ScalarsWriter(run.objects, 0, 1)
    for step in range(3):
        writer.append({"step": step, "loss": step})
    for limit in (10, 1000):  # the group does not fit; the group fits, the array's chunk does not
        with files_limited_to(limit), pytest.raises(StoreError):
            writer.flush()
    writer.append({"step": 3, "loss": 3})
    writer.flush()
    assert run.scalars()["loss"].values.tolist() == [0, 1, 2, 3]
    with files_limited_to(1000), pytest.raises(StoreError):
        writer.append({"step": 4, "loss": 4})
        writer.flush()
    writer.flush()
    assert run.scalars()["step"].values.tolist() == [0, 1, 2, 3, 4]
    assert [len(rows) for _, rows in ScalarsReader(run.objects, 0).read_new()] == [5]


def test_a_metrics_row_that_does_not_fit_does_not_exist(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    layout = MetricsLayout(layers=("a",), metrics=("mbe",) * 8, scalars=("attempt", "step"), num_ranks=1)

    def row(step: int) -> MetricsRow:
        values = np.full((1, 8), step, np.float32)
        return MetricsRow(values=values, scalars={"attempt": 1, "step": step}, source={0: step})

    writer = MetricsWriter(run.objects)
    for limit in (10, 1000):
        with files_limited_to(limit), pytest.raises(StoreError):
            writer.append(layout, row(0))
    assert writer.cursor == {}
    for step in range(3):
        writer.append(layout, row(step))
    for limit in (10, 600, 1050):
        with files_limited_to(limit), pytest.raises(StoreError):
            writer.append(layout, row(3))
        assert writer.cursor == {0: 2}
        assert sum(len(block.scalars) for block in MetricsReader(run.objects).read_new()) == 3
    writer.append(layout, row(3))
    (block,) = MetricsReader(run.objects).read_new()
    assert block.values[:, 0, 0].tolist() == block.source[:, 0].tolist() == [0, 1, 2, 3]


def test_commands_events_and_heartbeats_fail_whole(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    request = CommandRequest(phase="compress", reason="why", issued_by="test")
    event = PhaseEvent(
        event_id="e", step=1, layer=None, kind="regime", regime="memorizing", score=0.0, evidence={"reason": "why"}
    )
    log = EventLog(run.objects)
    write_heartbeat(run.objects, "watcher", {"state": "running"})
    beat = run.objects.get_json("heartbeat/watcher.json")
    with files_limited_to(10):
        with pytest.raises(StoreError):
            issue_command(run.objects, run.run_id, request)
        with pytest.raises(StoreError):
            log.append(event)
        with pytest.raises(StoreError):
            write_heartbeat(run.objects, "watcher", {"state": "ended"})
    assert list_commands(run.objects) == []
    assert run.events() == []
    assert run.objects.get_json("heartbeat/watcher.json") == beat
    assert issue_command(run.objects, run.run_id, request).command_id == "00000001"
    assert log.append(event)
    assert run.events() == [event]
