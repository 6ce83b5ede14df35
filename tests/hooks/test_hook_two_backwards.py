"""A loop that runs backward once for each of several losses is observed as if it had added them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from entropy_hooks import attach
from entropy_monitor.estimators import patch_matrix_entropy

from .compiled import BATCH, TOKENS, VOCABULARY, Net, wrapped_for_eager
from .training import command, flushed, frames, queued, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from entropy_monitor.types import Frame

LOSSES = [
    lambda logits, ids: F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
    lambda logits, ids: logits.pow(2).mean(),
]

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def as_sum(logits: torch.Tensor, ids: torch.Tensor, scales: tuple[float, float]) -> float:
    loss = sum(scale * loss(logits, ids) for scale, loss in zip(scales, LOSSES, strict=True))
    loss.backward()  # type: ignore[union-attr]
    return float(loss.detach())  # type: ignore[union-attr]


def apart(logits: torch.Tensor, ids: torch.Tensor, scales: tuple[float, float]) -> float:
    total = 0.0
    for scale, loss in zip(scales, LOSSES, strict=True):
        term = scale * loss(logits, ids)
        term.backward(retain_graph=True)
        total += float(term.detach())
    return total


def eager(model: nn.Module) -> nn.Module:
    return model


def blocks_compiled(model: nn.Module) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="eager")  # others free what a second backward pass needs
    return model


def train(
    run: Path,
    compile_it: Callable[[nn.Module], nn.Module],
    backward: Callable[..., float],
    scales: tuple[float, float] = (1.0, 1.0),
    *,
    accumulate: int = 1,
    **options: Any,
) -> tuple[list[float], list[Frame], dict[str, int]]:
    torch.manual_seed(0)
    model = Net()
    called = compile_it(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / scales[0])
    monitor = attach(called, optimizer, run=run, every=1, patches=512, **options)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(accumulate):
            ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
            loss = backward(called(ids), ids, scales)
        losses.append(loss)
        optimizer.step()
        assert flushed(monitor)
    monitor.detach()
    return losses, frames(run), dict(monitor.stats().faults)


def norms(frame: Frame) -> list[float]:
    """Of each layer's gradients: in which order all the patches were drawn makes no difference."""
    found = [np.asarray(group.gradients, dtype=float) for group in frame.groups]
    return [float(np.linalg.norm(layer)) for group in found for layer in group]


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 0.1), (64.0, 6.4)])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("compile_it", [eager, blocks_compiled, wrapped_for_eager])
def test_they_count_as_one_pass_of_the_sum(
    tmp_path: Path, compile_it: Callable[[nn.Module], nn.Module], accumulate: int, scales: tuple[float, float]
) -> None:
    _, second = scales
    summed_as = (1.0, second / scales[0])
    losses, summed, faults = train(tmp_path / "sum", compile_it, as_sum, summed_as, accumulate=accumulate)
    same_losses, parted, same_faults = train(tmp_path / "apart", compile_it, apart, scales, accumulate=accumulate)
    assert [loss / scales[0] for loss in same_losses] == pytest.approx(losses, rel=1e-5)
    assert faults == same_faults == {}
    assert [frame.step for frame in parted] == [0, 1, 2, 3]
    for one, other, loss in zip(summed, parted, losses, strict=True):
        assert other.scalars["loss"] == pytest.approx(loss, rel=1e-5)
        assert norms(other) == pytest.approx(norms(one), rel=1e-2)


def test_a_gradient_through_an_older_pass_is_not_added(tmp_path: Path) -> None:
    def twice(called: nn.Module, ids: torch.Tensor, *, again: bool) -> None:
        one, two = called(ids), called(ids)
        LOSSES[0](one, ids).backward(retain_graph=True)
        LOSSES[0](two, ids).backward()
        if again:
            (100 * LOSSES[0](one, ids)).backward()

    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model, run = Net(), tmp_path / str(again)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        monitor = attach(model, optimizer, run=run, every=1, patches=512)
        for _ in range(2):
            optimizer.zero_grad()
            twice(model, torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % VOCABULARY, again=again)
            optimizer.step()
            assert flushed(monitor)
        monitor.detach()
        found.append([norms(frame) for frame in frames(run)])
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-2)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-2)


def test_steering_is_added_once(tmp_path: Path) -> None:
    weight = 0.5
    torch.manual_seed(0)
    model = Net()
    outputs: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = tmp_path / "run"
    steered_layer = "blocks.1"
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    with attach(model, optimizer, run=run, every=1, steer=True, steer_layers=[steered_layer]) as monitor:
        command(run, "compress", weight=weight)
        wait_until(lambda: queued(monitor), "the command")
        optimizer.zero_grad()
        apart(model(ids), ids, (1.0, 1.0))
        optimizer.step()
        assert monitor.phase == "compress"
        optimizer.zero_grad()
        apart(model(ids), ids, (1.0, 1.0))
        found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]
    model.blocks[1].register_forward_hook(lambda *args: outputs.append(args[2]))
    optimizer.zero_grad()
    logits = model(ids)
    entropy = patch_matrix_entropy(outputs[0], 8, normalize=True).mean()
    (sum(loss(logits, ids) for loss in LOSSES) + weight * entropy).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]
    assert (found - expected).norm() / expected.norm() < 1e-5
