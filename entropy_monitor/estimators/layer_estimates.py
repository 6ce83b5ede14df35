"""Every entropy of a sampled layer, and the activation-space alignment, for the price of one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_monitor.estimators.alignment import Alignment, alignment_of_patches, scaled_gradient
from entropy_monitor.estimators.fitted_influence import fitted_von_neumann
from entropy_monitor.estimators.inputs import Array, as_samples, full_precision, largest_entry, split_patches, trace
from entropy_monitor.estimators.sample_entropies import SampleEntropies, entropies_of_prepared, von_neumann

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


_ENOUGH_TO_FIT = 16
"""Patches from which the error of S1 may be fitted."""


class LayerEstimates(NamedTuple):
    """What the streamed activations of a layer tell; entropies in nats."""

    raw: Tensor
    """`patch_entropies` of each patch, ``[..., b]``."""
    normalized: Tensor
    """The same with ``normalize=True``."""
    centered: Tensor
    """The same with ``center=True``."""
    sample: SampleEntropies | None
    """`sample_entropies` with ``normalize=True``, the error of S1 as in `fitted_von_neumann`; None for one patch."""
    alignment: Alignment | None
    """`gradient_alignment`; None without gradients."""


def layer_estimates(
    z: Float[Array, "*batch n d"],
    g: Float[Array, "*batch n d"] | None = None,
    patch: int = 8,
    num_groups: int = 16,
    subsample: Float[Tensor, " k"] | None = None,
) -> LayerEstimates:
    """Give all figures of a layer, sharing what the functions that define them would each compute.

    The small Gram matrices of raw rows, rescaled, are those of rows of norm 1. Rows more than 1e18 times smaller than
    the largest entry count as zero rows, where the separate functions still see their direction.

    Args:
        z: consecutive tokens by features, whole patches, ``[..., n, d]``.
        g: gradient of the loss with respect to ``z``.
        patch: tokens in a patch.
        num_groups: jackknife groups of the alignment.
        subsample: indices of the patches on which the whole-sample entropies are taken; all when None.

    Returns:
        The figures, detached.

    Raises:
        ValueError: ``z`` is no matrix of samples or holds fewer tokens than a patch, or ``g`` has another shape.

    >>> import torch
    >>> estimates = layer_estimates(torch.eye(16))
    >>> bool(estimates.normalized.isclose(torch.tensor(8.0).log()).all())
    True
    """
    z_ND = as_samples(z)
    with torch.no_grad(), full_precision(z_ND):
        # Squares of activations as they come may overflow; every figure knows no scale.
        z_ND = z_ND / largest_entry(z_ND, dim=(-2, -1))
        z_BPD = split_patches(z_ND, patch)
        g_BPD = None if g is None else split_patches(scaled_gradient(g, z_ND), patch)
        gram_BPP = z_BPD @ z_BPD.mT
        norm_BP = gram_BPP.diagonal(dim1=-2, dim2=-1).sqrt()
        inverse_BP = torch.where(norm_BP == 0, 0.0, 1 / norm_BP)
        cosine_BPP = gram_BPP * inverse_BP[..., :, None] * inverse_BP[..., None, :]
        centered_BPD = split_patches(z_ND - z_ND.mean(-2, keepdim=True), patch)
        unit_BPD = z_BPD * inverse_BP[..., None]
        own_mass_B = cosine_BPP.square().sum((-2, -1))
        if subsample is not None:
            unit_BPD, own_mass_B = unit_BPD.index_select(-3, subsample), own_mass_B.index_select(-1, subsample)
        return LayerEstimates(
            raw=_order_two(gram_BPP),
            normalized=_order_two(cosine_BPP),
            centered=_order_two(centered_BPD @ centered_BPD.mT),
            sample=_whole_sample(unit_BPD, own_mass_B),
            alignment=None if g_BPD is None else _alignment(z_BPD, gram_BPP, g_BPD, num_groups),
        )


def _whole_sample(unit_BPD: Tensor, own_mass_B: Tensor) -> SampleEntropies | None:
    num_patches, patch = unit_BPD.shape[-3:-1]
    if num_patches < 2:
        return None
    # Of few patches the fit is not good enough, and the exact form is cheap.
    gives_s1 = fitted_von_neumann if num_patches >= _ENOUGH_TO_FIT else von_neumann
    return entropies_of_prepared(unit_BPD.flatten(-3, -2), own_mass_B, patch, gives_s1)


def _order_two(gram_BPP: Tensor) -> Tensor:
    return 2 * trace(gram_BPP).log() - gram_BPP.square().sum((-2, -1)).log()


def _alignment(z_BPD: Tensor, gram_BPP: Tensor, g_BPD: Tensor, num_groups: int) -> Alignment:
    square_B = g_BPD.flatten(-2).square().sum(-1)
    return alignment_of_patches(gram_BPP, g_BPD @ z_BPD.mT, square_B, num_groups)
