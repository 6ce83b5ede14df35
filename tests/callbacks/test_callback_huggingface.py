"""`entropy_hooks.huggingface.EntropyCallback` in real Trainers: they learn the same, and the run has every frame."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest

from entropy_monitor.errors import ConfigError

from .jobs import check_same, ended, found, free_port, reports, start

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture(scope="module")
def processes(folder: Path) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """All jobs of one rank, and two ranks of ``accelerate launch``; at once, for most of their time is importing."""
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port())
    on_cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    one = start("huggingface_jobs.py", folder)
    two = start("huggingface_ranks.py", folder / "ranks" / "run", prefix=(*launch, *options), **on_cpu)
    with ended(one, two):
        yield one, two


@pytest.fixture(scope="module")
def jobs(processes: tuple[subprocess.Popen[str], ...]) -> dict[str, Any]:
    """The last of them raises out of the process."""
    return reports(processes[0], code=1)


@pytest.mark.parametrize(
    ("name", "accumulated"),
    [("plain", 1), ("accumulation", 3), ("bf16", 1), ("checkpointing", 1), ("checkpointing, reentrant", 1)],
)
def test_a_training_learns_the_same_and_every_frame_is_there(jobs: dict[str, Any], name: str, accumulated: int) -> None:
    job, run = jobs[name], jobs[name]["run"]
    check_same(job["observed"], job["plain"])
    assert job["faults"] == {}
    assert len(job["observed"]["logged"]) == 6
    assert (run["steps"], run["state"], run["started"]) == ([0, 2, 4], "ended", [[0, 6, 1]])
    assert run["layers"] == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    assert all(run["complete"])
    # The mean over the targets of the last micro-batch, though the Trainer divides sums by other numbers; and no loss
    # of an evaluation.
    last = job["observed"]["truth"][accumulated - 1 :: accumulated]
    assert len(last) == 6
    assert run["losses"] == pytest.approx(last[::2], rel=1e-5)


def test_a_resumed_training_is_a_new_attempt_that_goes_on_at_the_restored_step(jobs: dict[str, Any]) -> None:
    job = jobs["resumed"]
    check_same(job["whole"], job["plain"])
    assert job["again"]["parameters"] == job["plain"]["parameters"]
    assert job["run"]["started"] == [[0, 6, 1], [3, 6, 1]]
    assert job["run"]["steps"] == [0, 2, 4, 4]
    assert job["run"]["attempts"] == [1, 1, 1, 2]
    assert job["run"]["losses"][2] == job["run"]["losses"][3]


def test_a_command_steers_from_the_next_step_on_and_the_log_has_the_phase(jobs: dict[str, Any]) -> None:
    observed, plain = jobs["steered"]["observed"], jobs["steered"]["plain"]
    assert jobs["steered"]["run"]["acknowledged"] == [["applied", 3, 0]]
    assert observed["logged"][:3] == plain["logged"][:3]
    assert observed["logged"][3][0] == plain["logged"][3][0], "the loss that the step begins with"
    assert observed["logged"][3][1] > 2 * plain["logged"][3][1], "the norm of a gradient with the entropy's term"
    assert observed["parameters"] != plain["parameters"]
    phases = [(entry["entropy/phase"], entry["entropy/weight"]) for entry in observed["history"]]
    assert phases == [(0.0, 0.0)] * 2 + [(1.0, 5.0)] * 5  # the last entry is the summary
    assert "entropy/phase" not in jobs["plain"]["observed"]["history"][0]


def test_copies_are_made_without_the_monitor(jobs: dict[str, Any]) -> None:
    assert jobs["copied"] == {"monitors": [True] * 3, "same": [True] * 3}


def test_after_an_exception_the_next_training_ends_the_run_and_has_its_own(jobs: dict[str, Any]) -> None:
    job = jobs["raised"]
    assert job["message"] == "out of memory, say"
    assert (job["left"], job["then"], job["hooks"]) == (True, False, 0)
    assert (job["first"]["steps"], job["first"]["state"]) == ([0, 2], "ended")
    assert (job["second"]["steps"], job["second"]["state"], job["faults"]) == ([0, 2, 4], "ended", {})


def test_an_exception_that_ends_the_process_leaves_every_frame(jobs: dict[str, Any], folder: Path) -> None:
    assert jobs
    run = found(folder / "last" / "run")
    assert (run["steps"], run["state"]) == ([0, 2], "ended")
    assert all(run["complete"])


def test_two_ranks_of_accelerate_launch(processes: tuple[subprocess.Popen[str], ...], folder: Path) -> None:
    job = reports(processes[1])
    assert set(job) == {"rank 0", "rank 1"}
    for report in job.values():
        check_same(report["observed"], report["plain"])
        assert report["faults"] == {}
    assert job["rank 0"]["observed"]["truth"] != job["rank 1"]["observed"]["truth"], "each rank has its own batches"
    kept = found(folder / "ranks" / "run")
    assert kept["started"] == [[0, 5, 2]]
    frames = sorted(zip(kept["ranks"], kept["steps"], kept["losses"], strict=True))
    assert [frame[:2] for frame in frames] == [(rank, step) for rank in (0, 1) for step in (0, 2, 4)]
    assert [frame[2] for frame in frames] == pytest.approx(
        [job[f"rank {rank}"]["observed"]["truth"][step] for rank in (0, 1) for step in (0, 2, 4)], rel=1e-5
    )
    assert all(kept["complete"])


def test_without_transformers_the_import_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "entropy_hooks.huggingface", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"^expected transformers .*; found none: pip install '[^\n]*'$"):
        importlib.import_module("entropy_hooks.huggingface")


def test_wrong_options_are_told_before_anything_trains() -> None:
    from entropy_hooks.callback import TrainingCallback

    with pytest.raises(ConfigError, match="every"):
        TrainingCallback("run", every=0)
    with pytest.raises(ConfigError, match="evry"):
        TrainingCallback("run", evry=5)
    TrainingCallback("run", probe=lambda model: model.sum(), observe="probe")
