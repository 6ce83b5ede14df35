"""What a search has seen of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from entropy_hooks.discovery.own_count import OwnCount


@dataclass(frozen=True, slots=True)
class Stepped:
    """An optimizer that has stepped."""

    optimizer: Optimizer
    num_steps: int
    """Steps seen so far."""
    own_count: OwnCount
    """The optimizer's own count at that moment."""

    @property
    def name(self) -> str:
        """Its class."""
        return type(self.optimizer).__name__


@dataclass(frozen=True, slots=True)
class Seen:
    """One round of the training loop: from a step of an optimizer to its next."""

    stepped: tuple[Stepped, ...]
    """In the order in which they first stepped."""
    roots: tuple[nn.Module, ...]
    """Outermost modules called with gradients enabled, as they were called; none where compiled code may not see our
    hooks."""
