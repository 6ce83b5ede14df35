"""Jobs of several processes: ranks share a run and an attempt, independent trainers do not."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.store import open_run

from .launching import end, launch, start, steps

if TYPE_CHECKING:
    from pathlib import Path

BIN = ("-m", "torch.distributed.run")
RANKS = ("--standalone", "--nproc-per-node=2", "ranks.py")


@pytest.fixture(scope="module")
def plain() -> list[list[float]]:
    """Losses of both ranks without us."""
    ended = end(start(sys.executable, *BIN, *RANKS))
    assert ended.code == 0, ended.err
    return [report["losses"] for report in sorted(ended.reports, key=lambda report: report["rank"])]


def starts(tmp_path: Path) -> dict[str, tuple[object, ...]]:
    from pathlib import Path

    scripts = Path(sys.executable).parent
    # "multi_gpu" means several processes; without a GPU they use gloo, as --cpu would only under MPI.
    accelerate = ("--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--multi_gpu")
    return {
        "torchrun": (scripts / "torchrun", *RANKS),
        "torch.distributed.run": (sys.executable, *BIN, *RANKS),
        "accelerate": (scripts / "accelerate", "launch", *accelerate, "ranks.py"),
        "spawn": (sys.executable, "ranks.py", "spawn", tmp_path),
        "fork": (sys.executable, "ranks.py", "fork", tmp_path),
    }


@pytest.mark.parametrize("how", ["torchrun", "torch.distributed.run", "accelerate", "spawn", "fork"])
def test_ranks_share_one_attempt(run: Path, tmp_path: Path, plain: list[list[float]], how: str) -> None:
    ended = launch(run, *starts(tmp_path)[how], MASTER_PORT="0")
    assert ended.code == 0, ended.err
    reports = sorted(ended.reports, key=lambda report: report["rank"])
    assert [report["losses"] for report in reports] == plain
    (attempt,) = open_run(run).attempts()
    assert attempt["world_size"] == 2
    for rank in (0, 1):
        assert steps(run, rank) == [(1, 2), (1, 4)], ended.err
    assert ended.err.count("observing Net with AdamW") == 2
    assert not run.with_name("run-2").exists()


@pytest.mark.parametrize("how", ["os.fork", "fork", "spawn"])
def test_independent_children_have_a_run_each(run: Path, how: str) -> None:
    ended = launch(run, sys.executable, "lone_children.py", how)
    assert ended.code == 0, ended.err
    assert len(ended.reports) == 2
    for place in (run, run.with_name("run-2")):
        (attempt,) = open_run(place).attempts()
        assert attempt["world_size"] == 1
        # A child of os.fork that leaves by os._exit writes no more; these end by sys.exit or as multiprocessing does.
        assert steps(place) == [(1, 2), (1, 4)], ended.err
    assert not run.with_name("run-3").exists()
