"""Weight-space alignment: where it is valid, where undetermined, and that its value is autograd's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from entropy_hooks import attach
from entropy_monitor.demo.model import ByteGPT, GPTOptions
from entropy_monitor.demo.text import draw_batch, load_bytes
from entropy_monitor.estimators import gradient_alignment_from_parts, patch_matrix_entropy

from .training import Job, Truth, frames, observe, tiny_gpt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDTH = 16


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class PostNorm(PreNorm):
    """The norm stands between the last linear layer and the output: the path is no identity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(self.up(x).tanh()))


class InPlaceSum(PreNorm):
    """Writes the residual into the linear layer's own output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.down(self.up(self.norm(x)).tanh())
        out += x
        return out


class Dropped(PreNorm):
    inplace = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.dropout(self.down(self.up(self.norm(x)).tanh()), 0.2, training=True, inplace=self.inplace)


class DroppedInPlace(Dropped):
    inplace = True


class NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(x).tanh()


class Narrow(PreNorm):
    """Its last linear layer of the block's width is not the last step: a nonlinearity follows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.down(self.up(self.norm(x)).tanh())).tanh()


class Stack(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList([block(), block()])
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("block", "status"),
    [
        (PreNorm, 0),
        (Dropped, 0),
        # Written into, the linear layer's output loses its own gradient: a mask could not be seen.
        (InPlaceSum, 2),
        (DroppedInPlace, 2),
        (NoLinear, 1),
        (PostNorm, 2),
        (Narrow, 2),
    ],
)
def test_status_of_a_block(run: Path, block: Callable[[], nn.Module], status: int) -> None:
    job = Job(lambda: Stack(block))
    with observe(job, run=run, every=1) as monitor:
        job.run(3)
    assert monitor.stats().faults == {}
    for frame in frames(run):
        assert frame.alignment is not None
        assert frame.alignment.info[:, 3].tolist() == [status, status]
        if status == 0:
            assert torch.isfinite(torch.from_numpy(frame.alignment.parts)).all()


def test_status_under_dropout_of_the_demo_model(run: Path) -> None:
    job = Job(lambda: tiny_gpt(dropout=0.2))
    with observe(job, run=run, every=1):
        job.run(5)
    assert [frame.alignment.info[:, 3].tolist() for frame in frames(run) if frame.alignment] == [[0.0] * 3] * 5


def test_each_layer_keeps_its_own_status(run: Path) -> None:
    def make_model() -> nn.Module:
        first_two = iter([PreNorm(), NoLinear()])
        model = Stack(lambda: next(first_two))
        model.blocks.extend([PostNorm(), PreNorm()])
        return model

    job = Job(make_model)
    with observe(job, run=run, every=1, layers=["blocks.?"]) as monitor:
        job.run(2)
    assert monitor.stats().faults == {}
    for frame in frames(run):
        assert frame.alignment is not None
        status = dict(zip(frame.alignment.layers, frame.alignment.info[:, 3].tolist(), strict=True))
        assert {name: status[name] for name in (f"blocks.{index}" for index in range(4))} == {
            "blocks.0": 0,
            "blocks.1": 1,
            "blocks.2": 2,
            "blocks.3": 0,
        }


def test_a_block_skipped_in_the_first_pass_is_learned_later(run: Path) -> None:
    class Skipping(Stack):
        skip = True

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](self.embed(tokens))
            return self.head(x if self.skip else self.blocks[1](x))

    job = Job(lambda: Skipping(PreNorm))
    with observe(job, run=run, every=1):
        job.step()
        job.model.skip = False  # type: ignore[assignment]
        job.step()
    first, second = frames(run)
    assert first.alignment is not None
    assert second.alignment is not None
    assert first.alignment.info[:, 3].tolist() == [0.0]
    assert second.alignment.info[:, 3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("options", [{"gradients": False}, {"weight_alignment": False}])
def test_switched_off(run: Path, options: dict[str, bool]) -> None:
    job = Job()
    with observe(job, run=run, every=1, **options):
        job.step()
    (frame,) = frames(run)
    assert frame.alignment is None
    assert (frame.gradients is None) == ("gradients" in options)


def test_value_agrees_with_autograd(run: Path) -> None:
    """Cosine of the two full parameter gradients, of the same pass with dropout on, against the sampled estimate."""
    context, batch, draws = 64, 32, 12
    torch.manual_seed(0)
    model = ByteGPT(GPTOptions(num_layers=2, width=32, num_heads=2, context=context, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text, generator = load_bytes(context=context), torch.Generator().manual_seed(0)

    def loss_of() -> torch.Tensor:
        inputs, targets = draw_batch(text, batch, context, generator)
        return F.cross_entropy(model(inputs).view(-1, 256), targets.reshape(-1))

    for _ in range(60):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    truth = Truth(model, ["blocks.0", "blocks.1"])
    weights = [model.get_parameter(f"blocks.{index}.mlp.2.weight") for index in range(2)]
    cosines = []
    with attach(model, optimizer, run=run, every=1, patches=64) as monitor:
        for _ in range(draws):
            optimizer.zero_grad()
            loss = loss_of()
            entropies = [patch_matrix_entropy(truth.outputs[f"blocks.{index}"]).mean() for index in range(2)]
            of_entropy = [
                torch.autograd.grad(entropy, weight, retain_graph=True)[0]
                for entropy, weight in zip(entropies, weights, strict=True)
            ]
            loss.backward()
            cosines.append(
                [
                    float(F.cosine_similarity(one.flatten(), weight.grad.flatten(), dim=0))
                    for one, weight in zip(of_entropy, weights, strict=True)
                    if weight.grad is not None
                ]
            )
            optimizer.step()
    assert monitor.stats().faults == {}
    errors = []
    for frame, expected in zip(frames(run), cosines, strict=True):
        assert frame.alignment is not None
        parts, info = torch.from_numpy(frame.alignment.parts), torch.from_numpy(frame.alignment.info)
        assert info[:, 3].tolist() == [0.0, 0.0]
        assert info[:, 1].tolist() == [64.0, 64.0]
        assert info[:, 2].tolist() == [256.0, 256.0]
        found = gradient_alignment_from_parts(parts, info[:, 0], info[:, 1])
        errors += ((found.cosine - torch.tensor(expected)) / found.std_error).abs().tolist()
        assert (found.std_error < 0.5).all()
    assert max(abs(value) for pair in cosines for value in pair) > 0.02, "a truth of zero would prove little"
    within = sum(error <= 3 for error in errors)
    assert within >= 0.9 * len(errors), errors
