"""Small training jobs that can be run twice alike: with the monitor, and without it as the truth."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from entropy_hooks import attach
from entropy_monitor.demo.model import ByteGPT, GPTOptions
from entropy_monitor.estimators import patch_matrix_entropy
from entropy_monitor.store import CommandRequest, issue_command, open_run
from entropy_monitor.types import PATCH_LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from entropy_hooks import Monitor
    from entropy_monitor.types import Acknowledgement, Command, Frame

BATCH, TOKENS, VOCABULARY = 4, 32, 256
DEADLINE_S = 20.0


def tiny_gpt(*, dropout: float = 0.1, num_layers: int = 3) -> ByteGPT:
    return ByteGPT(GPTOptions(num_layers=num_layers, width=32, num_heads=2, context=TOKENS, dropout=dropout))


def byte_loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.reshape(-1, VOCABULARY), targets.reshape(-1))


def explicit_entropy(outputs: list[torch.Tensor]) -> torch.Tensor:
    """JOINTS, "Steering": the mean over steered layers of the row-normalised patch MBE of all whole patches."""
    return torch.stack([patch_matrix_entropy(z, PATCH_LENGTH, normalize=True).mean() for z in outputs]).mean()


class Job:
    """One model in training; two jobs of one seed see the same weights and batches."""

    def __init__(
        self,
        make_model: Callable[[], nn.Module] = tiny_gpt,
        *,
        seed: int = 0,
        make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        batch: int = BATCH,
        tokens: int = TOKENS,
    ) -> None:
        torch.manual_seed(seed)
        self.model = make_model()
        self.optimizer = make_optimizer(self.model.parameters(), lr=1e-3)
        self.shape = (batch, tokens)
        self.losses: list[float] = []
        self.batches: list[torch.Tensor] = []
        self.monitor: Monitor | None = None
        """Waited for after each step, so that no frame is dropped on a busy machine; see `observe`."""
        self._generator = torch.Generator().manual_seed(seed + 1)

    def next_batch(self) -> torch.Tensor:
        batch = torch.randint(0, VOCABULARY, self.shape, generator=self._generator)
        self.batches.append(batch)
        return batch

    def forward_loss(self) -> torch.Tensor:
        tokens = self.next_batch()
        return byte_loss(self.model(tokens), tokens.roll(-1, 1))

    def step(self, *, accumulate: int = 1, scale: float = 1.0) -> None:
        """One optimizer step, as a careful user writes it: unscaled before the optimizer looks."""
        self.optimizer.zero_grad()
        for _ in range(accumulate):
            loss = self.forward_loss()
            (loss / accumulate * scale).backward()
        if scale != 1.0:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        self.optimizer.step()
        self.losses.append(loss.item())
        if self.monitor is not None:
            flushed(self.monitor)

    def run(self, steps: int, **options: Any) -> Job:
        for _ in range(steps):
            self.step(**options)
        return self

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def observe(job: Job, *, run: str | Path, **options: Any) -> Monitor:
    """`attach`; each step of the job then waits until the writer is idle."""
    job.monitor = attach(job.model, job.optimizer, run=run, **options)
    return job.monitor


def flushed(monitor: Monitor) -> bool:
    """Everything handed over is in the store, or never will be."""
    return monitor._session is None or monitor._session.writer.flush(DEADLINE_S)


def assert_same_training(found: Job, expected: Job) -> None:
    """Bit for bit."""
    assert found.losses == expected.losses
    for one, other in zip(found.parameters, expected.parameters, strict=True):
        assert torch.equal(one, other)


class Truth:
    """Our own plain hooks: each layer's output, and its gradient as autograd gives it."""

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        self.outputs: dict[str, torch.Tensor] = {}
        modules = dict(model.named_modules())
        for name in layers:
            modules[name].register_forward_hook(lambda module, args, output, name=name: self._see(name, output))

    def _see(self, name: str, output: Any) -> None:
        z = output[0] if isinstance(output, tuple) else output
        if z.requires_grad:
            z.retain_grad()
        self.outputs[name] = z

    def activation(self, name: str) -> torch.Tensor:
        return self.outputs[name].detach()

    def gradient(self, name: str) -> torch.Tensor:
        gradient = self.outputs[name].grad
        assert gradient is not None
        return gradient


def frames(run: Path) -> list[Frame]:
    return list(open_run(run).frames())


def rounded(z: torch.Tensor) -> torch.Tensor:
    """As a frame stores it."""
    return z.to(torch.bfloat16).float()


def positions(frame: Frame, tokens: torch.Tensor) -> list[tuple[int, int]]:
    """Sequence and place of each sampled token, found by the windows of token ids stored beside it."""
    num_sequences, length = tokens.shape
    padded = F.pad(tokens, (2, 3), value=-1)
    where: dict[tuple[int, ...], tuple[int, int]] = {}
    for sequence in range(num_sequences):
        for place in range(length):
            window = tuple(padded[sequence, place : place + 6].tolist())
            assert window not in where, "the batch has two equal windows: choose another seed"
            where[window] = (sequence, place)
    assert frame.token_windows is not None
    sampled = frame.token_windows[: 8 * frame.num_patches]
    return [where[tuple(int(token) for token in window)] for window in sampled]


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll a condition; its true value."""
    deadline = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {deadline_s} s in vain for {what}"
        time.sleep(0.01)
    return found


def command(run: Path, phase: str, *, key: str | None = None, now: float | None = None, **fields: Any) -> Command:
    opened = open_run(run)
    request = CommandRequest(phase=phase, reason="a test", issued_by="test", **fields)  # type: ignore[arg-type]
    return issue_command(opened.objects, opened.run_id, request, key=key, now=now)


def acknowledgement(run: Path, number: int, rank: int = 0) -> Acknowledgement | None:
    found = [ack for ack in open_run(run).acknowledgements() if ack.command_id == f"{number:08d}" and ack.rank == rank]
    return found[0] if found else None


def queued(monitor: Monitor) -> bool:
    """The pulse thread has a command ready for the next step boundary."""
    session = monitor._session
    return session is not None and len(session._pulse.delivery._pending) > 0


def apply_now(job: Job, run: Path, monitor: Monitor, phase: str, **fields: Any) -> Acknowledgement:
    """Command a phase between two steps, and take the one step whose end applies it."""
    number = int(command(run, phase, **fields).command_id)
    wait_until(lambda: queued(monitor), "the command")
    job.step()
    ack = acknowledgement(run, number)
    assert ack is not None
    assert ack.status == "applied"
    return ack
