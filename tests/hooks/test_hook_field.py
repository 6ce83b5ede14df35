"""Training as it is in the field: each row trains twice, with the monitor and without, bit for bit alike.

DistributedDataParallel, FSDP, `torch.compile`, Hugging Face and Lightning have files of their own.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from entropy_hooks import attach
from entropy_monitor.store import open_run

from .scripts import finish, free_port, start
from .training import VOCABULARY, Job, flushed, frames, observe, tiny_gpt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from entropy_hooks import Monitor

STEPS = 6
Step = "Callable[[Job], None]"


class Checkpointed(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = tiny_gpt(), use_reentrant
        self.blocks = self.inner.blocks

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: Any = self.inner.bytes(tokens) + self.inner.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.inner.head(self.inner.norm(x))


def tied() -> nn.Module:
    model = tiny_gpt()
    model.head.weight = model.bytes.weight
    return model


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(VOCABULARY, 16), nn.LSTM(16, 24, batch_first=True)
        self.head = nn.Linear(24, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


class Convolutional(nn.Module):
    """Bytes as a picture of 8 x 4; a token is a spatial position."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, VOCABULARY, 1)]
        self.net = nn.Sequential(*layers)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        pixels = tokens.view(len(tokens), 1, 8, 4).float() / VOCABULARY
        return self.net(pixels).flatten(2).transpose(1, 2)


class Perceptron(nn.Module):
    """A row of the batch is a token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 24), nn.Linear(24, 32 * VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.first(tokens.float() / VOCABULARY))
        return self.second(hidden).view(len(tokens), 32, VOCABULARY)


def plainly(job: Job) -> None:
    job.step()


def accumulating(job: Job) -> None:
    job.step(accumulate=4)


def in_bfloat16(job: Job) -> None:
    job.optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = job.forward_loss()
    loss.backward()
    finish_step(job, loss)


def scaled(job: Job) -> None:
    """Gradients overflow twice, at a step that is sampled and at one that is not: GradScaler skips the optimizer."""
    scaler = job.__dict__.setdefault("scaler", torch.amp.GradScaler("cpu"))
    overflows = 1 if len(job.losses) in (2, 3) else 0
    while True:
        job.optimizer.zero_grad()
        loss = job.forward_loss()
        scaler.scale(loss).backward()
        if overflows:
            next(job.model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
        scaler.unscale_(job.optimizer)
        nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
        scaler.step(job.optimizer)
        scaler.update()
        if not overflows:
            break
        overflows = 0
    remember(job, loss)


def with_evaluation(job: Job) -> None:
    """Evaluations where users put them: between steps, between backward and step, one of them without no_grad."""
    job.model.eval()
    with torch.no_grad():
        job.forward_loss()
    job.model.train()
    job.optimizer.zero_grad()
    loss = job.forward_loss()
    loss.backward()
    job.model.eval()
    job.forward_loss()  # with gradients, and no backward pass
    job.model.train()
    finish_step(job, loss)


def generating(job: Job) -> None:
    job.step()
    job.model.eval()
    with torch.inference_mode():
        tokens = job.batches[-1][:1, :8]
        while tokens.shape[1] < 32:
            tokens = torch.cat([tokens, job.model(tokens)[:, -1:].argmax(-1)], dim=1)
    job.model.train()


def two_optimizers(job: Job) -> None:
    """The second one steps every second time."""
    job.optimizer.zero_grad()
    loss = job.forward_loss()
    loss.backward()
    job.optimizer.step()
    if len(job.losses) % 2:
        job.second.step()  # type: ignore[attr-defined]
        job.second.zero_grad()  # type: ignore[attr-defined]
    remember(job, loss)


def finish_step(job: Job, loss: torch.Tensor) -> None:
    job.optimizer.step()
    remember(job, loss)


def remember(job: Job, loss: torch.Tensor) -> None:
    job.losses.append(loss.item())
    if job.monitor is not None:
        flushed(job.monitor)


ROWS: dict[str, tuple[Callable[[], nn.Module], Callable[[Job], None]]] = OrderedDict(
    {
        "plain": (tiny_gpt, plainly),
        "accumulation": (tiny_gpt, accumulating),
        "GradScaler": (tiny_gpt, scaled),
        "bfloat16 autocast": (tiny_gpt, in_bfloat16),
        "checkpointing": (lambda: Checkpointed(use_reentrant=False), plainly),
        "checkpointing, reentrant": (lambda: Checkpointed(use_reentrant=True), plainly),
        "tied weights": (tied, plainly),
        "two optimizers": (tiny_gpt, two_optimizers),
        "CNN": (Convolutional, plainly),
        "LSTM": (Recurrent, plainly),
        "MLP": (Perceptron, plainly),
        "evaluation": (tiny_gpt, with_evaluation),
        "generation": (tiny_gpt, generating),
        "120 layers": (lambda: tiny_gpt(num_layers=120), plainly),
    }
)


def make_job(row: str, **options: Any) -> tuple[Job, list[torch.optim.Optimizer]]:
    job = Job(ROWS[row][0], **options)
    optimizers = [job.optimizer]
    if row == "two optimizers":
        matrices = [p for p in job.model.parameters() if p.dim() == 2]
        job.optimizer = torch.optim.AdamW([p for p in job.model.parameters() if p.dim() != 2], lr=1e-3)
        job.second = torch.optim.SGD(matrices, lr=1e-2)  # type: ignore[attr-defined]
        optimizers = [job.optimizer, job.second]  # type: ignore[attr-defined]
    return job, optimizers


def train(row: str, run: Path | None, **options: Any) -> tuple[Job, Monitor | None]:
    job, optimizers = make_job(row, batch=16)
    monitor = attach(job.model, optimizers, run=run, **options) if run else None
    job.monitor = monitor
    for _ in range(STEPS):
        ROWS[row][1](job)
    if monitor is not None:
        monitor.detach()
    return job, monitor


@pytest.mark.parametrize("row", ROWS)
def test_training_as_it_is_in_the_field(run: Path, row: str) -> None:
    plain, _ = train(row, None)
    job, monitor = train(row, run, every=2)
    assert job.losses == plain.losses
    assert all(torch.equal(one, other) for one, other in zip(job.parameters, plain.parameters, strict=True))
    assert monitor is not None
    stats = monitor.stats()
    assert stats.faults == {}
    assert (stats.frames_committed, stats.frames_dropped, stats.step) == (STEPS // 2, 0, STEPS)
    found = frames(run)
    assert [frame.step for frame in found] == [0, 2, 4]
    for frame in found:
        assert frame.scalars["loss"] == pytest.approx(job.losses[frame.step], rel=1e-6)
        for group in frame.groups:
            tokens = slice(None, 8 * frame.num_patches)
            assert np.isfinite(group.activations[:, tokens]).all()
            assert group.gradients is not None
            assert np.isfinite(group.gradients[:, tokens]).all()
            assert (group.gradients[:, tokens] != 0).any(axis=(1, 2)).all()
    assert open_run(run).scalars()["loss"].values.tolist() == pytest.approx(job.losses, rel=1e-6)


def test_the_skipped_steps_of_the_table_are_really_skipped() -> None:
    job, _ = train("GradScaler", None)
    assert len(job.batches) == STEPS + 2, "no step was skipped: the row would show nothing"
    assert job.scaler.get_scale() == 65536 / 4  # type: ignore[attr-defined]


def test_a_resumed_training_is_a_new_attempt_that_goes_on_counting(run: Path) -> None:
    whole = Job(lambda: tiny_gpt(dropout=0.0)).run(6)
    first = Job(lambda: tiny_gpt(dropout=0.0))
    with attach(first.model, first.optimizer, run=run, every=2) as monitor:
        first.monitor = monitor
        first.run(4)
    resumed = Job(lambda: tiny_gpt(dropout=0.0))
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    for _ in range(4):
        resumed.next_batch()
    with attach(resumed.model, resumed.optimizer, run=run, every=2, start_step=4) as monitor:
        resumed.monitor = monitor
        resumed.run(2)
    assert first.losses + resumed.losses == whole.losses
    assert [(frame.attempt, frame.step) for frame in frames(run)] == [(1, 0), (1, 2), (2, 4)]
    assert open_run(run).scalars()["loss"].values.tolist() == pytest.approx(whole.losses)


FULLY_SHARDED = """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))

