"""Models that a second forward pass could disturb, and the truth about a probe, taken from a copy of the model."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from entropy_monitor.estimators import patch_matrix_entropy

from .training import Job, byte_loss, tiny_gpt

if TYPE_CHECKING:
    from collections.abc import Callable

    from entropy_monitor.demo.model import ByteGPT


def noisy_gpt() -> ByteGPT:
    return tiny_gpt(dropout=0.3)


class Normalised(nn.Module):
    """Batch statistics that training updates, and a buffer that counts every forward pass, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(2)])
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 256)
        self.count: torch.Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.count += 1  # in place
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x.flatten(0, 1)).view_as(x)) * (1 + self.count / 100)


class Replacing(Normalised):
    """Puts a new tensor in the place of its buffer instead."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        return super().forward(tokens)


class AlwaysDropping(Normalised):
    """Draws random numbers in eval mode too."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(tokens), 0.2, training=True)


class DrawingElsewhere(Normalised):
    """Draws from Python's and numpy's global generators."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * (1 + random.random() + np.random.rand())


class Renormalised(Normalised):
    """`max_norm` rescales the rows of an embedding in its forward pass: a parameter changes, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 16, max_norm=1.0)


class RenormalisedFrozen(Renormalised):
    def __init__(self) -> None:
        super().__init__()
        self.embed.weight.requires_grad_(False)


def tied_gpt() -> ByteGPT:
    model = tiny_gpt()
    model.head.weight = model.bytes.weight
    return model


class Checkpointed(nn.Module):
    """Blocks are run again in the backward pass."""

    def __init__(self, *, use_reentrant: bool = False) -> None:
        super().__init__()
        self.inner, self.use_reentrant = noisy_gpt(), use_reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inner = self.inner
        x = inner.bytes(tokens) + inner.positions(torch.arange(tokens.shape[1]))
        for block in inner.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return inner.head(inner.norm(x))


class InPlace(nn.Module):
    """Each block writes into what the block before it returned."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x += self.down(self.up(x.clone()).tanh())
            return x

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 16)
        self.blocks = nn.ModuleList([self.Block() for _ in range(3)])
        self.head = nn.Linear(16, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Recurrent(nn.Module):
    """Keeps a list of its weights beside the registered ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 12)
        self.lstm = nn.LSTM(12, 16, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(16, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


def half_frozen() -> ByteGPT:
    model = noisy_gpt()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout": noisy_gpt,
    "batch norm and a counter": Normalised,
    "a buffer replaced": Replacing,
    "dropout in eval mode too": AlwaysDropping,
    "draws from Python and numpy": DrawingElsewhere,
    "max_norm": Renormalised,
    "max_norm, frozen": RenormalisedFrozen,
    "tied weights": tied_gpt,
    "checkpointed": Checkpointed,
    "checkpointed, reentrant": lambda: Checkpointed(use_reentrant=True),
    "in place": InPlace,
    "recurrent": Recurrent,
    "half frozen": half_frozen,
}


class Seen:
    """Everything of a training job that a probe must leave alone."""

    def __init__(self, make_model: Callable[[], nn.Module]) -> None:
        self.job = Job(make_model)
        self.job.model.register_parameter("shift", nn.Parameter(torch.zeros(())))  # no gradient: stays None
        self.calls: list[float] = []
        """What the user's own hook on a parameter saw."""
        weight = self.job.model.get_parameter("head.weight" if hasattr(self.job.model, "head") else "inner.head.weight")
        weight.register_hook(lambda gradient: self.calls.append(gradient.abs().sum().item()))
        list(self.job.model.modules())[-1].training = False  # a flag that no `model.train()` would leave like this
        self.gradients: list[list[torch.Tensor | None]] = []
        self.job.optimizer.register_step_pre_hook(lambda *_: self._keep_gradients())

    def _keep_gradients(self) -> None:
        self.gradients.append([p.grad if p.grad is None else p.grad.clone() for p in self.job.model.parameters()])

    def run(self, steps: int, **options: Any) -> Seen:
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        self.job.run(steps, **options)
        self.random_state = torch.get_rng_state()
        self.other_random_state = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
        return self

    def assert_same(self, expected: Seen) -> None:
        """Bit for bit."""
        assert self.job.losses == expected.job.losses
        assert self.calls == expected.calls
        assert torch.equal(self.random_state, expected.random_state)
        assert self.other_random_state == expected.other_random_state
        ours, theirs = self.job.model.state_dict(), expected.job.model.state_dict()
        assert list(ours) == list(theirs)
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
        for one, other in zip(self.gradients, expected.gradients, strict=True):
            for gradient, truth in zip(one, other, strict=True):
                assert (gradient is None) == (truth is None)
                assert gradient is None or truth is None or torch.equal(gradient, truth)
        flags = [[module.training for module in seen.job.model.modules()] for seen in (self, expected)]
        assert flags[0] == flags[1]


class Truth:
    """Loss, activations and gradients of another model with the same parameters, by autograd through the entropy."""

    def __init__(
        self, model: nn.Module, state: dict[str, torch.Tensor], tokens: torch.Tensor, last_linears: dict[str, str]
    ) -> None:
        model.load_state_dict(state)
        outputs: dict[str, torch.Tensor] = {}

        def see(name: str, output: Any) -> torch.Tensor | None:
            z = output[0] if isinstance(output, tuple) else output
            # A block may write into the tensor that the one before it returned: give it a copy to write into.
            outputs[name] = z
            return z.clone() if isinstance(output, torch.Tensor) else None

        for name in last_linears:
            model.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: see(name, output))
        loss = F.cross_entropy(model.eval()(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        self.loss, self.outputs = loss.item(), outputs
        parameters = {name: entry for name, entry in model.named_parameters() if entry.requires_grad}
        self.loss_gradients = _gradients(loss, parameters)
        gradients = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True)
        self.output_gradients = dict(zip(outputs, gradients, strict=True))
        self.cosines: dict[str, list[float]] = {}
        for layer, linear in last_linears.items():
            of_entropy = _gradients(patch_matrix_entropy(outputs[layer]).mean(), parameters)
            sides = (self.loss_gradients, of_entropy)
            every = [torch.cat([gradient.flatten() for gradient in side.values()]) for side in sides]
            weight = f"{layer}.{linear}.weight"
            one = [side[weight].flatten() for side in sides] if weight in parameters else None
            self.cosines[layer] = [
                float("nan") if one is None else F.cosine_similarity(*one, dim=0).item(),
                F.cosine_similarity(*every, dim=0).item(),
            ]


def _gradients(root: torch.Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(root, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }


def snapshots(job: Job) -> list[dict[str, torch.Tensor]]:
    """The model's state before each optimizer step: the parameters that its frame holds."""
    found: list[dict[str, torch.Tensor]] = []
    job.optimizer.register_step_pre_hook(
        lambda *_: found.append({name: value.clone() for name, value in job.model.state_dict().items()})
    )
    return found


def next_byte_loss(tokens: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    """A probe as a user writes it: next bytes of a batch of their own."""
    return lambda model: byte_loss(model(tokens)[:, :-1], tokens[:, 1:])
