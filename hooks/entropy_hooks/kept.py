"""What is kept of one compiled pass, to run it again before the optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from entropy_hooks.entries import Entries

if TYPE_CHECKING:
    from entropy_hooks.loss import LossReading
    from entropy_hooks.part import Part
    from entropy_hooks.surroundings import Look
    from entropy_hooks.twin import Twin
    from entropy_hooks.undisturbed import AutocastState
    from entropy_hooks.writes import Writes

_ENTERS_ELSEWHERE = (
    "expected the loss to be computed from what a compiled model returns or leaves in attributes; found that it also "
    "uses what lies within (handed out by a hook, a gradient penalty?)"
)


@dataclass(slots=True)
class Told:
    """What training's own pass has told of what the model gives: the last outputs are those it leaves in attributes."""

    outputs: list[torch.Tensor | None] = field(default_factory=list["torch.Tensor | None"])
    """A few entries of each output that has a gradient."""
    gradients: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    """What the backward pass gave to each output; of a part, at its rows."""
    behind: dict[int, frozenset[int]] = field(default_factory=dict[int, frozenset[int]])
    """For an output of which others were computed, these: its gradient holds what came by them."""
    entries: Entries = field(default_factory=Entries)
    unclear: str | None = None
    """Why the gradients of the layers cannot be told from those of the outputs."""
    new: list[str] = field(default_factory=list[str])
    """Where the pass has left results in attributes."""

    def add_gradient(self, index: int, gradient: torch.Tensor) -> None:
        """One has come to an output; another comes if the loop runs backward twice."""
        before = self.gradients.get(index)
        self.gradients[index] = gradient if before is None else before + gradient


@dataclass(slots=True, weakref_slot=True)
class Kept:
    """A pass on its way."""

    twin: Twin
    writes: Writes
    look: Look
    """At what lies outside the model, before the pass."""
    autocast: AutocastState
    left: dict[str, torch.Tensor]
    """What lay in attributes before the pass."""
    told: Told = field(default_factory=Told)
    part: Part | None = None
    """Sequences that are run again; None runs the whole batch."""
    spare: Twin | None = None
    """For the whole batch, until it is known that a part can be run."""
    comparable: bool = True
    """The outputs that were told are of what is run again."""
    fits: bool = True
    """Nothing has been found against running it again."""
    loss: LossReading | None = None
    """Of its backward pass."""

    def begin_backward(self, roots: tuple[Any, ...], loss: LossReading | None) -> None:
        """Its backward pass has come.

        Args:
            roots: where that began.
            loss: what they say.
        """
        self.loss = loss
        if not self.told.entries.are_all_of(roots):
            self.told.unclear = _ENTERS_ELSEWHERE
