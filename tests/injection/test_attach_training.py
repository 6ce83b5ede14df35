"""Real training jobs, entered while they run: what they compute stays what it was, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from entropy_monitor.store import open_run, read_status
from tests.hooks.scripts import free_port

from .cycles import JOB, cycle, quantile

if TYPE_CHECKING:
    from pathlib import Path

NUM_CYCLES = 30
"""`run.py bench attach --cycles 200` makes more of them."""
DDP_JOB = """
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[2])
from training_job import Net

torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo")
model = DistributedDataParallel(Net())
optimizer = getattr(torch.optim, sys.argv[3])(model.parameters(), lr=1e-3)
print("training", flush=True)
stop, go_on = Path(sys.argv[1]), torch.ones(())
while go_on:
    tokens = torch.randint(0, 256, (4, 64))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] *= 0.999  # tells each step from all others
    go_on = torch.tensor(float(not stop.exists()))
    dist.all_reduce(go_on, dist.ReduceOp.MIN)
dist.destroy_process_group()
time.sleep(0.3)  # gloo's threads free their last tensors: torch aborts if Python has ended by then (pytorch#179291)
"""


def entropy_monitor(*arguments: object, code: int = 0) -> str:
    command = [sys.executable, "-m", "entropy_monitor", *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert found.returncode == code, found.stderr
    return found.stdout


def wait_for_frames(run: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(list(open_run(run).frames(arrays=False))) < count:
        assert time.monotonic() < deadline, "no frames came"
        time.sleep(0.05)


def test_many_cycles_leave_the_job_as_it_was(tmp_path: Path) -> None:
    found = cycle(tmp_path, NUM_CYCLES)
    for figure in ("losses", "parameters", "random", "main"):
        assert found.report[figure] == found.twin[figure]
    assert found.report["untouched"], "hooks are left in the model, the optimizer or autograd"
    assert len(set(found.descriptors)) == 1
    # TensorStore starts the threads of its pool as it needs them; a thread a cycle would be ours.
    assert found.threads[-1] - found.threads[NUM_CYCLES // 2] <= 2
    assert found.mappings[-1] - found.mappings[NUM_CYCLES // 2] <= 8
    assert quantile(found.stopped_s, 0.99) < 0.2
    assert [reply["attempt"] for reply in found.replies] == list(range(1, NUM_CYCLES + 1))
    steps = [reply["step"] for reply in found.replies]
    assert steps == sorted(steps), "the optimizer's own count of its steps"


def test_the_commands(tmp_path: Path) -> None:
    run, stop = tmp_path / "run", tmp_path / "stop"
    with subprocess.Popen([sys.executable, JOB, tmp_path / "report.json", stop], stdout=subprocess.PIPE) as job:
        try:
            assert job.stdout is not None
            assert job.stdout.readline() == b"training\n"
            planned = entropy_monitor("attach", job.pid, "--run", run, "--dry-run")
            assert "ptrace" in planned or "remote-exec" in planned
            assert not run.exists()
            answer: Any = json.loads(entropy_monitor("attach", job.pid, "--run", run, "--every", 5, "--json"))
            wait_for_frames(run, 3)
            again = entropy_monitor("attach", job.pid, "--run", tmp_path / "other")
            assert "already observed" in again
            refused = entropy_monitor("phase", run, "compress", "--reason", "a test", code=1)
            assert "observe-only" in refused
            entropy_monitor("detach", job.pid)
            assert "nothing to remove" in entropy_monitor("detach", job.pid)
            assert read_status(open_run(run)).state == "ended"
            stop.touch()
            assert job.wait(60) == 0
        finally:
            job.kill()
    assert "observing Net" in json.dumps(answer)
    assert not (tmp_path / "other").exists()
    assert all(frame.step % 5 == 0 for frame in open_run(run).frames(arrays=False))
    assert json.loads((tmp_path / "report.json").read_text())["untouched"]
    missing = entropy_monitor("detach", job.pid, code=3)
    assert missing == ""


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"], ids=["its steps are counted", "no count"])
def test_all_ranks_of_a_job(tmp_path: Path, optimizer: str) -> None:
    run, stop = tmp_path / "run", tmp_path / "stop"
    script = tmp_path / "ddp.py"
    script.write_text(DDP_JOB)
    variables = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, str(script), str(stop), str(JOB.parent), optimizer]
    jobs = [subprocess.Popen(command, env={**variables, "RANK": str(rank)}, stdout=subprocess.PIPE) for rank in (0, 1)]
    try:
        for job in jobs:
            assert job.stdout is not None
            assert job.stdout.readline() == b"training\n"
        entropy_monitor("attach", jobs[1].pid, "--run", run, "--all-ranks", "--every", 3)
        wait_for_frames(run, 12)
        entropy_monitor("detach", jobs[0].pid, "--all-ranks")
        stop.touch()
        assert [job.wait(60) for job in jobs] == [0, 0]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
    (attempt,) = open_run(run).attempts()
    assert attempt["world_size"] == 2
    frames = list(open_run(run).frames(arrays=False))
    rates = [{frame.step: frame.scalars["lr"] for frame in frames if frame.rank == rank} for rank in (0, 1)]
    both = rates[0].keys() & rates[1].keys()
    assert len(both) >= 4
    assert all(rates[0][step] == rates[1][step] for step in both), "ranks give one step two numbers"
    assert all(frame.step % 3 == 0 for frame in frames)
    assert read_status(open_run(run)).state == "ended"


@pytest.mark.parametrize("victim", ["attach", "detach"])
def test_a_command_that_is_killed_leaves_the_job_training(tmp_path: Path, victim: str) -> None:
    """At a few moments; the storms are in test_tracer_death and `run.py bench attach`."""
    run, stop = tmp_path / "run", tmp_path / "stop"
    with subprocess.Popen([sys.executable, JOB, tmp_path / "report.json", stop], stdout=subprocess.PIPE) as job:
        try:
            assert job.stdout is not None
            assert job.stdout.readline() == b"training\n"
            for moment in range(0, 8, 2):
                if victim == "detach":
                    entropy_monitor("attach", job.pid, "--run", run)
                arguments = [victim, str(job.pid), *(["--run", str(run)] if victim == "attach" else [])]
                killed = subprocess.Popen(
                    [sys.executable, "-m", "entropy_monitor", *arguments],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                time.sleep(0.3 + 0.1 * moment)
                killed.kill()
                killed.wait()
                assert job.poll() is None
            time.sleep(0.5)
            entropy_monitor("detach", job.pid)
            stop.touch()
            assert job.wait(60) == 0
        finally:
            job.kill()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["untouched"]
    twin = tmp_path / "twin.json"
    subprocess.run([sys.executable, JOB, twin, stop, str(report["steps"])], check=True, stdout=subprocess.DEVNULL)
    assert json.loads(twin.read_text())["losses"] == report["losses"]
