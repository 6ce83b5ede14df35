"""The daemon on real stores: every frame has its row, a restart changes nothing, and the controller keeps its place."""

from __future__ import annotations

import itertools
import math
import shutil
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.config import WatchOptions
from entropy_monitor.errors import WatcherRunningError
from entropy_monitor.store import (
    CommandRequest,
    MetricsReader,
    MetricsWriter,
    WatcherLock,
    acknowledge,
    issue_command,
    layout,
    open_run,
    read_cursor,
    read_heartbeat,
    read_states,
    read_status,
)
from entropy_monitor.types import Acknowledgement
from entropy_monitor.watcher import watch, window
from entropy_monitor.watcher.measure import measure_frames

from ..synthetic_trainer import SyntheticTrainer, flip_byte

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from entropy_monitor.store import Run
    from entropy_monitor.types import PhaseEvent

GATE = {"memorize_patience": 6, "compress_patience": 4, "duty": 1.0, "floor": 0.0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch on one core, as the verb sets it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StopAfter(threading.Event):
    """An event that is set after the loop has asked so many times: once at its start and once after each row."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._left = rows + 1

    def is_set(self) -> bool:
        self._left -= 1
        return self._left <= 0


def drain(run: Run, control: Any = "advise", stop: threading.Event | None = None, **options: Any) -> int:
    """Watch what is there."""
    watch_options = WatchOptions(control=control)
    return watch(run, stop or threading.Event(), watch_options, gapt=GATE, once=True, **options)


def all_rows(run: Run) -> list[dict[str, Any]]:
    """Every number of every row, by name."""
    rows = []
    for block in MetricsReader(run.objects).read_new():
        for values, scalars, source in zip(block.values, block.scalars, block.source, strict=True):
            rows.append(
                {
                    "layout": block.layout,
                    "values": values.tolist(),
                    "scalars": dict(zip(block.layout.scalars, scalars.tolist(), strict=True)),
                    "source": source.tolist(),
                }
            )
    return rows


def assert_same_rows(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Equal to the last bit, NaN to NaN."""
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert (row["layout"], row["source"]) == (wanted["layout"], wanted["source"])
        np.testing.assert_array_equal(row["values"], wanted["values"])
        for name, value in wanted["scalars"].items():
            np.testing.assert_array_equal(row["scalars"][name], value, err_msg=name)


def told(events: Sequence[PhaseEvent]) -> list[Any]:
    return [(event.event_id, event.step, event.kind, event.regime, event.score, event.evidence) for event in events]


def ordered(run: Run) -> list[Any]:
    return [(command.phase, command.weight, command.reason, command.issued_by) for command in run.commands()]


def train(trainer: SyntheticTrainer, steps: Sequence[int]) -> None:
    """Losses that stall, and an entropy that rises for a while and then falls."""
    for step in steps:
        trainer.losses[step] = 2.0 + 0.01 * math.sin(step)
        trainer.shared = 0.5 + (1.0 - step / 50 if step < 50 else (step - 50) / 25)
        trainer.commit_all([step])


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_every_frame_has_its_row_and_the_row_says_what_was_measured(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    trainer.commit_all(range(5))
    assert drain(trainer.run) == 5
    table = trainer.run.metrics()
    assert table["step"].values.tolist() == list(range(5))
    assert table["layer"].values.tolist() == ["a", "b"]
    frames = [frame for frame in trainer.run.frames() if frame.step == 3]
    for measured in measure_frames(frames).measurements:
        stored = table[measured.metric].sel(step=3, layer=measured.layer).item()
        np.testing.assert_array_equal(np.float32(stored), np.float32(measured.value))
    assert table["ce"].sel(step=3).item() == sum(frame.scalars["loss"] for frame in frames) / 2
    assert table["num_ranks"].values.tolist() == [2] * 5
    assert table["mbe"].attrs["n"] == 8
    assert set(table["phase"].values) == {"memorize"}
    assert drain(trainer.run) == 0


def test_a_live_trainer_is_watched_to_its_end(tmp_path: Path) -> None:
    trainer, numbers = SyntheticTrainer(tmp_path), []
    follower = threading.Thread(target=lambda: numbers.append(watch(trainer.run, threading.Event())))
    follower.start()
    for step in range(20):
        trainer.commit(step)
        time.sleep(0.002)
    trainer.end()
    follower.join(30)
    assert numbers == [20]
    status = read_status(trainer.run)
    assert (status.watcher_state, status.state, status.last_measured_step) == ("ended", "ended", 19)
    assert status.faults == {}
    lag = status.watcher_lag_s
    assert lag["p50"] is not None
    assert lag["p95"] is not None
    assert 0 <= lag["p50"] <= lag["p95"] < 10
    beat = read_heartbeat(trainer.run.objects, "watcher")
    assert beat is not None
    assert beat["cursor"] == {"0": 19}


def test_a_second_watcher_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    trainer.commit(0)
    with WatcherLock(trainer.run.objects), pytest.raises(WatcherRunningError):
        drain(trainer.run)
    assert read_heartbeat(trainer.run.objects, "watcher") is None
    assert drain(trainer.run) == 1


@pytest.mark.parametrize("damaged", ["g0", "tokens", "all"])
def test_a_corrupt_frame_is_an_undetermined_row_and_the_watcher_lives(tmp_path: Path, damaged: str) -> None:
    trainer = SyntheticTrainer(tmp_path)
    seqs = [trainer.commit(step) for step in range(3)]
    for seq in seqs if damaged == "all" else seqs[1:2]:
        flip_byte(trainer.frame_path(seq, 0, "g0" if damaged == "all" else damaged), 30)
    assert drain(trainer.run) == 3
    bad = [0, 1, 2] if damaged == "all" else [1]
    table = trainer.run.metrics()
    assert np.isnan(table["mbe"].values).all(axis=1).nonzero()[0].tolist() == bad
    assert np.isnan(table["ce"].values).nonzero()[0].tolist() == bad
    status = read_status(trainer.run)
    assert status.watcher_state == "ended"  # a lag that is unknown must not silence the heartbeat
    assert status.faults == {"corrupt_frame": len(bad), "undetermined_step": len(bad)}
    assert (status.watcher_lag_s["p50"] is None) == (damaged == "all")
    faults = [event for event in trainer.run.events() if event.kind == "fault"]
    assert [event.step for event in faults] == bad
    assert faults[0].evidence["reason"] == "1 x corrupt_frame"
    assert read_cursor(trainer.run.objects) == {0: 2}
    assert drain(trainer.run) == 0


def test_a_late_rank_corrects_its_rows_also_after_several_restarts(tmp_path: Path) -> None:
    late, whole = (SyntheticTrainer(tmp_path / name, world_size=2) for name in ("late", "whole"))
    for step in range(4):
        late.commit(step, rank=0)
        drain(late.run)  # a watcher of its own for each step
    for step in range(4):
        late.commit(step, rank=1)
    assert drain(late.run) == 4
    whole.commit_all(range(4))
    drain(whole.run)
    corrected, expected = late.run.metrics(), whole.run.metrics()
    for name in ("mbe", "mbe_se", "s1", "effective_rank", "alignment_activation"):
        np.testing.assert_array_equal(corrected[name].values, expected[name].values)
    assert corrected["num_ranks"].values.tolist() == [2] * 4
    assert late.run.metrics("all")["step"].values.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [row["source"] for row in all_rows(late.run)][4:] == [[step, step] for step in range(4)]
    assert read_status(late.run).last_measured_step == 3
    assert read_states(late.run.objects)["regime_num_samples"] == 4  # a correction moves no state


def test_information_is_recorded_with_its_window_and_goes_on_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of four frames of 32 tokens, here; a restart refills them from the frames that are still there."""
    monkeypatch.setattr(window, "MIN_TOKENS", 128)
    trainer, undisturbed = (SyntheticTrainer(tmp_path / name) for name in ("restarted", "undisturbed"))
    for steps in (range(6), range(6, 9)):
        trainer.commit_all(steps)
        undisturbed.commit_all(steps)
        drain(trainer.run)
    drain(undisturbed.run)
    found, expected = trainer.run.metrics(), undisturbed.run.metrics()
    assert found["num_window_tokens"].values.tolist() == [0, 0, 0] + [128] * 6
    assert found["window_first_step"].values[3:].tolist() == list(range(6))
    for name in ("mi_input_1", "mi_output_3", "run_mi_input_2", "soft_entropy"):
        determined = np.isfinite(expected[name].values)
        assert determined.any()
        assert (np.isfinite(found[name].values) == determined).all()
    for name in ("mi_input_1", "run_mi_input_1", "run_mi_input_1_se"):
        assert (found[name].attrs["unit"], found[name].attrs["n"]) == ("nats", "see num_window_tokens")


@pytest.mark.parametrize("damage", ["missing", "flipped", "another version"])
def test_without_its_states_a_restarted_watcher_goes_on_with_fresh_detectors(tmp_path: Path, damage: str) -> None:
    trainer = SyntheticTrainer(tmp_path)
    trainer.commit_all(range(4))
    drain(trainer.run)
    states = tmp_path / layout.metrics_key(0) / "states"
    if damage == "missing":
        shutil.rmtree(states)
    elif damage == "flipped":
        flip_byte(states / "c.1.0", 5)
    else:
        metadata = tmp_path / layout.metrics_key(0) / "zarr.json"
        metadata.write_text(metadata.read_text().replace('"regime_last_step"', '"another_name"'))
    trainer.commit_all(range(4, 6))
    assert drain(trainer.run) == 2  # nothing is measured twice
    assert trainer.run.metrics("all")["step"].values.tolist() == list(range(6))
    assert read_status(trainer.run).faults["states_lost"] == 1
    assert read_states(trainer.run.objects)["regime_num_samples"] == 2
    trainer.commit(6)
    drain(trainer.run)
    assert "states_lost" not in read_status(trainer.run).faults
    assert read_states(trainer.run.objects)["regime_num_samples"] == 3


def test_a_late_frame_of_an_older_model_finds_its_layers(tmp_path: Path) -> None:
    first = SyntheticTrainer(tmp_path, world_size=2, layers=("a", "b"))
    first.commit(0, rank=0)
    second = SyntheticTrainer(tmp_path, layers=("b", "c"))
    second.commit_all([0, 1])
    assert drain(second.run) == 3
    assert read_states(second.run.objects)["regime_num_samples"] == 2
    (stray,) = [segment for segment in second.run.objects.children(layout.frames_key(0)) if segment == "s000001"]
    assert stray
    first.commit(0, rank=1)
    assert drain(second.run) == 1
    assert read_states(second.run.objects)["regime_num_samples"] == 2
    second.commit(2)
    assert drain(second.run) == 1
    states = read_states(second.run.objects)
    assert (states["judge_attempt"], states["regime_num_samples"]) == (2, 3)  # the restarts lost no state
    rows = all_rows(second.run)
    assert [row["layout"].layers for row in rows] == [("a", "b"), ("b", "c"), ("b", "c"), ("a", "b"), ("b", "c")]
    assert rows[3]["source"] == [0, 0]
    assert np.isfinite(second.run.metrics(1)["mbe"].sel(layer="a").values).all()
    assert second.run.metrics()["layer"].values.tolist() == ["b", "c", "a"]


def test_an_attempt_whose_record_is_damaged_is_measured_all_the_same(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    trainer.commit_all(range(2))
    (tmp_path / "attempts" / "000001.json").write_bytes(b"{")
    assert drain(trainer.run) == 2
    assert np.isfinite(trainer.run.metrics()["mbe"].values).all()


# ---- restarts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks and two attempts whose regime and gate change, unwatched."""
    path = tmp_path_factory.mktemp("trained") / "run"
    train(SyntheticTrainer(path, world_size=2), range(95))
    train(SyntheticTrainer(path, world_size=2, layers=("a", "b", "c")), range(20))
    return path


@pytest.fixture(scope="module")
def uninterrupted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same run, watched in one go in each mode."""
    runs = {}
    for control in ("off", "advise", "auto"):
        path = tmp_path_factory.mktemp(control) / "run"
        shutil.copytree(trained, path)
        runs[control] = open_run(path)
        assert drain(runs[control], control) == 115
    return runs


def test_the_run_to_be_interrupted_is_worth_interrupting(uninterrupted: dict[str, Run]) -> None:
    regimes = set(uninterrupted["auto"].metrics("all")["regime"].values)
    assert regimes == {"undetermined", "memorizing", "compressing"}
    assert len(uninterrupted["auto"].commands()) > 4
    assert len([event for event in uninterrupted["advise"].events() if event.kind == "advice"]) > 4


@settings(max_examples=12, deadline=None)
@given(
    control=st.sampled_from(["off", "advise", "auto"]),
    lives=st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=6),
)
def test_a_restart_changes_nothing(
    trained: Path,
    uninterrupted: dict[str, Run],
    tmp_path_factory: pytest.TempPathFactory,
    control: str,
    lives: list[tuple[int, bool]],
) -> None:
    """Each life ends after so many rows, or is killed when event and command are out and the row is not."""
    path = tmp_path_factory.mktemp("again") / "run"
    shutil.copytree(trained, path)
    run = open_run(path)
    for rows, is_killed in lives:
        if is_killed:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(MetricsWriter, "append", killed_at(rows))
                drain(run, control)
                raise KeyboardInterrupt  # it had fewer rows to write than that
        else:
            drain(run, control, StopAfter(rows))
    drain(run, control)
    assert_same_rows(all_rows(run), all_rows(uninterrupted[control]))
    assert told(run.events()) == told(uninterrupted[control].events())
    assert ordered(run) == ordered(uninterrupted[control])
    assert read_cursor(run.objects) == read_cursor(uninterrupted[control].objects)


def killed_at(rows: int) -> Any:
    """`MetricsWriter.append` that never returns from its call number `rows`."""
    append, calls = MetricsWriter.append, itertools.count()

    def killed(self: MetricsWriter, *args: Any) -> None:
        if next(calls) == rows:
            raise KeyboardInterrupt
        append(self, *args)

    return killed


def test_a_stop_finishes_the_row_in_hand(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    trainer.commit_all(range(5))
    assert drain(trainer.run, stop=StopAfter(2)) == 2
    assert read_status(trainer.run).watcher_state == "ended"
    assert drain(trainer.run) == 3


# ---- regime and controller -------------------------------------------------------------------------------------------


def test_each_regime_change_is_told_once_with_its_reason(uninterrupted: dict[str, Run]) -> None:
    run = uninterrupted["off"]
    changes = [event for event in run.events() if event.kind == "regime" and event.evidence["attempt"] == 1]
    regimes = run.metrics(1)["regime"].values.tolist()
    expected = [
        (step, after)
        for step, (before, after) in enumerate(itertools.pairwise(["undetermined", *regimes]))
        if before != after
    ]
    assert [(event.step, event.regime) for event in changes] == expected
    assert {"memorizing", "compressing"} <= {event.regime for event in changes}
    for event in changes:
        assert "nats a sample" in event.evidence["reason"]
    assert run.commands() == []
    assert {event.kind for event in run.events()} == {"regime"}


def test_advise_speaks_and_never_commands(uninterrupted: dict[str, Run]) -> None:
    run = uninterrupted["advise"]
    assert run.commands() == []
    advice = [event for event in run.events() if event.kind == "advice"]
    assert [event.evidence["phase"] for event in advice[:3]] == ["compress", "memorize", "compress"]
    assert all("patience" in event.evidence["reason"] for event in advice)
    assert not [event for event in run.events() if event.kind == "transition"]


def test_auto_commands_once_for_each_transition_with_its_reason(uninterrupted: dict[str, Run]) -> None:
    run = uninterrupted["auto"]
    transitions = [event for event in run.events() if event.kind == "transition"]
    assert [(command.phase, command.reason, command.issued_by) for command in run.commands()] == [
        (event.evidence["phase"], event.evidence["reason"], f"gapt/{event.evidence['attempt']}/{event.step}")
        for event in transitions
    ]
    assert {command.weight for command in run.commands()} == {0.03}
    assert not [event for event in run.events() if event.kind == "advice"]


def stalled(trainer: SyntheticTrainer, steps: Sequence[int]) -> None:
    """Steps on which the loss stalls, so that the controller wants to compress."""
    trainer.losses.update(dict.fromkeys(range(1000), 2.0))
    trainer.commit_all(steps)


def order(run: Run, phase: Any) -> int:
    request = CommandRequest(phase=phase, reason="I know better", issued_by="cli:ada")
    return int(issue_command(run.objects, run.run_id, request).command_id)


def answer(run: Run, number: int, status: Any) -> None:
    ack = Acknowledgement(command_id=f"{number:08d}", rank=0, step=1, status=status, detail="because")
    assert acknowledge(run.objects, number, ack)


def own_commands(run: Run) -> list[str]:
    return [command.issued_by for command in run.commands() if command.issued_by.startswith("gapt/")]


def test_an_operator_silences_the_controller_until_auto(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    answer(trainer.run, order(trainer.run, "compress"), "applied")
    trainer.phase = "compress"
    stalled(trainer, range(30))
    drain(trainer.run, "auto")
    assert own_commands(trainer.run) == []
    assert {event.kind for event in trainer.run.events()} == {"advice"}
    assert read_status(trainer.run).control == "suspended"
    stalled(trainer, range(30, 60))
    drain(trainer.run, "auto")
    assert own_commands(trainer.run) == []
    answer(trainer.run, order(trainer.run, "auto"), "applied")
    stalled(trainer, range(60, 90))
    drain(trainer.run, "auto")
    assert own_commands(trainer.run)
    assert min(int(name.split("/")[2]) for name in own_commands(trainer.run)) >= 60
    assert read_status(trainer.run).control == "auto"


def test_a_trainer_that_refuses_is_advised_until_it_is_started_again(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    stalled(trainer, range(10))
    drain(trainer.run, "auto")
    (first,) = trainer.run.commands()
    answer(trainer.run, int(first.command_id), "rejected")
    stalled(trainer, range(10, 40))
    drain(trainer.run, "auto")
    assert own_commands(trainer.run) == [first.issued_by]
    assert [event for event in trainer.run.events() if event.kind == "advice"]
    again = SyntheticTrainer(tmp_path)
    stalled(again, range(10))
    drain(again.run, "auto")
    assert own_commands(again.run) == [first.issued_by, "gapt/2/6"]


def test_no_command_comes_twice_when_the_watcher_is_killed_before_its_row(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    stalled(trainer, range(10))
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(MetricsWriter, "append", killed_at(6 - read_cursor(trainer.run.objects).get(0, -1) - 1))
            drain(trainer.run, "auto")
    assert own_commands(trainer.run) == ["gapt/1/6"]
    drain(trainer.run, "auto")
    assert own_commands(trainer.run) == ["gapt/1/6"]


def test_the_gate_follows_a_phase_that_somebody_else_has_set(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    phases = []
    for step in range(6):
        trainer.phase = "memorize" if step < 3 else "compress"
        stalled(trainer, [step])
        drain(trainer.run)
        phases.append(read_states(trainer.run.objects)["gate_phase"])
    assert phases == [0, 0, 0, 1, 1, 1]
    assert trainer.run.metrics()["phase"].values.tolist() == ["memorize"] * 3 + ["compress"] * 3
