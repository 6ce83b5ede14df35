"""`entropy_hooks.lightning.EntropyCallback` in real Trainers: they learn the same, and the run has every frame."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest

from .jobs import check_same, ended, found, free_port, reports, start

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

BLOCKS, PARTS = ["blocks.0", "blocks.1", "blocks.2"], ["encoder", "decoder"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def processes(folder: Path) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """All jobs of one rank, and two ranks; at once, for most of their time is importing."""
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    one = start("lightning_jobs.py", folder)
    two = start("lightning_ranks.py", folder / "ranks", prefix=launch, CUDA_VISIBLE_DEVICES="")
    with ended(one, two):
        yield one, two


@pytest.fixture(scope="module")
def jobs(processes: tuple[subprocess.Popen[str], ...]) -> dict[str, Any]:
    return reports(processes[0])


@pytest.mark.parametrize(
    ("name", "layers", "accumulated"),
    [
        ("calls itself", BLOCKS, 1),
        ("pytorch_lightning", BLOCKS, 1),
        ("calls its parts", PARTS, 1),
        ("accumulation", PARTS, 3),
        ("bf16", BLOCKS, 1),
    ],
)
def test_a_training_learns_the_same_and_every_frame_is_there(
    jobs: dict[str, Any], name: str, layers: list[str], accumulated: int
) -> None:
    job, run = jobs[name], jobs[name]["run"]
    check_same(job["observed"], job["plain"])
    assert job["faults"] == {}
    assert (run["steps"], run["state"], run["started"]) == ([0, 2, 4], "ended", [[0, 6, 1]])
    assert run["layers"] == layers
    assert all(run["complete"])
    last = job["observed"]["truth"][accumulated - 1 :: accumulated]  # no loss of a validation
    assert run["losses"] == pytest.approx(last[::2], rel=1e-6)


@pytest.mark.parametrize(("name", "which"), [("critic", 0), ("generator", 1)])
def test_of_several_optimizers_one_counts_and_a_frame_holds_its_own_pass(
    jobs: dict[str, Any], name: str, which: int
) -> None:
    job, run = jobs[name], jobs[name]["run"]
    check_same(job["observed"], job["plain"])
    assert job["faults"] == {}
    assert (run["steps"], run["started"]) == ([0, 2, 4], [[0, 6, 1]])
    assert run["layers"] == [f"{name}.{index}" for index in range(3)]
    assert all(run["complete"])
    assert run["losses"] == pytest.approx([losses[which] for losses in job["observed"]["truth"][::2]], rel=1e-6)


@pytest.mark.parametrize("name", ["resumed", "resumed by hand"])
def test_a_resumed_training_is_a_new_attempt_that_goes_on_at_the_restored_step(jobs: dict[str, Any], name: str) -> None:
    job = jobs[name]
    check_same(job["observed"], job["plain"])
    assert job["run"]["started"] == [[0, 3, 1], [3, 6, 1]]
    assert (job["run"]["steps"], job["run"]["attempts"]) == ([0, 2, 4], [1, 1, 2])


def test_a_command_steers_from_the_next_step_on_and_the_log_has_the_phase(jobs: dict[str, Any]) -> None:
    observed, plain = jobs["steered"]["observed"], jobs["steered"]["plain"]
    assert jobs["steered"]["run"]["acknowledged"] == [["applied", 3, 0]]
    assert observed["truth"][:4] == plain["truth"][:4], "the fourth loss is computed before that step's update"
    assert observed["truth"][4] != plain["truth"][4]
    phases = [(metrics.get("entropy/phase"), metrics.get("entropy/weight")) for metrics in observed["logged"]]
    assert phases[-1] == (1.0, 50.0)
    assert (0.0, 0.0) in phases
    assert not [metrics for metrics in plain["logged"] if "entropy/phase" in metrics]


def test_an_exception_detaches_and_the_same_callback_serves_again(jobs: dict[str, Any]) -> None:
    job = jobs["failed"]
    assert (job["message"], job["ended"], job["hooks"], job["copy"]) == ("out of memory, say", True, 0, True)
    assert (job["run"]["steps"], job["run"]["attempts"]) == ([0, 2, 0, 2, 4], [1, 1, 2, 2, 2])
    assert job["run"]["state"] == "ended"


def test_an_index_without_an_optimizer_is_refused(jobs: dict[str, Any]) -> None:
    job = jobs["no such optimizer"]
    assert "index below 1; found 1" in job["message"]
    assert not job["created"]


def test_a_module_compiled_whole_is_told_with_a_remedy_that_helps(jobs: dict[str, Any]) -> None:
    job = jobs["compiled"]
    assert "found torch.compile(module)" in job["why"]
    assert "self.net.compile()" in job["why"]
    for remedy in job["remedies"].values():
        assert remedy["run"]["steps"] == [0, 2, 4]
        assert all(remedy["run"]["complete"])
        assert remedy["faults"] == {}


def test_two_ranks(processes: tuple[subprocess.Popen[str], ...], folder: Path) -> None:
    job = reports(processes[1])
    assert len(job) == 6
    for report in job.values():
        check_same(report["observed"], report["plain"])
        assert report["faults"] == {}
    for name in ("calls itself", "calls its parts", "by hand"):
        kept = found(folder / "ranks" / name / "run")
        assert kept["started"] == [[0, 3, 2]]
        assert all(kept["complete"])
        frames = sorted(zip(kept["ranks"], kept["steps"], kept["losses"], strict=True))
        assert [frame[:2] for frame in frames] == [(rank, step) for rank in (0, 1) for step in (0, 2)]
        truth = [job[f"{name}, rank {rank}"]["observed"]["truth"][step] for rank in (0, 1) for step in (0, 2)]
        losses = [each[1] if isinstance(each, list) else each for each in truth]
        assert [frame[2] for frame in frames] == pytest.approx(losses, rel=1e-6)


def test_without_lightning_the_import_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "entropy_hooks.lightning", raising=False)
    for package in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"^expected lightning or .*; found neither: pip install lightning$"):
        importlib.import_module("entropy_hooks.lightning")
