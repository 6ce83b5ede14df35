"""One kept pass, run again in its twin: its layers' activations, and their gradients from those of its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from entropy_hooks.gather import Gathering
from entropy_hooks.outputs import left_in, relations
from entropy_hooks.structures import tensors_in
from entropy_hooks.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from entropy_hooks.faults import Faults
    from entropy_hooks.kept import Kept
    from entropy_hooks.tokens import PatchSampler

BEHIND_A_BREAK = (
    "expected a compiled model to return nothing from which it computes more both in that graph and behind it; found "
    "such an output (a graph break, or a view of it is returned too)"
)
_NO_GRADIENT = "expected a backward pass to reach what a compiled model has returned; found none (written to in place?)"


class Rerun:
    """A pass under way; all of it belongs within `contained`."""

    def __init__(self, kept: Kept, sampler: PatchSampler, faults: Faults) -> None:
        self._kept, self._faults = kept, faults
        self._gathering = Gathering(sampler.draw, faults, weights=False)
        self.capture = self._gathering.capture
        self.outputs: list[torch.Tensor] = []

    def forward(self, token_dim: int | None) -> None:
        """Run the twin, on all of the batch or on the part that was drawn."""
        kept, twin = self._kept, self._kept.twin
        args, kwargs = twin.args, twin.kwargs
        if kept.part is not None:
            args, kwargs = kept.part.of((args, kwargs))
        see = twin.contained.exempt(self._gathering.see)
        watch = Watch(twin.model, twin.taps, token_dim, see, self._faults)
        try:
            outputs, _ = tensors_in(twin.model(*args, **kwargs))
        finally:
            watch.remove()
        self.capture.token_ids = watch.token_ids
        left = left_in(twin.model) if kept.told.new else {}
        self.outputs = [*outputs, *(left.get(name, torch.empty(0)) for name in kept.told.new)]

    def backward(self) -> None:
        """Take the layers' gradients, if they can be told."""
        told, outputs = self._kept.told, self.outputs
        if len(outputs) != len(told.outputs):
            return  # counted as a replay that differs
        gradients = {index: given for index, given in told.gradients.items() if outputs[index].grad_fn is not None}
        unclear = told.unclear or (None if gradients else _NO_GRADIENT) or _differs(told.behind, gradients, outputs)
        if unclear:
            self._faults.count("no_gradients", f"{unclear}: its layers' gradients are undetermined")
            return
        totals = [outputs[index] for index in gradients if index in told.behind]
        self._kept.twin.contained.own(*gradients.values())  # autograd may add to what it is given
        taken = self._gathering.take([outputs[index] for index in gradients], list(gradients.values()), totals)
        self._kept.twin.contained.exempt(self._gathering.keep)(taken)


def _differs(behind: dict[int, frozenset[int]], told: Collection[int], outputs: Sequence[torch.Tensor]) -> str | None:
    """In the replay, which has no compiled graphs, all is seen of how outputs depend on one another.

    Args:
        behind: what training's graph showed of it.
        told: outputs whose gradients are known.
        outputs: of the replay.

    Returns:
        What was not seen where it had to be.
    """
    if not behind.keys() & told:
        return None
    numbers = list(told)
    again = relations([outputs[index] for index in numbers])
    for index, others in zip(numbers, again.behind, strict=True):
        if index in behind and not {numbers[other] for other in others} <= behind[index]:
            return BEHIND_A_BREAK
    return None
