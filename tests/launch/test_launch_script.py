"""Unmodified scripts in one process: what they compute, what they see, and what is recorded of them."""

from __future__ import annotations

import runpy
import sys
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.store import open_run, read_status

from .launching import JOBS, Ended, end, launch, launcher, start, steps

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = (sys.executable, "plain.py", "--lr", "3", "--", "-x")
MODULE = (sys.executable, "-m", "plain", "--lr", "3", "--", "-x")


@pytest.fixture(scope="module")
def plain() -> Ended:
    """The script without us."""
    return end(start(*SCRIPT))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    """The script under the launcher, twice in one run: by its path, with a `sitecustomize` of its own, then by -m."""
    directory = tmp_path_factory.mktemp("launched")
    (directory / "sitecustomize.py").write_text("MARK = 'the user\\'s own'\n")
    run = directory / "run"
    return run, [launch(run, *SCRIPT, paths=(directory,)), launch(run, *MODULE, options=("--steer",))]


def test_training_is_as_without_us(plain: Ended, launched: tuple[Path, list[Ended]]) -> None:
    for ended in launched[1]:
        assert ended.code == 0, ended.err
        assert ended.report["losses"] == plain.report["losses"]


def test_a_second_start_is_a_second_attempt_and_all_frames_are_there(launched: tuple[Path, list[Ended]]) -> None:
    run, _ = launched
    # Two steps show what trains; after the last step nothing is lost.
    assert steps(run) == [(attempt, step) for attempt in (1, 2) for step in (2, 4, 6, 8, 10)]
    opened = open_run(run)
    assert [attempt["options"]["start_step"] for attempt in opened.attempts()] == [2, 2]
    assert [attempt["options"]["steer"] for attempt in opened.attempts()] == [False, True]
    assert opened.scalars(attempt=2)["loss"].notnull().all()
    frame = next(opened.frames())
    assert frame.groups[0][0] == ("blocks.0", "blocks.1", "blocks.2")
    assert frame.groups[0][2] is not None, "gradients"
    status = read_status(opened)
    assert status.state == "ended"
    assert status.faults == {}


def test_losses_are_those_of_the_steps_they_stand_beside(launched: tuple[Path, list[Ended]]) -> None:
    run, (ended, _) = launched
    scalars = open_run(run).scalars(attempt=1)
    for step in scalars["step"].values:
        assert scalars["loss"].sel(step=step).item() == pytest.approx(ended.report["losses"][step], rel=1e-6)


def test_a_script_sees_the_python_it_expects(plain: Ended, launched: tuple[Path, list[Ended]]) -> None:
    by_path, by_module = (ended.report for ended in launched[1])
    assert by_path["chained"] == "the user's own"
    assert by_module["chained"] == plain.report["chained"]
    for report in (by_path, by_module):
        assert report["path"] == []
        assert report["arguments"] == ["--lr", "3", "--", "-x"]


def test_processes_that_never_train_load_nothing_of_ours(launched: tuple[Path, list[Ended]]) -> None:
    for ended in launched[1]:
        assert ended.report["loaded"] == [0, 0, 0, 0], "workers of a DataLoader"


def test_what_was_chosen_is_said_on_request(launched: tuple[Path, list[Ended]]) -> None:
    assert "observing Net with AdamW" in launched[1][0].err


def test_nothing_of_the_launch_is_left(launched: tuple[Path, list[Ended]], runtime: Path) -> None:
    assert list(runtime.iterdir()) == [], "sockets and launch directories"


def test_of_two_models_the_larger_one_is_observed(run: Path) -> None:
    alone, beside = runpy.run_path(str(JOBS / "gan.py")), launch(run, sys.executable, "gan.py")
    assert beside.code == 0, beside.err
    assert beside.report["losses"] == alone["losses"]
    assert "observing Net with RMSprop; not observed: Sequential, Adam" in beside.err
    (attempt,) = open_run(run).attempts()
    assert attempt["model"] == "Net"
    assert steps(run) == [(1, step) for step in (2, 4, 6)], "the generator's own steps"


def test_models_one_after_another_are_freed_and_the_first_is_observed(run: Path) -> None:
    alone, beside = end(start(sys.executable, "sequel.py")), launch(run, sys.executable, "sequel.py")
    assert beside.code == 0, beside.err
    assert beside.report == alone.report
    assert beside.report["alive"] == [0, 0, 0]
    assert steps(run) == [(1, 2), (1, 4)]
    assert read_status(open_run(run)).state == "ended"


def test_a_model_is_saved_copied_scripted_and_sent_as_without_us(run: Path) -> None:
    alone, beside = end(start(sys.executable, "exports.py")), launch(run, sys.executable, "exports.py")
    assert beside.code == 0, beside.err
    assert beside.report == alone.report, "the same file, too"
    assert all(beside.report["same"].values())
    assert steps(run) == [(1, 2), (1, 4)]


def test_a_script_that_attaches_by_itself_is_left_alone(run: Path, tmp_path: Path) -> None:
    ended = launch(run, sys.executable, "own_attach.py", tmp_path / "own")
    assert ended.code == 0, ended.err
    assert ended.report == {"attempt": 1, "step": 6, "run": str(tmp_path / "own")}
    assert steps(tmp_path / "own") == [(1, 0), (1, 2), (1, 4)]
    assert not run.exists()


def test_a_run_that_cannot_be_written_costs_the_job_nothing(plain: Ended, run: Path) -> None:
    run.write_text("a file")
    ended = launch(run, *SCRIPT)
    assert ended.code == 0
    assert ended.report["losses"] == plain.report["losses"]
    (line,) = [line for line in ended.err.splitlines() if "store_unavailable" in line]
    assert "training goes on" in line


def test_switched_off_nothing_is_installed(plain: Ended, run: Path) -> None:
    process = start(*launcher(run), *SCRIPT, ENTROPY_MONITOR_MODE="disabled")
    ended = end(process)
    assert ended.code == 0
    assert ended.report["losses"] == plain.report["losses"]
    assert ended.err == plain.err
    assert not run.exists()
