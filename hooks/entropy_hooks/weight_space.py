"""Weight-space alignment: partial sums of each layer, from the gradients that stand just before the optimizer steps.

The MBE gradient of a weight is known only where the layer writes straight into the observed activation. That is found
at run time and checked by the gradients themselves; where the check fails the layer is undetermined, never guessed.

On a GPU the sums are launched at once. On the CPU the training thread copies the weights' gradients, which the next
step overwrites, and the writer thread does the arithmetic.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from entropy_hooks.buffers import Buffers
from entropy_hooks.capture import LinearSample
from entropy_monitor.estimators import patch_matrix_entropy_gradient, projected_weight_alignment_parts
from entropy_monitor.types import NUM_JACKKNIFE_GROUPS, PATCH_LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from entropy_hooks.capture import Capture

STATUS_VALID, STATUS_NO_LINEAR, STATUS_CHECK_FAILED, STATUS_SHARDED, STATUS_STEERED = range(5)

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative difference of the two gradients that rounding explains."""
_MAX_STACKED = 1 << 25
"""Entries of layer inputs reduced at once on a GPU, 128 MB in float32."""
_MAX_COPIED = 1 << 25
"""Entries of weight gradients that a frame may keep for the writer; of larger models the sums are made at once."""


def writes_features(module: nn.Module) -> tuple[torch.Tensor, int, bool] | None:
    """Recognise a linear layer with a weight of its own.

    A weight that is computed (`torch.nn.utils.parametrize`) is never asked for: to compute it may move what it keeps,
    as spectral norm does, or draw from the job's random state.

    Returns:
        Its weight, its output features and whether the weight is stored transposed; None for other modules.
    """
    weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    if weight is None:
        return None
    if isinstance(module, nn.Linear):
        return weight, module.out_features, False
    if type(module).__name__ == "Conv1D" and isinstance(features := getattr(module, "nf", None), int):
        return weight, features, True
    return None


def linear_sample(module: nn.Module, args: tuple[Any, ...], output: Any) -> LinearSample | None:
    """Look at a layer that has run.

    Returns:
        What is kept of it; None for one that is not linear.
    """
    recognised = writes_features(module)
    if recognised is None or not args or not isinstance(output, torch.Tensor):
        return None
    weight, _, transposed = recognised
    return LinearSample(module, weight, transposed, args[0].detach(), output.shape)


class Sums(NamedTuple):
    """What the store keeps of the weight-space alignment."""

    parts_LG3: torch.Tensor
    """See `types.AlignmentParts`."""
    info_L4: torch.Tensor
    """Gradient norm, sampled patches, patches in the batch, status."""


@dataclass(frozen=True, slots=True)
class WeightSpace:
    """The weight-space alignment of every observed layer."""

    layers: tuple[str, ...]
    sums: Sums | None
    """On the device; None where they are still to be made."""
    make_sums: Callable[[], Sums]
    """Makes them from tensors that nobody else writes into, on any thread."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A layer whose alignment can be reduced."""

    layer: str
    activation_ND: torch.Tensor
    gradient_ND: torch.Tensor
    inputs_NE: torch.Tensor
    linear_gradient_ND: torch.Tensor
    weight_gradient_DE: torch.Tensor
    ours: bool
    """The weight's gradient belongs to us: no training step will write into it."""


_Family = tuple[_Candidate, ...]
"""Layers that one linear layer writes into, as into an MLP's output and the block's."""


def reduce_layers(capture: Capture, contaminated: frozenset[str], num_batch_patches: int) -> WeightSpace:
    """Reduce the alignment of every observed layer, before the optimizer changes or clears the gradients.

    Args:
        capture: the observed pass.
        contaminated: layers whose loss gradient holds steering terms.
        num_batch_patches: whole patches in the optimizer step's batch on this rank.

    Returns:
        The sums, or how to make them. Nothing is synchronised.
    """
    found = {layer: _examine(capture, layer, contaminated) for layer in capture.activations}
    on_cpu = all(activation.device.type == "cpu" for activation in capture.activations.values())
    families = _families([candidate for candidate in found.values() if isinstance(candidate, _Candidate)])
    deferred = on_cpu and sum(family[0].weight_gradient_DE.numel() for family in families) <= _MAX_COPIED
    if deferred:
        buffers = capture.sample.buffers if capture.sample is not None else Buffers()
        families = [_with_own_weight_gradient(family, buffers) for family in families]
    status = {layer: value for layer, value in found.items() if not isinstance(value, _Candidate)}
    device = next(iter(capture.activations.values())).device
    make_sums = functools.partial(_make_sums, tuple(found), families, status, num_batch_patches, device)
    return WeightSpace(tuple(found), None if deferred else make_sums(), make_sums)


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
        # FSDP shows the layer its whole weight while it runs, and keeps shards otherwise.
        recognised = writes_features(linear.module)
        sharded = recognised is not None and hasattr(recognised[0], "placements")
        return STATUS_SHARDED if sharded else STATUS_NO_LINEAR
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
        linear.weight_gradient is not None,
    )


def _families(candidates: Sequence[_Candidate]) -> list[_Family]:
    families: dict[tuple[object, ...], list[_Candidate]] = {}
    for candidate in candidates:
        weight = candidate.weight_gradient_DE
        key = (id(candidate.inputs_NE), weight.data_ptr(), weight.shape, weight.stride())
        families.setdefault(key, []).append(candidate)
    return [tuple(family) for family in families.values()]


