"""What is observed and steered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Target:
    """One model in training."""

    model: nn.Module
    """The user's module, unwrapped."""
    called: nn.Module
    """What the user's code calls: the model, or what wraps it."""
    optimizers: tuple[Optimizer, ...]
    """Whose steps are one step together."""
    taps: Mapping[str, nn.Module]
    steered: tuple[str, ...]
    probe: Callable[[nn.Module], torch.Tensor] | None
    """The user's function that runs the model on a fixed batch and returns its loss."""

    @property
    def contaminated(self) -> frozenset[str]:
        """Layers at or before the last steered one: while steering, their loss gradient holds injected terms."""
        names = tuple(self.taps)
        return frozenset(names[: 1 + max(names.index(name) for name in self.steered)])
