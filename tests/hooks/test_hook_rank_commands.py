"""Commands to several ranks, as real processes: the same step on every rank, nothing asked for without a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from entropy_monitor.store import open_run

from .scripts import finish, free_port, start
from .training import command, frames, wait_until

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

PRELUDE = """
import threading, time
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from entropy_hooks import delivery, shared_notes

run, steps = sys.argv[1], int(sys.argv[2])
rank = int(os.environ["RANK"])
asked = []
for name in ("write", "read", "has_all"):
    def counted(self, *arguments, original=getattr(shared_notes.SharedNotes, name)):
        if threading.current_thread() is threading.main_thread():
            asked.append(arguments[0])
        return original(self, *arguments)
    setattr(shared_notes.SharedNotes, name, counted)
dist.init_process_group("gloo")
job = Job(lambda: tiny_gpt(dropout=0.0, num_layers=4))
inner = job.model
job.model = DistributedDataParallel(inner)
job._generator.manual_seed(rank + 10)

def everybody(flag):
    agreed = torch.tensor([float(flag)])
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed)
"""

TRAIN = """
with observe(job, run=run, every=1, steer=True, weight_alignment=False) as monitor:
    while len(job.losses) < steps or not everybody(monitor.phase == "compress"):
        job.step()
        if len(job.losses) == steps:
            quiet = len(asked)
        assert len(job.losses) < 5000
        time.sleep(0.01 * rank)  # ranks are never quite together
    compressing_from = monitor.stats().step
    job.run(3)
report(quiet=quiet, faults=monitor.stats().faults, steps=len(job.losses))
dist.destroy_process_group()
"""


def launch(source: str, run: Path, *arguments: object) -> list[subprocess.Popen[str]]:
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start(PRELUDE + source, run, *arguments, RANK=str(rank), **variables) for rank in (0, 1)]


def finish_all(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    try:
        return [finish(process)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def test_a_command_is_applied_at_the_same_step_on_every_rank(run: Path) -> None:
    processes = launch(TRAIN, run, 20)
    enough = 2 * 24  # both ranks are past step 20 when the first command comes
    wait_until(lambda: run.exists() and len(list(open_run(run).frames(arrays=False))) > enough, "some steps", 60)
    for phase in ("memorize", "auto", "compress"):
        command(run, phase)
    for report in finish_all(processes):
        assert report["quiet"] == 0, "a note was looked for on the training thread without a command"
        assert report["faults"] == {}
    acks = open_run(run).acknowledgements()
    assert [(ack.command_id, ack.rank) for ack in acks] == [(f"{n:08d}", r) for n in (1, 2, 3) for r in (0, 1)]
    assert {ack.status for ack in acks} == {"applied"}
    steps = {ack.command_id: {a.step for a in acks if a.command_id == ack.command_id} for ack in acks}
    assert all(len(found) == 1 for found in steps.values()), steps
    phases: dict[int, set[str]] = {}
    for frame in frames(run):
        phases.setdefault(frame.step, set()).add(frame.phase)
    assert all(len(found) == 1 for found in phases.values()), "ranks in different phases at one step"
    assert phases[max(phases)] == {"compress"}


ONE_OBSERVER = """
delivery.SEEN_TIMEOUT_S = 1.0
monitor = attach(job.model, job.optimizer, run=run, steer=True) if rank == 0 else None
refused = False
while not everybody(refused or rank):
    job.step()
    refused = any(Path(run, "control/acks").glob("*"))
    assert len(job.losses) < 5000
if monitor is not None:
    report(phase=monitor.phase)
    monitor.detach()
dist.destroy_process_group()
"""


def test_a_rank_that_does_not_see_the_command_is_named(run: Path) -> None:
    processes = launch(ONE_OBSERVER, run, 0)
    wait_until(lambda: (run / "attempts" / "000001.json").exists(), "the attempt", 60)
    command(run, "compress")
    assert finish_all(processes)[0]["phase"] == "memorize"
    (ack,) = open_run(run).acknowledgements()
    assert (ack.rank, ack.status) == (0, "rejected")
    assert "rank 1 did not" in ack.detail


ONE_STEERED = """
monitor = attach(job.model, job.optimizer, run=run, steer=rank == 0)
while not everybody(len(list(Path(run, "control/acks").glob("*"))) == 2):
    job.step()
    assert len(job.losses) < 5000
