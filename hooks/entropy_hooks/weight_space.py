"""Weight-space alignment at one layer: partial sums on the trainer's device, just before the optimizer steps.

The MBE gradient of a weight is known only where the layer writes straight into the observed activation. That is found
at run time and checked by the gradients themselves; where the check fails the layer is undetermined, never guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from entropy_monitor.estimators import patch_matrix_entropy_gradient, weight_alignment_parts
from entropy_monitor.types import NUM_JACKKNIFE_GROUPS, PATCH_LENGTH

if TYPE_CHECKING:
    from entropy_hooks.capture import LinearSample

STATUS_VALID, STATUS_NO_LINEAR, STATUS_CHECK_FAILED, STATUS_SHARDED, STATUS_STEERED = range(5)

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative difference of the two gradients that rounding explains."""


def writes_features(module: nn.Module) -> tuple[nn.Parameter, int, bool] | None:
    """Recognise a linear layer.

    Returns:
        Its weight, its output features and whether the weight is stored transposed; None for other modules.
    """
    if isinstance(module, nn.Linear):
        return module.weight, module.out_features, False
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        weight = module.weight
        return (weight, module.nf, True) if isinstance(weight, nn.Parameter) else None  # type: ignore[return-value]
    return None


def undetermined_parts(status: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What is stored for a layer without a valid alignment.

    Returns:
        Parts ``[16, 3]`` and info ``[4]``.
    """
    parts = torch.full((NUM_JACKKNIFE_GROUPS, 3), float("nan"), device=device)
    info = torch.full((4,), float("nan"), device=device)
    info[3].fill_(status)  # filled, not built from a list: a copy from the host would wait for the device
    return parts, info


def alignment_parts(
    activation: torch.Tensor, gradient: torch.Tensor, linear: LinearSample | None, num_batch_patches: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums of one layer's weight-space alignment.

    Args:
        activation: the layer's output at the sampled tokens, ``[n, d]``.
        gradient: the loss gradient there, ``[n, d]``.
        linear: the last linear layer that ran inside the layer, or None.
        num_batch_patches: whole patches in the optimizer step's batch on this rank.

    Returns:
        Parts ``[16, 3]`` and info ``[4]``: gradient norm, sampled patches, patches in the batch, status. On the
        device, nothing synchronised.
    """
    device = activation.device
    if linear is None or linear.output_gradient is None or linear.weight.grad is None:
        return undetermined_parts(STATUS_NO_LINEAR, device)
    weight_gradient = linear.weight.grad.detach()
    if hasattr(weight_gradient, "placements"):  # DTensor: this rank holds a shard of it
        return undetermined_parts(STATUS_SHARDED, device)
    if linear.transposed:
        weight_gradient = weight_gradient.T
    mask, status = _identity_path(gradient, linear.output_gradient)
    entropy_gradient = patch_matrix_entropy_gradient(activation.float(), patch=PATCH_LENGTH)
    parts = weight_alignment_parts(
        linear.inputs.float(), entropy_gradient * mask, weight_gradient.float(), PATCH_LENGTH, NUM_JACKKNIFE_GROUPS
    )
    info = torch.empty(4, device=device)
    info[0] = weight_gradient.float().norm()
    info[1].fill_(activation.shape[0] // PATCH_LENGTH)
    info[2].fill_(num_batch_patches)
    info[3] = status
    return parts, info


def _identity_path(gradient_ND: torch.Tensor, linear_gradient_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Does the gradient at the linear layer equal the one at the activation, up to a dropout mask?

    Returns:
        The mask ``[n, d]`` to apply to the MBE gradient as well, and the status, 0-d.
    """
    tolerance = max(_TOLERANCE.get(kind.dtype, 1e-4) for kind in (gradient_ND, linear_gradient_ND))
    outer, inner = gradient_ND.float(), linear_gradient_ND.float()
    # Where the outer gradient is 0 (a token without a loss) the mask cannot be seen and is taken as "kept".
    dropped = (inner == 0) & (outer != 0)
    kept_outer = outer.masked_fill(dropped, 0)
    scale = (kept_outer * inner).sum() / kept_outer.square().sum()
    residual = (inner - scale * kept_outer).norm()
    passes = residual <= tolerance * inner.norm()  # False for NaN
    status = torch.where(passes, float(STATUS_VALID), float(STATUS_CHECK_FAILED))
    return torch.where(dropped, torch.zeros_like(scale), scale), status