def _with_own_weight_gradient(family: _Family, buffers: Buffers) -> _Family:
    weight_gradient_DE = family[0].weight_gradient_DE
    if family[0].ours:
        return family
    copy = buffers.take(weight_gradient_DE.shape, weight_gradient_DE.dtype).copy_(weight_gradient_DE)
    return tuple(replace(candidate, weight_gradient_DE=copy) for candidate in family)


def _make_sums(
    layers: tuple[str, ...],
    families: Sequence[_Family],
    status: dict[str, int],
    num_batch_patches: int,
    device: torch.device,
) -> Sums:
    """Reduce all families; layers without a candidate get NaN and their status.

    Families of equal shapes are reduced together on a GPU, which would otherwise wait for hundreds of small launches;
    one by one on the CPU, where they fit the caches.

    Returns:
        The sums in the order of `layers`.
    """
    parts: dict[str, torch.Tensor] = {}
    info: dict[str, torch.Tensor] = {}
    for layer, value in status.items():
        parts[layer] = torch.full((NUM_JACKKNIFE_GROUPS, 3), float("nan"), device=device)
        info[layer] = torch.full((4,), float("nan"), device=device)
        info[layer][3].fill_(value)  # filled, not built from a list: a copy from the host waits for the device
    alike: dict[tuple[object, ...], list[_Family]] = {}
    for family in families:
        first = family[0]
        tensors = (first.activation_ND, first.inputs_NE, *(kind for one in family for kind in _gradients(one)))
        key = (len(family), _same_path(family), *((tensor.shape, tensor.dtype) for tensor in tensors))
        alike.setdefault(key, []).append(family)
    with torch.no_grad():
        for group in alike.values():
            at_once = max(1, _MAX_STACKED // group[0][0].inputs_NE.numel()) if device.type != "cpu" else 1
            for begin in range(0, len(group), at_once):
                few = group[begin : begin + at_once]
                sums = _reduce(few, num_batch_patches)
                for index, candidate in enumerate(candidate for family in few for candidate in family):
                    parts[candidate.layer], info[candidate.layer] = sums.parts_LG3[index], sums.info_L4[index]
    return Sums(torch.stack([parts[layer] for layer in layers]), torch.stack([info[layer] for layer in layers]))


def unknown_sums(num_layers: int) -> Sums:
    """What is stored where the sums could not be made.

    Returns:
        NaN, and the status of a failed check.
    """
    info_L4 = torch.full((num_layers, 4), float("nan"))
    info_L4[:, 3] = STATUS_CHECK_FAILED
    return Sums(torch.full((num_layers, NUM_JACKKNIFE_GROUPS, 3), float("nan")), info_L4)


def _gradients(candidate: _Candidate) -> tuple[torch.Tensor, torch.Tensor]:
    return candidate.gradient_ND, candidate.linear_gradient_ND


def _same_path(family: _Family) -> bool:
    """Whether autograd handed on one and the same gradient: nothing stands between linear layer and activation.

    Returns:
        True or False.
    """
    return all(gradient is linear_gradient for gradient, linear_gradient in map(_gradients, family))


def _reduce(families: Sequence[_Family], num_batch_patches: int) -> Sums:
    candidates = [candidate for family in families for candidate in family]
    activation_LND = _stack([candidate.activation_ND for candidate in candidates]).float()
    h_LND = patch_matrix_entropy_gradient(activation_LND, patch=PATCH_LENGTH)
    gradient_LND = _stack([candidate.gradient_ND for candidate in candidates])
    if all(map(_same_path, families)):
        square_L = gradient_LND.float().square().sum((1, 2))
        status_L = _status((square_L > 0) & square_L.isfinite())
    else:
        linear_gradient_LND = _stack([candidate.linear_gradient_ND for candidate in candidates])
        mask_LND, status_L = _identity_path(gradient_LND, linear_gradient_LND)
        h_LND = h_LND * mask_LND
    h_FKND = h_LND.unflatten(0, (len(families), -1))
    inputs_F1NE = _stack([family[0].inputs_NE for family in families]).float().unsqueeze(1)
    # Weights are met one by one: stacked, those of a large model would not fit beside it.
    weight_gradients = [family[0].weight_gradient_DE.float() for family in families]
    projection_FKNE = _stack([h_KND @ weight_DE for h_KND, weight_DE in zip(h_FKND, weight_gradients, strict=True)])
    parts_FKG3 = projected_weight_alignment_parts(
        inputs_F1NE, h_FKND, projection_FKNE, PATCH_LENGTH, NUM_JACKKNIFE_GROUPS
    )
    info_L4 = torch.empty(len(candidates), 4, device=activation_LND.device)
    norm_F = torch.stack([weight_DE.norm() for weight_DE in weight_gradients])
    info_L4[:, 0] = norm_F.repeat_interleave(h_FKND.shape[1], output_size=len(candidates))
    info_L4[:, 1].fill_(activation_LND.shape[1] // PATCH_LENGTH)
    info_L4[:, 2].fill_(num_batch_patches)
    info_L4[:, 3] = status_L
    return Sums(parts_FKG3.flatten(0, 1), info_L4)


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _status(passes_L: torch.Tensor) -> torch.Tensor:
    return torch.where(passes_L, float(STATUS_VALID), float(STATUS_CHECK_FAILED))


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
    return torch.where(dropped, torch.zeros_like(scale_L11), scale_L11), _status(passes_L)
