"""What the hooks gather in one sampled step, still on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from entropy_hooks.faults import Faults
    from entropy_hooks.loss import LossReading
    from entropy_hooks.tokens import PatchSample, TokenAxes


@dataclass(slots=True)
class LinearSample:
    """The last linear layer that wrote into a block's output, at the sampled tokens."""

    module: torch.nn.Module
    weight: torch.Tensor
    transposed: bool
    """The weight is stored ``[d_in, d]`` (Hugging Face `Conv1D`)."""
    inputs: torch.Tensor
    """As the layer saw them; ``[n, d_in]`` once the block has ended."""
    output_shape: torch.Size
    output_gradient: torch.Tensor | None = None
    """Shape ``[n, d]``."""
    weight_gradient: torch.Tensor | None = None
    """Of a probe's pass; None takes ``weight.grad``, which training has left."""


@dataclass(slots=True)
class Capture:
    """One forward and backward pass; a later micro-batch replaces it."""

    sample: PatchSample | None = None
    """Drawn at the first tapped layer; the same for all."""
    too_short: bool = False
    activations: dict[str, torch.Tensor] = field(default_factory=dict)
    """Layer to ``[n, d]``."""
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Layer to ``[n, d]``; filled in the backward pass."""
    linears: dict[str, LinearSample] = field(default_factory=dict)
    """Layer to the newest linear layer seen inside it."""
    axes: dict[str, TokenAxes] = field(default_factory=dict)
    """Layer to where its tokens lie."""
    loss: LossReading | None = None
    """Of this pass."""
    token_ids: torch.Tensor | None = None
    """Shape ``[B, T]``: input of the embedding."""

    def add(
        self, layer: str, axes: TokenAxes, sequences: torch.Tensor, linear: LinearSample | None, faults: Faults
    ) -> bool:
        """Gather the sampled tokens of a layer, as soon as it has run.

        Args:
            layer: its name.
            axes: where its tokens lie.
            sequences: its output, ``[B, T, d]``.
            linear: the last linear layer in it that made an output of that shape.
            faults: where it is counted if it has other tokens than were drawn from.

        Returns:
            Whether it has the tokens that were drawn from.
        """
        sample = self.sample
        if sample is None or not sample.fits(sequences):
            faults.count("other_tokens", f"{layer} has other tokens than the first tapped layer: left out")
            return False
        self.activations[layer], self.axes[layer] = sample.select(sequences), axes
        if linear is not None and sample.fits(inputs := axes.sequences(linear.inputs)):
            linear.inputs = sample.select(inputs)
            self.linears[layer] = linear
        return True