def train(run):
    torch.manual_seed(0)
    model = tiny_gpt(dropout=0.0)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    job = Job(lambda: model)
    job._generator.manual_seed(rank + 10)
    if run:
        observe(job, run=run, every=2)
    job.run(6)
    if job.monitor is not None:
        job.monitor.detach()
    return job

observed, plain = train(sys.argv[1]), train(None)
same = all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(observed.parameters, plain.parameters))
report(observed=observed.losses, plain=plain.losses, same=same, faults=observed.monitor.stats().faults)
dist.destroy_process_group()
"""


def test_fully_sharded_ranks(run: Path) -> None:
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start(FULLY_SHARDED, run, RANK=str(rank), **variables) for rank in (0, 1)]
    reports = [finish(process)[0] for process in processes]
    for report in reports:
        assert report["observed"] == report["plain"]
        assert report["same"]
        assert report["faults"] == {}
    found = frames(run)
    assert sorted((frame.rank, frame.step) for frame in found) == [(r, s) for r in (0, 1) for s in (0, 2, 4)]
    for frame in found:
        assert frame.scalars["loss"] == pytest.approx(reports[frame.rank]["observed"][frame.step])
        assert frame.gradients is not None
        assert (frame.gradients[:, : 8 * frame.num_patches] != 0).any(axis=(1, 2)).all()
        assert frame.alignment is not None
        assert (frame.alignment.info[:, 3] == 3).all(), "each rank holds a shard of the weight's gradient"
        assert np.isnan(frame.scalars["grad_norm"]), "adding up the shards' norms would take a collective"


def test_the_gradient_norm_of_a_fused_optimizer_is_the_unscaled_one(run: Path) -> None:
    """GradScaler leaves it to such an optimizer to unscale the gradients, in its step."""
    job = Job(lambda: tiny_gpt(dropout=0.0))
    job.optimizer = torch.optim.AdamW(job.model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    true: list[float] = []
    with observe(job, run=run, every=1) as monitor:
        for _ in range(3):
            job.optimizer.zero_grad()
            scaler.scale(job.forward_loss()).backward()
            gradients = [parameter.grad for parameter in job.model.parameters() if parameter.grad is not None]
            true.append(float(torch.nn.utils.get_total_norm(gradients)) / 65536.0)
            scaler.step(job.optimizer)
            scaler.update()
            assert flushed(monitor)
    assert [frame.scalars["grad_norm"] for frame in frames(run)] == pytest.approx(true, rel=1e-5)
