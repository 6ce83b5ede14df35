"""Steering: the gradient of ``weight x MBE`` is added to an activation's gradient; the user's loss stays untouched.

A tensor hook rather than an autograd function: a function's output is a view, and a model that writes into its block's
output in place (``x += f(x)``) would make autograd raise into the user's training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.hooks import unserializable_hook

from entropy_monitor.estimators import patch_matrix_entropy_gradient
from entropy_monitor.types import PATCH_LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch

    from entropy_hooks.faults import Faults
    from entropy_hooks.loss import LossReading
    from entropy_hooks.tokens import TokenAxes


class Steering:
    """Adds ``weight x MBE`` to the loss of a pass, the MBE being the mean of the steered layers'."""

    def __init__(self, layers: Collection[str], loss_scale: float | None, faults: Faults) -> None:
        """Begin.

        Args:
            layers: names of the steered ones.
            loss_scale: d(root)/d(loss) beyond what the graph tells; None where the user has not said.
            faults: where it is counted why a pass was not steered.
        """
        self._injectors = {name: Injector(faults.count) for name in layers}
        self._loss_scale, self._faults = loss_scale, faults
        self.weight = 0.0
        """In force; 0 while the phase is memorize."""

    def steer(self, layer: str, z: torch.Tensor, axes: TokenAxes, first_loss: Callable[[], LossReading | None]) -> None:
        """Steer a layer in the coming backward pass, if it is one to steer.

        Args:
            layer: its name.
            z: its output, which requires a gradient.
            axes: where its tokens lie.
            first_loss: tells, when the gradient comes, whose loss it is; None is not steered. What is added to the loss
                is differentiated once, however often the loop runs backward.
        """
        if self.weight and layer in self._injectors:
            self._injectors[layer].attach_to(z, axes, lambda: self._scale(first_loss()))

    def _scale(self, loss: LossReading | None) -> torch.Tensor | float | None:
        """``weight / steered layers``, times d(root)/d(loss).

        Returns:
            The factor of each layer's MBE gradient; None when nothing may be added.
        """
        if loss is None or not self.weight:
            return None
        if loss.ambiguous and self._loss_scale is None:
            self._faults.count("loss_scale_ambiguous", "several loss terms: give attach(loss_scale=) to steer this job")
            return None
        return loss.scale * ((self._loss_scale or 1.0) * self.weight / len(self._injectors))


class Injector:
    """Adds to one tapped layer's gradients while the phase is compress."""

    def __init__(self, on_fault: Callable[[str, object], None]) -> None:
        self._on_fault = on_fault
        self._early = False
        """Compute the gradient in the forward pass, because the model overwrites its activations."""

    def attach_to(self, z: torch.Tensor, axes: TokenAxes, scale: Callable[[], torch.Tensor | float | None]) -> None:
        """Add ``scale x dMBE/dz`` to the gradient of `z` in the coming backward pass.

        Args:
            z: the layer's output, which requires a gradient.
            axes: where its tokens lie.
            scale: asked when the gradient comes; None adds nothing.
        """
        seen, version = z.detach(), z._version
        early = batch_entropy_gradient(seen, axes) if self._early else None

        @unserializable_hook  # who saves this activation is not warned of our hook on it
        def add(gradient: torch.Tensor) -> torch.Tensor | None:
            try:
                factor = scale()
                if factor is None:
                    return None
                if early is None and seen._version != version:
                    self._early = True
                    self._on_fault(
                        "modified_in_place", "the model overwrites a steered activation: this pass unsteered"
                    )
                    return None
                addition = batch_entropy_gradient(seen, axes) if early is None else early
                return gradient + (factor * addition).to(gradient.dtype)
            except Exception as error:  # counted and logged by on_fault; training goes on
                self._on_fault("steering_failed", error)
                return None

        z.register_hook(add)


def batch_entropy_gradient(z: torch.Tensor, axes: TokenAxes) -> torch.Tensor:
    """Gradient of the row-normalised patch MBE, averaged over all whole patches of a batch (arXiv 2505.08727).

    Args:
        z: activations, laid out as `axes` says.
        axes: where the tokens lie.

    Returns:
        The gradient in the shape of `z`; zero in the incomplete last patch of each sequence.
    """
    sequences = axes.sequences(z)  # Shape [B, T, d]
    gradient = patch_matrix_entropy_gradient(sequences, patch=PATCH_LENGTH, normalize=True)
    return axes.restore(gradient / sequences.shape[0], z)