report(phase=monitor.phase)
monitor.detach()
dist.destroy_process_group()
"""


def test_what_one_rank_refuses_no_rank_applies(run: Path) -> None:
    processes = launch(ONE_STEERED, run, 0)
    wait_until(lambda: (run / "attempts" / "000001.json").exists(), "the attempt", 60)
    command(run, "compress")
    assert [report["phase"] for report in finish_all(processes)] == ["memorize", "memorize"]
    acks = open_run(run).acknowledgements()
    assert [ack.status for ack in acks] == ["rejected", "rejected"]
    assert all("observe-only" in ack.detail for ack in acks)


GRADIENTS = """
with observe(job, run=run, every=1000, steer=True) as monitor:
    while not everybody(monitor.phase == "compress"):
        job.step()
        assert len(job.losses) < 5000
    job.optimizer.zero_grad()
    batches = []
    for other in (0, 1):
        tokens = job.next_batch()
        gathered = [torch.empty_like(tokens) for _ in range(2)]
        dist.all_gather(gathered, tokens)
        batches.append(gathered)
    with job.model.no_sync():  # two micro-batches
        (byte_loss(job.model(batches[0][rank]), batches[0][rank].roll(-1, 1)) / 2 * 65536).backward()
    (byte_loss(job.model(batches[1][rank]), batches[1][rank].roll(-1, 1)) / 2 * 65536).backward()
    found = torch.cat([parameter.grad.flatten() for parameter in inner.parameters()]) / 65536
    faults = monitor.stats().faults
twin = tiny_gpt(dropout=0.0, num_layers=4)
twin.load_state_dict(inner.state_dict())
truth = Truth(twin, ["blocks.1", "blocks.2"])
for tokens in (tokens for gathered in batches for tokens in gathered):
    loss = byte_loss(twin(tokens), tokens.roll(-1, 1)) + 0.5 * explicit_entropy(list(truth.outputs.values()))
    (loss / 4).backward()
expected = torch.cat([parameter.grad.flatten() for parameter in twin.parameters()])
report(error=float((found - expected).norm() / expected.norm()), faults=faults)
dist.destroy_process_group()
"""


def test_steering_under_ddp_equals_adding_to_every_ranks_loss(run: Path) -> None:
    """Two ranks, two micro-batches, loss scale 65536, against one process with the explicit loss."""
    processes = launch(GRADIENTS, run, 0)
    wait_until(lambda: (run / "attempts" / "000001.json").exists(), "the attempt", 60)
    command(run, "compress", weight=0.5)
    for report in finish_all(processes):
        assert report["error"] < 1e-5
        assert report["faults"] == {}


@pytest.mark.parametrize("killed", [0, 1])
def test_a_command_answered_by_one_rank_alone_is_never_applied_later(run: Path, killed: int) -> None:
    """As a kill between two ranks' answers leaves it: the next attempt's ranks must not train in different phases."""
    from entropy_monitor.store import acknowledge, create_run
    from entropy_monitor.types import Acknowledgement

    opened = create_run(run)
    number = int(command(run, "compress").command_id)
    answered = 1 - killed
    done = Acknowledgement(command_id=f"{number:08d}", rank=answered, step=3, status="applied", detail="compress")
    assert acknowledge(opened.objects, number, done)
    reports = finish_all(launch(ONE_STEERED.replace("steer=rank == 0", "steer=True"), run, 0))
    assert [report["phase"] for report in reports] == ["memorize", "memorize"]
    (expired,) = [ack for ack in open_run(run).acknowledgements() if ack.rank == killed]
    assert expired.status == "expired"
    assert f"rank {answered} applied it" in expired.detail


DEBTOR = """
from entropy_hooks import pulse

broken = rank == 1
def failing(objects, number, ack, original=pulse.acknowledge):
    if broken:
        raise OSError("no space left")
    return original(objects, number, ack)
pulse.acknowledge = failing
with observe(job, run=run, every=1, steer=True, weight_alignment=False) as monitor:
    while not everybody(monitor.phase == "compress"):
        job.step()
        assert len(job.losses) < 5000
    applied = monitor.stats()
    broken = False
    while not everybody(len(list(Path(run, "control/acks").glob("*"))) == 2):
        job.step()
        assert len(job.losses) < 5000
report(phase=applied.phase, step=applied.step, faults=applied.faults)
dist.destroy_process_group()
"""


def test_a_rank_that_cannot_store_its_answer_keeps_step_with_the_others(run: Path) -> None:
    processes = launch(DEBTOR, run, 0)
    wait_until(lambda: (run / "attempts" / "000001.json").exists(), "the attempt", 60)
    command(run, "compress")
    reports = finish_all(processes)
    assert [report["phase"] for report in reports] == ["compress", "compress"]
    assert reports[0]["step"] == reports[1]["step"]
    assert "acknowledgement_failed" in reports[1]["faults"]
    acks = open_run(run).acknowledgements()
    assert [ack.status for ack in acks] == ["applied", "applied"], "the answer came later"
    assert len({ack.step for ack in acks}) == 1
    phases: dict[int, set[str]] = {}
    for frame in frames(run):
        phases.setdefault(frame.step, set()).add(frame.phase)
    assert all(len(found) == 1 for found in phases.values())
