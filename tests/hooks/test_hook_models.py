"""Models of many shapes: what a layer is, where its tokens lie, and that the frame says the truth about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from entropy_hooks import attach

from .training import Truth, frames, rounded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from entropy_monitor.types import LayerGroup


class Conv1D(nn.Module):
    """A linear layer with its weight stored the other way round, as in GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class TupleBlock(nn.Module):
    """Returns (hidden states, something else)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), Conv1D(24, 12), Conv1D(12, 24)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.down(self.up(self.norm(x)).tanh()), None


class Conv1DModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(300, 12)
        self.h = nn.ModuleList([TupleBlock(), TupleBlock()])
        self.head = nn.Linear(12, 300)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)[0]
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 12)
        self.lstm = nn.LSTM(12, 16, batch_first=batch_first)
        self.head = nn.Linear(16, 300)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(ids))[0])


class Encoder(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 300)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(ids)))


class Twice(nn.Module):
    """One block, run two times: the frame holds its last run."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 12)
        self.shared = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.head = nn.Linear(12, 300)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.shared(self.shared(self.embed(ids))))


@dataclass(frozen=True)
class Case:
    make_model: Callable[[], nn.Module]
    make_inputs: Callable[[], torch.Tensor]
    layers: list[str]
    sequences: Callable[[torch.Tensor], torch.Tensor] = lambda z: z
    """An output as ``[B, T, d]``, written down here independently of the hooks."""
    token_sequences: Callable[[torch.Tensor], torch.Tensor] | None = lambda ids: ids
    """The input ids as ``[B, T]``; None where there are none."""
    options: dict[str, object] | None = None


def token_ids(*shape: int) -> Callable[[], torch.Tensor]:
    """No id twice, so that each token of a batch is known by its activation."""
    return lambda: torch.randperm(300)[: shape[0] * shape[1]].reshape(shape)


def transposed(z: torch.Tensor) -> torch.Tensor:
    return z.transpose(0, 1)


def spatial(z: torch.Tensor) -> torch.Tensor:
    return z.permute(0, 2, 3, 1).reshape(z.shape[0], -1, z.shape[1])


CASES = {
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)),
        lambda: torch.randn(50, 6),
        ["0", "1", "2", "3", "4"],
        lambda z: z[None],
        None,
    ),
    "lstm, batch first": Case(lambda: Recurrent(batch_first=True), token_ids(4, 24), ["lstm"]),
    # As many sequences as tokens: a transposed sample would fit without complaint.
    "lstm, sequence first": Case(
        lambda: Recurrent(batch_first=False), token_ids(16, 16), ["lstm"], transposed, transposed
    ),
    "transformer, sequence first": Case(
        lambda: Encoder(batch_first=False),
        token_ids(16, 16),
        ["encoder.layers.0", "encoder.layers.1"],
        transposed,
        transposed,
    ),
    "transformer, batch first": Case(
        lambda: Encoder(batch_first=True), token_ids(16, 16), ["encoder.layers.0", "encoder.layers.1"]
    ),
    "token_dim by hand": Case(
        lambda: nn.Sequential(nn.Embedding(300, 12), nn.Linear(12, 12), nn.Tanh()),
        token_ids(16, 16),
        ["1", "2"],
        transposed,
        transposed,
        {"token_dim": 0, "layers": ["1", "2"]},
    ),
    "cnn": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1)),
        lambda: torch.randn(3, 3, 5, 7),
        ["0", "1", "2"],
        spatial,
        None,
    ),
    "conv1d blocks that return tuples": Case(Conv1DModel, token_ids(4, 24), ["h.0", "h.1"]),
    "layers by glob": Case(
        Conv1DModel,
        token_ids(4, 24),
        ["h.0.norm", "h.0.down", "h.1.norm", "h.1.down"],
        options={"layers": ["h.*.norm", "h.?.down"]},
    ),
    "one layer by name": Case(Conv1DModel, token_ids(4, 24), ["h.1"], options={"layers": "h.1"}),
    "a module run twice": Case(Twice, token_ids(4, 24), ["shared"], options={"layers": ["shared"]}),
}


def by_layer(groups: tuple[LayerGroup, ...]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for group in groups:
        assert group.gradients is not None
        for index, layer in enumerate(group.layers):
            found[layer] = torch.from_numpy(group.activations[index]), torch.from_numpy(group.gradients[index])
    return found


@pytest.mark.parametrize("name", CASES)
def test_model(name: str, run: Path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, inputs = case.make_model(), case.make_inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, run=run, every=1, patches=6, **(case.options or {})) as monitor:
        truth = Truth(model, case.layers)
        output = model(inputs)
        loss = (output[0] if isinstance(output, tuple) else output).square().mean()
        loss.backward()
        optimizer.step()
    assert monitor.stats().faults == {}
    (frame,) = frames(run)
    stored = by_layer(frame.groups)
    assert set(stored) == set(case.layers)
    assert frame.scalars["loss"] == pytest.approx(loss.item(), rel=1e-6)
    num_tokens = 8 * frame.num_patches
    assert num_tokens == 48

    # The first layer tells which tokens were drawn; every other layer must have the same ones.
    sequences = rounded(case.sequences(truth.activation(case.layers[0])))
    num_sequences, length, width = sequences.shape
    equal = (stored[case.layers[0]][0][:num_tokens, None] == sequences.reshape(-1, width)).all(-1)
    assert (equal.sum(1) == 1).all()
    flat = equal.long().argmax(1)
    starts = flat[::8]
    assert (flat == (starts[:, None] + torch.arange(8)).reshape(-1)).all(), "8 consecutive tokens"
    assert (starts % length % 8 == 0).all()
    assert len(set(starts.tolist())) == 6
    assert len({int(start) // length for start in starts}) == min(6, num_sequences)
    for layer, (activation, gradient) in stored.items():
        for found, expected in ((activation, truth.activation(layer)), (gradient, truth.gradient(layer))):
            rows = rounded(case.sequences(expected)).reshape(num_sequences * length, -1)[flat]
            assert torch.equal(found[:num_tokens], rows)

    if case.token_sequences is None:
        assert frame.token_windows is None
        assert frame.num_tokens_seen == 0
        return
    ids = nn.functional.pad(case.token_sequences(inputs), (2, 3), value=-1)
    assert frame.token_windows is not None
    for token, window in zip(flat.tolist(), frame.token_windows[:num_tokens].tolist(), strict=True):
        sequence, place = divmod(token, length)
        assert window == ids[sequence, place : place + 6].tolist()
    assert frame.num_tokens_seen == inputs.numel()
