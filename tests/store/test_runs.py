"""Opening runs, attempts, events, heartbeats, and what a wrong place is called."""

from __future__ import annotations

import json
import math
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from entropy_monitor.errors import CorruptRunError, NotARunError, RunNotFoundError, StoreError
from entropy_monitor.store import (
    DEAD_AFTER_S,
    STALE_AFTER_S,
    EventLog,
    Objects,
    Run,
    claim_attempt,
    create_run,
    event_id,
    find_attempt,
    list_attempts,
    liveness,
    open_run,
    read_attempt,
    read_heartbeat,
    read_status,
    read_trainer_heartbeats,
    write_heartbeat,
)
from entropy_monitor.types import PhaseEvent

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


# ---- opening ---------------------------------------------------------------------------------------------------------


def a_directory(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("hello")


def a_file(path: Path) -> None:
    path.write_text("hello")


def a_zarr_store_of_others(path: Path) -> None:
    (path / "store.zarr").mkdir(parents=True)
    (path / "store.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')


def damaged(content: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        create_run(path)
        (path / "store.zarr" / "zarr.json").write_bytes(content)

    return make


def of_a_newer_format(path: Path) -> None:
    create_run(path)
    file = path / "store.zarr" / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["attributes"]["format"] = 99
    file.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("make", "kind", "found", "remedy"),
    [
        (lambda path: None, RunNotFoundError, "found nothing", "check the path, or start the trainer"),
        (a_directory, NotARunError, "found none", "this is no run directory"),
        (a_file, NotARunError, "", "no"),
        (a_zarr_store_of_others, CorruptRunError, "bytes that cannot be read", "restore the file"),
        (damaged(b""), CorruptRunError, "0 bytes that cannot be read", "restore the file"),
        (damaged(b'{"attributes": {"run_id": "ab'), CorruptRunError, "29 bytes that cannot be read", "restore"),
        (damaged(b"\xff\xfe\x00"), CorruptRunError, "3 bytes", "restore the file"),
        (damaged(b"[]"), CorruptRunError, "2 bytes", "restore the file"),
        (damaged(b'{"attributes": null}'), CorruptRunError, "20 bytes", "restore the file"),
        (damaged(b"[" * 200_000), CorruptRunError, "200000 bytes", "restore the file"),
        (of_a_newer_format, CorruptRunError, "found 99", "use the version of entropy-monitor that wrote it"),
    ],
)
def test_what_is_no_readable_run_is_named_in_one_line(
    tmp_path: Path, make: Callable[[Path], None], kind: type[Exception], found: str, remedy: str
) -> None:
    place = tmp_path / "place"
    make(place)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind) as caught:
        open_run(place)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.startswith("expected ")
    assert "\n" not in message
    assert str(place) in message
    assert found in message
    assert remedy in message
    assert sorted(tmp_path.rglob("*")) == before  # looking creates nothing


def test_the_errors_are_what_python_would_raise_as_well() -> None:
    assert issubclass(RunNotFoundError, FileNotFoundError)
    assert issubclass(NotARunError, ValueError)
    assert issubclass(StoreError, OSError)


def test_a_run_is_created_once_however_many_ranks_try(tmp_path: Path) -> None:
    runs: list[Run] = []
    barrier = threading.Barrier(8)

    def create() -> None:
        barrier.wait()
        runs.append(create_run(tmp_path / "run"))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run.run_id for run in runs}) == 1
    assert open_run(tmp_path / "run").run_id == runs[0].run_id
    assert abs(runs[0].created - time.time()) < 60


def test_a_run_cannot_be_created_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotARunError, match="found a file: name another place"):
        create_run(tmp_path / "file")
    with pytest.raises(StoreError, match="expected a usable store"):
        create_run(tmp_path / "file" / "below")


# ---- objects ---------------------------------------------------------------------------------------------------------


def test_objects_are_created_once_and_replaced_whole(tmp_path: Path) -> None:
    objects = Objects(tmp_path)
    assert objects.create("a/b", b"1")
    assert not objects.create("a/b", b"2")
    assert objects.get("a/b") == b"1"
    objects.put("a/b", b"3")
    assert objects.get("a/b") == b"3"
    assert objects.exists("a/b")
    assert objects.get("a") is None
    objects.delete("a/b")
    objects.delete("a/b")
    assert not objects.exists("a/b")
    assert objects.get_json("a/b") is None
    assert objects.create("a/b", b"")
    assert objects.get("a/b") == b""


def test_leftovers_of_interrupted_writes_are_not_listed_and_do_not_block(tmp_path: Path) -> None:
    objects = Objects(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.__lock").write_bytes(b"half")
    assert objects.children("a") == []
    assert objects.children("nowhere") == []
    assert objects.create("a/b", b"whole")
    assert objects.children("a") == ["b"]
    objects.delete_tree("a")
    assert not (tmp_path / "a").exists()
    objects.delete_tree("a")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"7", b"\xff", b"[" * 200_000])
def test_json_that_is_no_object_reads_as_none(tmp_path: Path, content: bytes) -> None:
    objects = Objects(tmp_path)
    objects.put("a.json", content)
    assert objects.get_json("a.json") is None


def test_json_has_no_nan_and_an_undetermined_number_becomes_null(tmp_path: Path) -> None:
    objects = Objects(tmp_path)
    objects.put_json("a.json", {"x": float("nan"), "y": [float("inf"), 1.5], "z": {"w": (float("-inf"),)}})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "x": None,
        "y": [None, 1.5],
        "z": {"w": [None]},
    }


