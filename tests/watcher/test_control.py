"""What the controller is told, and what it may do: feed, channel, gate, judge and row, each by itself."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from entropy_monitor.errors import ConfigError
from entropy_monitor.gapt import GatedPhaseTransition, GateOptions, GateState
from entropy_monitor.store import CommandRequest, acknowledge, issue_command, list_commands, read_heartbeat
from entropy_monitor.types import Acknowledgement, Measurement
from entropy_monitor.watcher.beat import WatcherBeat
from entropy_monitor.watcher.channel import ControlChannel
from entropy_monitor.watcher.controller import Situation, decide
from entropy_monitor.watcher.detectors.plateau import PlateauConclusion
from entropy_monitor.watcher.feed import LossFeed
from entropy_monitor.watcher.follow import JoinedStep
from entropy_monitor.watcher.judge import Judge, Known
from entropy_monitor.watcher.row import metrics_row, run_figures, step_scalars, table_layout
from entropy_monitor.watcher.trends import Trends
from entropy_monitor.watcher.window import WindowExtent

from ..synthetic_trainer import SyntheticTrainer

if TYPE_CHECKING:
    from pathlib import Path

QUICK = GateOptions(memorize_patience=3, compress_patience=2, duty=1.0)


def situation(phase: Any = "memorize", *, is_new: bool = False, may_command: bool = True) -> Situation:
    return Situation(phase=phase, is_new=is_new, may_command=may_command)


def measured(layer: str, value: float, std_error: float | None = 0.1, metric: str = "mbe_normalized") -> Measurement:
    return Measurement(
        run_id="run", step=0, layer=layer, metric=metric, value=value, unit="nats", std_error=std_error, num_samples=4
    )


# ---- the pure controller ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("may_command", "kind"), [(True, "transition"), (False, "advice")])
def test_a_transition_is_commanded_or_only_advised(may_command: bool, kind: str) -> None:
    gate = GatedPhaseTransition(QUICK)
    decisions = decide(gate, [(step, 2.0) for step in range(4)], 1.5, situation(may_command=may_command))
    assert [(decision.kind, decision.transition.step, decision.transition.phase) for decision in decisions] == [
        (kind, 3, "compress")
    ]
    assert "patience 3" in decisions[0].transition.reason


def test_the_entropy_belongs_to_the_last_step_alone() -> None:
    gate = GatedPhaseTransition(QUICK)
    assert decide(gate, [(0, 2.0), (1, 2.0)], 1.5, situation()) == []
    assert gate.state.mbe == 1.5
    decide(gate, [(2, 2.0)], math.nan, situation())
    assert gate.state.mbe == 1.5  # held


def test_advice_is_given_once() -> None:
    gate, advice = GatedPhaseTransition(QUICK), []
    for step in range(6):  # longer than the patience, shorter than compressing lasts
        advice += decide(gate, [(step, 2.0)], 1.5 * 0.9**step, situation(may_command=False))
    assert [decision.transition.phase for decision in advice] == ["compress"]


def test_the_gate_follows_what_is() -> None:
    gate = GatedPhaseTransition(QUICK)
    decide(gate, [(0, 2.0)], 1.5, situation("compress", is_new=True))
    assert gate.phase == "compress"
    decide(gate, [], 1.5, situation("memorize", is_new=True))
    assert gate.phase == "compress"  # nothing has been trained since
    decide(gate, [(1, 2.0)], 1.5, situation("memorize", is_new=True))
    assert gate.phase == "memorize"


# ---- the feed --------------------------------------------------------------------------------------------------------


def test_losses_are_averaged_and_given_once(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    feed = LossFeed(trainer.run)
    trainer.record_scalars(4, rank=0)
    trainer.record_scalars(2, rank=1)
    expected = [(step, (trainer.loss(step, 0) + trainer.loss(step, 1)) / 2) for step in range(6)]
    assert feed.take(1, -1, 4, (0, 1)) == expected[:3]
    assert feed.take(1, 2, 4, (0, 1)) == []
    trainer.record_scalars(5, rank=1)
    assert feed.take(1, 2, 4, (0, 1)) == expected[3:5]
    trainer.record_scalars(5, rank=0)
    assert feed.take(1, 4, 5, (0, 1)) == expected[5:]


def test_a_restarted_feed_begins_behind_the_last_step(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    trainer.record_scalars(9)
    assert [step for step, _ in LossFeed(trainer.run).take(1, 6, 8, (0,))] == [7, 8]


def test_a_step_whose_scalars_a_rank_has_lost_does_not_silence_the_controller(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, world_size=2)
    trainer.record_scalars(5, rank=0)
    trainer.record_scalars(1, rank=1)
    trainer._next_step[1] = 4  # steps 2 and 3 were dropped when the disk was full
    trainer.record_scalars(5, rank=1)
    steps = LossFeed(trainer.run).take(1, -1, 5, (0, 1))
    assert [step for step, _ in steps] == list(range(6))
    assert dict(steps)[2] == trainer.loss(2, 0)


def test_another_attempts_losses_are_left_out(tmp_path: Path) -> None:
    SyntheticTrainer(tmp_path).record_scalars(9)
    second = SyntheticTrainer(tmp_path)
    second.record_scalars(1)
    assert [step for step, _ in LossFeed(second.run).take(2, -1, 5, (0,))] == [0, 1]


# ---- the channel -----------------------------------------------------------------------------------------------------


def order(trainer: SyntheticTrainer, phase: Any, issued_by: str = "cli:ada") -> int:
    """Issue a command; returns its number."""
    request = CommandRequest(phase=phase, reason="why", issued_by=issued_by)
    return int(issue_command(trainer.run.objects, trainer.run.run_id, request).command_id)


def answer(trainer: SyntheticTrainer, number: int, status: Any, detail: str = "because") -> None:
    ack = Acknowledgement(command_id=f"{number:08d}", rank=0, step=1, status=status, detail=detail)
    assert acknowledge(trainer.run.objects, number, ack)


def channel_of(trainer: SyntheticTrainer) -> ControlChannel:
    channel = ControlChannel(trainer.run)
    channel.refresh()
    return channel


def test_an_operator_suspends_the_controller_until_auto(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    channel = channel_of(trainer)
    assert not channel.is_suspended
    for phase, suspended in (("compress", True), ("auto", False), ("memorize", True), ("auto", False)):
        number = order(trainer, phase)
        for _ in range(2):
            channel.refresh()
            assert channel.is_suspended is suspended  # before the answer and after
            assert channel_of(trainer).is_suspended is suspended  # a restarted watcher sees the same
            if _ == 0:
                answer(trainer, number, "applied")


def test_a_refused_order_neither_suspends_nor_frees(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    answer(trainer, order(trainer, "compress"), "rejected")
    assert not channel_of(trainer).is_suspended
    answer(trainer, order(trainer, "memorize"), "applied")
    answer(trainer, order(trainer, "auto", "cli:eve"), "rejected", "bad signature")
    assert channel_of(trainer).is_suspended


def test_an_order_that_expired_unanswered_suspends_nobody(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    request = CommandRequest(phase="compress", reason="a test", issued_by="cli:ada", expires_after_s=10.0)
    issue_command(trainer.run.objects, trainer.run.run_id, request, now=time.time() - 5.0)
    assert channel_of(trainer).is_suspended
    issue_command(trainer.run.objects, trainer.run.run_id, request, now=time.time() - 60.0)
    late = int(list_commands(trainer.run.objects)[-1].command_id)
    answer(trainer, late - 1, "expired")
    assert not channel_of(trainer).is_suspended


def test_the_controller_issues_each_command_once_also_after_a_restart(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    for channel in (channel_of(trainer), channel_of(trainer)):
        for _ in range(2):
            channel.command(1, 30, "compress", 0.05, "CE has stalled " + "x" * 400)
    (command,) = list_commands(trainer.run.objects)
    assert (command.phase, command.weight, command.issued_by) == ("compress", 0.05, "gapt/1/30")
    assert command.reason.startswith("CE has stalled")
    channel.command(1, 60, "memorize", 0.05, "why")
    channel.command(2, 30, "compress", 0.05, "why")
    assert [command.issued_by for command in list_commands(trainer.run.objects)] == [
        "gapt/1/30",
        "gapt/1/60",
        "gapt/2/30",
    ]
    assert not channel.is_suspended


def test_a_refusal_counts_in_its_attempt_alone(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    channel = channel_of(trainer)
    assert channel.refusal(1) is None
    channel.command(1, 30, "compress", 0.05, "why")
    assert channel.refusal(1) is None
    answer(trainer, 1, "rejected", "observe-only")
    assert channel.refusal(1) == channel_of(trainer).refusal(1) == "observe-only"
    assert channel.refusal(2) is None  # started again, perhaps with steer=True


def test_the_controllers_commands_carry_the_runs_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SyntheticTrainer(tmp_path)
    monkeypatch.setenv("ENTROPY_MONITOR_KEY", "secret")
    channel_of(trainer).command(1, 30, "compress", 0.05, "why")
    assert list_commands(trainer.run.objects)[0].signature is not None


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_the_mean_over_layers_leaves_out_what_is_unknown() -> None:
    figures = [measured("a", 1.0), measured("b", 3.0, None), measured("c", math.nan), measured("a", 9.0, metric="mbe")]
    assert run_figures(figures, ("a",)) == {"mbe_normalized": (1.0, 0.1, 1), "mbe": (9.0, 0.1, 1)}
    value, error, num_layers = run_figures(figures)["mbe_normalized"]
    assert (value, num_layers) == (2.0, 2)
    assert math.isnan(error)
    assert run_figures(figures, ("z",)) == {}


def test_the_mean_over_layers_is_weighted_by_tokens() -> None:
    figures = [measured("a", 1.0, 0.2), replace(measured("b", 4.0, 0.5), num_samples=12)]
    assert run_figures(figures)["mbe_normalized"] == pytest.approx(
        ((4 * 1 + 12 * 4) / 16, (4 * 0.2 + 12 * 0.5) / 16, 2)
    )


def test_a_row_holds_what_was_measured_and_nan_elsewhere() -> None:
    joined = JoinedStep(attempt=2, step=5, frames=(), source={0: 7, 1: 3}, missing_ranks=(), is_correction=False)
    figures = [measured("b", 1.5, 0.25), measured("b", 2.5, None, "s1")]
    row_scalars = step_scalars(joined, figures, run_figures(figures), WindowExtent(3, 99, 7))
    assert (row_scalars["attempt"], row_scalars["step"]) == (2, 5)
    assert (row_scalars["window_first_step"], row_scalars["num_window_tokens"]) == (3, 99)
    assert (row_scalars["run_mbe_normalized"], row_scalars["run_mbe_normalized_se"]) == (1.5, 0.25)
    assert math.isnan(row_scalars["run_mbe"])
    assert math.isnan(row_scalars["ce"])
    layout = table_layout(("a", "b"), row_scalars, {"x": 1.0}, 2)
    row = metrics_row(joined, figures, row_scalars, {"x": 1.0}, layout)
    assert (layout.states, row.states) == (("x",), {"x": 1.0})
    assert row.source == {0: 7, 1: 3}
    assert np.isnan(row.values[0]).all()
    where = {name: index for index, name in enumerate(layout.metrics)}
    assert row.values[1, where["mbe_normalized"]] == 1.5
    assert row.values[1, where["mbe_normalized_se"]] == 0.25
    assert row.values[1, where["s1"]] == 2.5
    assert np.isfinite(row.values).sum() == 3


# ---- the judge -------------------------------------------------------------------------------------------------------


def test_the_judges_state_survives_a_row(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path, total_steps=100)
    judge = Judge(trainer.run, "advise", channel_of(trainer))
    joined = JoinedStep(attempt=1, step=5, frames=(), source={0: 7}, missing_ranks=(), is_correction=False)
    row = judge.judge(joined, ()).states
    restored = Judge(trainer.run, "advise", channel_of(trainer))
    restored.resume(row)
    assert (restored.known, repr(restored.trend_state), restored.gate.state) == (
        Known(attempt=1),
        repr(judge.trend_state),
        judge.gate.state,
    )
    assert repr(restored.trends) == repr(judge.trends)
    assert restored.gate.options.memorize_patience == 4
    assert restored.last_step == 5


def test_what_is_unknown_is_left_out_of_an_events_figures(tmp_path: Path) -> None:
    """CE is NaN on the very step that brings the first MBE: nothing is known of its minimum yet."""
    trainer = SyntheticTrainer(tmp_path)
    judge = Judge(trainer.run, "advise", channel_of(trainer), {"memorize_patience": 2})
    for step in range(5):
        trainer.losses[step] = 2.0
    trainer.losses[5] = math.nan
    trainer.commit(5)
    (frame,) = trainer.run.frames()
    joined = JoinedStep(attempt=1, step=5, frames=(frame,), source={0: 0}, missing_ranks=(), is_correction=False)
    verdict = judge.judge(joined, [measured("a", 1.5), measured("b", 1.5)])
    (event,) = [event for event in verdict.events if event.kind == "advice"]
    figures = {key: value for key, value in event.evidence.items() if isinstance(value, float)}
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["ce_ema"] == 2.0
    assert "mbe_best" not in figures


def test_unknown_options_of_the_gate_are_named_before_anything_is_followed(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    with pytest.raises(ConfigError, match=r"expected \[gapt\] options.*patience.*correct monitor\.toml"):
        Judge(trainer.run, "advise", channel_of(trainer), {"patience": 3})


def test_the_gate_starts_afresh_with_an_attempt(tmp_path: Path) -> None:
    first = SyntheticTrainer(tmp_path)
    judge = Judge(first.run, "advise", channel_of(first))
    for attempt, trainer in ((1, first), (2, SyntheticTrainer(tmp_path, total_steps=1000))):
        trainer.commit(3)
        frame = next(frame for frame in trainer.run.frames() if frame.attempt == attempt)
        joined = JoinedStep(
            attempt=attempt, step=3, frames=(frame,), source={0: frame.seq}, missing_ranks=(), is_correction=False
        )
        judge.judge(joined, [measured("a", 1.5), measured("b", 1.5)])
        assert judge.gate.state.num_steps == 4
        assert judge.known.attempt == attempt
    assert judge.gate.options.memorize_patience == 40
    assert GateState().num_steps == 0


# ---- the heartbeat ---------------------------------------------------------------------------------------------------


def test_the_heartbeat_says_what_the_loop_reported(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    with WatcherBeat(trainer.run.objects, "auto") as beat:
        first = read_heartbeat(trainer.run.objects, "watcher")
        beat.reached(
            7, {0: 3, 1: 64}, Trends(regime="compressing", plateau=PlateauConclusion(True, 0.5, 0.01, 6, 4, 7))
        )
        for lag_s in (0.1, 0.2, 0.3, math.nan):
            beat.lag(lag_s)
        beat.fault({"corrupt_frame": 1})
        beat.fault({"corrupt_frame": 1, "rank_missing": 2})
        beat.control("suspended")
    last = read_heartbeat(trainer.run.objects, "watcher")
    assert first is not None
    assert last is not None
    assert (first["state"], first["control"], first["last_measured_step"]) == ("running", "auto", None)
    assert (last["state"], last["control"], last["last_measured_step"]) == ("ended", "suspended", 7)
    assert last["cursor"] == {"0": 3, "1": 64}
    assert last["lag_s"] == {"p50": 0.2, "p95": 0.29}
    assert last["faults"] == {"corrupt_frame": 2, "rank_missing": 2}
    assert last["regime"] == "compressing"


def test_a_heartbeat_that_cannot_be_written_is_counted(tmp_path: Path) -> None:
    trainer = SyntheticTrainer(tmp_path)
    with WatcherBeat(trainer.run.objects, "off") as beat:
        trainer.run.objects.delete("heartbeat/watcher.json")
        (tmp_path / "heartbeat" / "watcher.json").mkdir()
        beat._beat()
        (tmp_path / "heartbeat" / "watcher.json").rmdir()
    last = read_heartbeat(trainer.run.objects, "watcher")
    assert last is not None
    assert last["faults"] == {"heartbeat_failed": 1}
