"""Two ranks, as real processes: one attempt, one writer a rank, and training as without us."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from entropy_monitor.store import open_run, read_status

from .scripts import finish, free_port, start

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

run, use_gloo = sys.argv[1], sys.argv[2] == "gloo"
rank = int(os.environ["RANK"])

def train(run):
    job = Job(lambda: tiny_gpt(dropout=0.1))
    inner = job.model
    if use_gloo:
        job.model = DistributedDataParallel(inner)
    job._generator.manual_seed(rank + 10)
    torch.manual_seed(rank + 20)
    if run:
        observe(job, run=run, every=2)
    job.run(6)
    if job.monitor is not None:
        job.monitor.detach()
    return job

if use_gloo:
    dist.init_process_group("gloo")
observed, plain = train(run), train(None)
same = all(torch.equal(a, b) for a, b in zip(observed.parameters, plain.parameters))
stats = observed.monitor.stats()
report(observed=observed.losses, plain=plain.losses, same=same, attempt=stats.attempt, faults=stats.faults)
if use_gloo:
    dist.destroy_process_group()
"""


def run_ranks(run: Path, how: str) -> list[dict[str, Any]]:
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start(SCRIPT, run, how, RANK=str(rank), **variables) for rank in (1, 0)]
    try:
        return [finish(process)[0] for process in reversed(processes)]
    finally:
        for process in processes:  # one that still waits for the other's sake
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.mark.parametrize("how", ["alone", "gloo"])
def test_two_ranks(run: Path, how: str) -> None:
    found = run_ranks(run, how)
    for report in found:
        assert report["observed"] == report["plain"]
        assert report["same"]
        assert report["attempt"] == 1
        assert report["faults"] == {}
    assert found[0]["observed"] != found[1]["observed"], "each rank has its own batches"
    opened = open_run(run)
    (attempt,) = opened.attempts()
    assert attempt["world_size"] == 2
    frames = list(opened.frames())
    assert sorted((frame.rank, frame.step) for frame in frames) == [(r, s) for r in (0, 1) for s in (0, 2, 4)]
    for frame in frames:
        assert frame.scalars["loss"] == found[frame.rank]["observed"][frame.step]
        assert frame.gradients is not None
        assert bool((frame.gradients[:, : 8 * frame.num_patches] != 0).any(axis=2).all())
    for rank in (0, 1):
        assert opened.scalars(rank=rank)["loss"].values.tolist() == found[rank]["observed"]
    status = read_status(opened)
    assert (status.state, status.ranks, status.frames_committed) == ("ended", [0, 1], 6)

    if how == "alone":  # the process group's key-value store is gone with its processes; a file stays
        assert [report["attempt"] for report in run_ranks(run, how)] == [2, 2]
        assert [record["attempt"] for record in open_run(run).attempts()] == [1, 2]
