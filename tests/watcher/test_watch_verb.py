"""``entropy-monitor watch`` as a user's process: signals, exit codes, waiting."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.store import WatcherLock, list_commits, read_cursor, read_heartbeat, read_status

from ..synthetic_trainer import SyntheticTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEADLINE_S = 60.0


class Verbs:
    """Starts verbs, and leaves none behind."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start ``entropy-monitor ARGUMENTS`` in an empty directory."""
        process = subprocess.Popen(
            [sys.executable, "-m", "entropy_monitor", *map(str, arguments)],
            cwd=self._directory,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit code, and what it said on stderr."""
        _, words = process.communicate(timeout=DEADLINE_S)
        return process.returncode, words

    def run(self, *arguments: str | Path) -> tuple[int, str]:
        """Start and finish."""
        return self.finish(self.start(*arguments))

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.fixture
def verbs(tmp_path: Path) -> Iterator[Verbs]:
    """Verbs that run in a directory of their own."""
    directory = tmp_path / "cwd"
    directory.mkdir()
    started = Verbs(directory)
    yield started
    started.close()


def wait_until(condition: Callable[[], bool], *, alive: subprocess.Popen[str] | None = None) -> None:
    """Look again and again; fail when the time is up, or when a process that should live has ended."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        assert alive is None or alive.poll() is None, "the process has ended"
        time.sleep(0.02)


def measured(trainer: SyntheticTrainer) -> int:
    """The newest measured frame of rank 0."""
    return read_cursor(trainer.run.objects).get(0, -1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_frame_and_the_exit_is_clean(
    tmp_path: Path, verbs: Verbs, number: signal.Signals
) -> None:
    trainer = SyntheticTrainer(tmp_path / "run")
    process = verbs.start("watch", tmp_path / "run")
    trainer.commit_all(range(30))
    wait_until(lambda: measured(trainer) >= 5, alive=process)
    process.send_signal(number)
    assert verbs.finish(process) == (0, "")
    rows = trainer.run.metrics()["step"].values.tolist()
    assert rows == list(range(len(rows)))
    assert measured(trainer) == len(rows) - 1
    assert read_status(trainer.run).watcher_state == "ended"
    with WatcherLock(trainer.run.objects):
        pass


def test_it_ends_by_itself_when_the_run_has(tmp_path: Path, verbs: Verbs) -> None:
    trainer = SyntheticTrainer(tmp_path / "run")
    process = verbs.start("watch", tmp_path / "run")
    trainer.commit_all(range(3))
    wait_until(lambda: measured(trainer) == 2, alive=process)
    trainer.commit_all(range(3, 6))
    trainer.end()
    assert verbs.finish(process) == (0, "")
    assert measured(trainer) == 5


def test_a_second_watcher_exits_naming_the_first(tmp_path: Path, verbs: Verbs) -> None:
    trainer = SyntheticTrainer(tmp_path / "run")
    first = verbs.start("watch", tmp_path / "run")
    wait_until(lambda: read_heartbeat(trainer.run.objects, "watcher") is not None, alive=first)
    code, words = verbs.run("watch", tmp_path / "run")
    assert code == 1
    assert words.count("\n") == 1
    assert words.startswith("error: expected no other watcher of this run; found one")
    holder = json.loads(re.findall(r"\{.*\}", words)[0])
    assert holder == {"pid": first.pid, "host": socket.gethostname()}
    first.kill()  # the kernel frees the lock
    first.wait(DEADLINE_S)
    trainer.commit(0)
    trainer.end()
    assert verbs.run("watch", tmp_path / "run") == (0, "")
    assert measured(trainer) == 0


def test_a_run_that_does_not_exist_yet_is_waited_for(tmp_path: Path, verbs: Verbs) -> None:
    process = verbs.start("-v", "watch", tmp_path / "run")
    assert process.stderr is not None
    assert "waiting: expected a run at" in process.stderr.readline()
    (tmp_path / "run").mkdir()  # an empty directory is no run yet either
    trainer = SyntheticTrainer(tmp_path / "run")
    trainer.commit_all(range(2))
    trainer.end()
    code, words = verbs.finish(process)
    assert code == 0
    assert "2 steps measured" in words


def test_waiting_for_a_run_can_be_stopped(tmp_path: Path, verbs: Verbs) -> None:
    process = verbs.start("-v", "watch", tmp_path / "run")
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert verbs.finish(process)[0] == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["nothing", "a directory", "a file"])
def test_once_on_no_run_exits_3(tmp_path: Path, verbs: Verbs, place: str) -> None:
    path = tmp_path / "place"
    if place == "a directory":
        path.mkdir()
    elif place == "a file":
        path.write_text("")
    code, words = verbs.run("watch", path, "--once")
    assert code == 3
    assert words.count("\n") == 1
    assert words.startswith("error: expected ")
    assert str(path) in words


def test_once_measures_what_is_there_beside_a_live_trainer(tmp_path: Path, verbs: Verbs) -> None:
    trainer = SyntheticTrainer(tmp_path / "run", world_size=2)
    trainer.commit_all(range(3))
    trainer.commit(3, rank=0)
    began = time.monotonic()
    code, words = verbs.run("watch", tmp_path / "run", "--once")
    assert time.monotonic() - began < DEADLINE_S
    assert (code, measured(trainer)) == (0, 3)
    assert "step 3 of attempt 1 is measured without rank 1" in words


def test_once_waits_until_the_holder_has_passed_what_is_there(tmp_path: Path, verbs: Verbs) -> None:
    trainer = SyntheticTrainer(tmp_path / "run")
    trainer.commit_all(range(3))
    with WatcherLock(trainer.run.objects):
        process = verbs.start("watch", tmp_path / "run", "--once")
        time.sleep(0.4)
        assert process.poll() is None
    # The holder has gone without measuring: --once does it.
    assert verbs.finish(process) == (0, "")
    assert measured(trainer) == 2
    holder = verbs.start("watch", tmp_path / "run")
    wait_until(lambda: _held(trainer), alive=holder)
    seqs = [trainer.commit(step) for step in range(3, 6)]
    assert verbs.run("watch", tmp_path / "run", "--once") == (0, "")
    assert measured(trainer) >= seqs[-1] == list_commits(trainer.run.objects, 0, 0)[-1]
    assert holder.poll() is None
    trainer.end()
    assert verbs.finish(holder) == (0, "")


def _held(trainer: SyntheticTrainer) -> bool:
    beat = read_heartbeat(trainer.run.objects, "watcher")
    return beat is not None and beat["state"] == "running"


def test_two_runs_are_watched_by_one_process(tmp_path: Path, verbs: Verbs) -> None:
    trainers = [SyntheticTrainer(tmp_path / name) for name in ("a", "b")]
    for trainer in trainers:
        trainer.commit_all(range(3))
        trainer.end()
    assert verbs.run("watch", tmp_path / "a", tmp_path / "b") == (0, "")
    assert [measured(trainer) for trainer in trainers] == [2, 2]


def test_a_wrong_option_is_a_usage_error(tmp_path: Path, verbs: Verbs) -> None:
    (tmp_path / "wrong.toml").write_text("[watch]\njoin_timeout_s = -1\n")
    code, words = verbs.run("watch", tmp_path / "run", "--config", tmp_path / "wrong.toml")
    assert code == 2
    assert "expected join_timeout_s >= 0; found -1" in words
    assert verbs.run("watch", tmp_path / "run", "--control", "force")[0] == 2