def test_an_event_with_an_undetermined_score_comes_back_as_one(tmp_path: Path) -> None:
    event = PhaseEvent(
        event_id="e", step=1, layer=None, kind="fault", regime="undetermined", score=float("nan"), evidence={}
    )
    objects = Objects(tmp_path)
    assert EventLog(objects).append(event)
    assert math.isnan(EventLog(objects).read_new()[0].score)


# ---- attempts --------------------------------------------------------------------------------------------------------


def test_attempts_are_numbered_from_one_without_repetition(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    numbers: list[int] = []
    barrier = threading.Barrier(6)

    def claim(index: int) -> None:
        barrier.wait()
        numbers.append(claim_attempt(run.objects, {"launch_id": f"launch {index}"}))

    threads = [threading.Thread(target=claim, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list_attempts(run.objects) == list(range(1, 7))
    for index in range(6):
        found = find_attempt(run.objects, f"launch {index}")
        assert found is not None
        assert read_attempt(run.objects, found["attempt"]) == found
    assert find_attempt(run.objects, "launch 7") is None
    assert [record["attempt"] for record in run.attempts()] == list(range(1, 7))


def test_of_two_attempts_of_one_launch_the_newer_is_found(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    for _ in range(2):
        claim_attempt(run.objects, {"launch_id": "storm:1"})
    found = find_attempt(run.objects, "storm:1")
    assert found is not None
    assert found["attempt"] == 2


def test_a_damaged_attempt_is_empty_and_hides_no_other(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    claim_attempt(run.objects, {"launch_id": "a"})
    claim_attempt(run.objects, {"launch_id": "b"})
    (tmp_path / "attempts" / "000002.json").write_bytes(b"{")
    assert read_attempt(run.objects, 2) == {}
    assert find_attempt(run.objects, "a") is not None
    assert claim_attempt(run.objects, {}) == 3


# ---- events ----------------------------------------------------------------------------------------------------------


def event(step: int, kind: str = "regime", **changes: Any) -> PhaseEvent:
    fields = {"layer": None, "regime": "memorizing", "score": 0.5, "evidence": {"reason": "why", "n": 3}}
    return PhaseEvent(event_id=event_id(1, step, kind), step=step, kind=kind, **{**fields, **changes})


def test_an_event_is_told_once_also_by_a_restarted_watcher(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    first, reader = EventLog(run.objects), EventLog(run.objects)
    assert first.append(event(1))
    assert not first.append(event(1, score=9.0))
    assert reader.read_new() == [event(1)]
    restarted = EventLog(run.objects)
    assert not restarted.append(event(1))
    assert restarted.append(event(1, "transition"))
    assert restarted.append(event(2))
    assert not first.append(event(2))  # two logs at once
    assert reader.read_new() == [event(1, "transition"), event(2)]
    assert reader.read_new() == []
    assert run.events() == [event(1), event(1, "transition"), event(2)]


def test_event_ids_differ_by_attempt_step_and_kind() -> None:
    ids = {event_id(a, s, k) for a in (1, 2, 11) for s in (1, 11, 111) for k in ("regime", "fault")}
    assert len(ids) == 18


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b'{"event_id": "x"}', b'{"more": 1}'])
def test_a_damaged_or_missing_event_hides_none_behind_it(tmp_path: Path, content: bytes | None) -> None:
    run = create_run(tmp_path)
    log = EventLog(run.objects)
    for step in range(3):
        log.append(event(step))
    file = tmp_path / "events" / "00000002.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert run.events() == [event(0), event(2)]
    restarted = EventLog(run.objects)
    assert restarted.append(event(3))
    assert restarted.append(event(1))
    assert run.events()[-2:] == [event(3), event(1)]


# ---- heartbeats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age_s", "expected"),
    [
        (-100.0, "live"),
        (0.0, "live"),
        (STALE_AFTER_S, "live"),
        (STALE_AFTER_S + 0.01, "stale"),
        (DEAD_AFTER_S, "stale"),
        (DEAD_AFTER_S + 0.01, "dead"),
    ],
)
def test_liveness_is_a_matter_of_age(age_s: float, expected: str) -> None:
    assert liveness({"written_at": 1000.0}, 1000.0 + age_s) == expected
    assert liveness({"written_at": 1000.0, "state": "ended"}, 1000.0 + age_s) == "ended"


def test_no_heartbeat_is_dead() -> None:
    assert liveness(None, 0.0) == "dead"
    assert liveness({}, 1e9) == "dead"


def test_heartbeats_are_kept_apart_and_damaged_ones_count_as_none(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    claim_attempt(run.objects, {"world_size": 2})
    for rank in range(2):
        write_heartbeat(run.objects, f"r{rank:05d}", {"attempt": 1, "frames_committed": 3, "faults": {"ring_full": 2}})
    write_heartbeat(run.objects, "watcher", {"regime": "compressing", "faults": {"corrupt_frame": 1}})
    status = read_status(run)
    assert (status.state, status.watcher_state, status.ranks) == ("live", "live", [0, 1])
    assert (status.frames_committed, status.regime) == (6, "compressing")
    assert status.faults == {"corrupt_frame": 1, "ring_full": 4}
    (tmp_path / "heartbeat" / "r00001.json").write_bytes(b"{")
    assert set(read_trainer_heartbeats(run.objects)) == {0}
    assert read_heartbeat(run.objects, "r00001") is None
    assert read_status(run).ranks == [0]
    claim_attempt(run.objects, {"world_size": 2})
    assert (read_status(run).state, read_status(run).ranks) == ("dead", [])  # those were of the attempt before


def test_a_url_of_an_unknown_kind_is_refused_in_one_line() -> None:
    with pytest.raises(StoreError, match="found foo://somewhere") as caught:
        open_run("foo://somewhere")
    assert "\n" not in str(caught.value)
