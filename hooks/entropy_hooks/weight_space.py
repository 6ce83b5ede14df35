"""Weight-space alignment: partial sums on the trainer's device, just before the optimizer steps.

The MBE gradient of a weight is known only where the layer writes straight into the observed activation. That is found
at run time and checked by the gradients themselves; where the check fails the layer is undetermined, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from entropy_monitor.estimators import patch_matrix_entropy_gradient, projected_weight_alignment_parts
from entropy_monitor.types import NUM_JACKKNIFE_GROUPS, PATCH_LENGTH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from entropy_hooks.capture import Capture

STATUS_VALID, STATUS_NO_LINEAR, STATUS_CHECK_FAILED, STATUS_SHARDED, STATUS_STEERED = range(5)

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative difference of the two gradients that rounding explains."""
_MAX_STACKED = 1 << 25
"""Entries of layer inputs reduced at once, 128 MB in float32."""


def writes_features(module: nn.Module) -> tuple[torch.Tensor, int, bool] | None:
    """Recognise a linear layer.

    Returns:
        Its weight, its output features and whether the weight is stored transposed; None for other modules.
    """
    if isinstance(module, nn.Linear):
        return module.weight, module.out_features, False
    if type(module).__name__ == "Conv1D":
        weight, features = module.weight, getattr(module, "nf", None)
        return (weight, features, True) if isinstance(weight, torch.Tensor) and isinstance(features, int) else None
    return None


@dataclass(frozen=True, slots=True)
class WeightSpace:
    """Partial sums of the weight-space alignment of every observed layer, on the device."""

    parts: dict[str, torch.Tensor]
    """Per layer ``[16, 3]``, see `types.AlignmentParts`."""
    info: dict[str, torch.Tensor]
    """Per layer ``[4]``: gradient norm, sampled patches, patches in the batch, status."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A layer whose alignment can be reduced."""

    layer: str
    activation_ND: torch.Tensor
    gradient_ND: torch.Tensor
    inputs_NE: torch.Tensor
    linear_gradient_ND: torch.Tensor
    weight_gradient_DE: torch.Tensor


def reduce_layers(capture: Capture, contaminated: frozenset[str], num_batch_patches: int) -> WeightSpace:
    """Reduce the alignment of every observed layer, before the optimizer changes or clears the gradients.

    Layers of equal shapes are reduced together: a GPU would otherwise wait for hundreds of small launches.

    Args:
        capture: the observed pass.
        contaminated: layers whose loss gradient holds steering terms.
        num_batch_patches: whole patches in the optimizer step's batch on this rank.

    Returns:
        Parts and info of each layer. On the device, nothing synchronised.
    """
    parts: dict[str, torch.Tensor] = {}
    info: dict[str, torch.Tensor] = {}
    alike: dict[tuple[object, ...], list[_Candidate]] = {}
    for layer, activation in capture.activations.items():
        found = _examine(capture, layer, contaminated)
        if isinstance(found, _Candidate):
            key = (activation.shape, found.inputs_NE.shape, found.gradient_ND.dtype, found.linear_gradient_ND.dtype)
            alike.setdefault(key, []).append(found)
        else:
            parts[layer] = torch.full((NUM_JACKKNIFE_GROUPS, 3), float("nan"), device=activation.device)
            info[layer] = torch.full((4,), float("nan"), device=activation.device)
            info[layer][3].fill_(found)  # filled, not built from a list: a copy from the host waits for the device
    for candidates in alike.values():
        at_once = max(1, _MAX_STACKED // candidates[0].inputs_NE.numel())
        for first in range(0, len(candidates), at_once):
            few = candidates[first : first + at_once]
            parts_LG3, info_L4 = _reduce(few, num_batch_patches)
            for index, candidate in enumerate(few):
                parts[candidate.layer], info[candidate.layer] = parts_LG3[index], info_L4[index]
    return WeightSpace({layer: parts[layer] for layer in capture.activations}, info)


def _examine(capture: Capture, layer: str, contaminated: frozenset[str]) -> _Candidate | int:
    """Collect what the reduction needs.

    Returns:
        The candidate, or the status that says why there is none.
    """
    gradient, linear = capture.gradients.get(layer), capture.linears.get(layer)
    if layer in contaminated:
        return STATUS_STEERED
    if gradient is None or linear is None:
        return STATUS_NO_LINEAR
    weight_gradient = linear.weight.grad if linear.weight_gradient is None else linear.weight_gradient
    if weight_gradient is None:
        return STATUS_NO_LINEAR
    if linear.output_gradient is None:  # the block overwrote its output in place, or ran without a graph
        return STATUS_CHECK_FAILED
    weight_gradient = weight_gradient.detach()
    if hasattr(weight_gradient, "placements"):  # DTensor: this rank holds a shard of it
        return STATUS_SHARDED
    return _Candidate(
        layer,
        capture.activations[layer],
        gradient,
        linear.inputs,
        linear.output_gradient,
        weight_gradient.T if linear.transposed else weight_gradient,
    )


def _reduce(candidates: Sequence[_Candidate], num_batch_patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    activation_LND = torch.stack([candidate.activation_ND for candidate in candidates]).float()
    inputs_LNE = torch.stack([candidate.inputs_NE for candidate in candidates]).float()
    mask_LND, status_L = _identity_path(
        torch.stack([candidate.gradient_ND for candidate in candidates]),
        torch.stack([candidate.linear_gradient_ND for candidate in candidates]),
    )
    h_LND = patch_matrix_entropy_gradient(activation_LND, patch=PATCH_LENGTH) * mask_LND
    # Weights are met one by one: stacked, those of a large model would not fit beside it.
    weight_gradients = [candidate.weight_gradient_DE.float() for candidate in candidates]
    projection_LNE = torch.stack([h_ND @ weight_DE for h_ND, weight_DE in zip(h_LND, weight_gradients, strict=True)])
    parts_LG3 = projected_weight_alignment_parts(inputs_LNE, h_LND, projection_LNE, PATCH_LENGTH, NUM_JACKKNIFE_GROUPS)
    info_L4 = torch.empty(len(candidates), 4, device=activation_LND.device)
    info_L4[:, 0] = torch.stack([weight_DE.norm() for weight_DE in weight_gradients])
    info_L4[:, 1].fill_(activation_LND.shape[1] // PATCH_LENGTH)
    info_L4[:, 2].fill_(num_batch_patches)
    info_L4[:, 3] = status_L
    return parts_LG3, info_L4


def _identity_path(gradient_LND: torch.Tensor, linear_gradient_LND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Does the gradient at the linear layer equal the one at the activation, up to a dropout mask?

    Returns:
        The mask ``[L, n, d]`` to apply to the MBE gradient as well, and the status ``[L]``.
    """
    tolerance = max(_TOLERANCE.get(kind.dtype, 1e-4) for kind in (gradient_LND, linear_gradient_LND))
    outer, inner = gradient_LND.float(), linear_gradient_LND.float()
    # Where the outer gradient is 0 (a token without a loss) the mask cannot be seen and is taken as "kept".
    dropped = (inner == 0) & (outer != 0)
    kept = outer.masked_fill(dropped, 0)
    scale_L11 = (kept * inner).sum((1, 2), keepdim=True) / kept.square().sum((1, 2), keepdim=True)
    residual_L = (inner - scale_L11 * kept).norm(dim=(1, 2))
    passes_L = residual_L <= tolerance * inner.norm(dim=(1, 2))  # False for NaN
    status_L = torch.where(passes_L, float(STATUS_VALID), float(STATUS_CHECK_FAILED))
    return torch.where(dropped, torch.zeros_like(scale_L11), scale_L11), status_L
