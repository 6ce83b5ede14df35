"""Alignment of the gradients of cross-entropy and matrix-based entropy with respect to activations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_monitor.estimators.inputs import Array, as_samples, full_precision, largest_entry, split_patches, trace

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Alignment(NamedTuple):
    """Cosine between two gradients, each ``[...]``; NaN where undetermined."""

    cosine: Tensor
    std_error: Tensor
    """From the delete-a-group jackknife."""


def gradient_alignment(
    z: Float[Array, "*batch n d"], g: Float[Array, "*batch n d"], patch: int = 8, num_groups: int = 16
) -> Alignment:
    """Cosine, in **activation space**, between loss gradients ``g`` and ``H = dMBE/dz`` of the raw patch MBE.

    Per patch, with ``K = z z^T``, ``T = tr K``, ``q = ||K||_F^2`` and ``P = g z^T``, H is never formed::

        <g, H> = 4 (tr P / T - <K, P> / q),    ||H||^2 = 16 (tr K^3 / q^2 - 1 / T)

    both over ``num_patches`` (squared), which cancels. The small products are fp64: near-orthogonal patches have
    ``||H||`` close to zero by cancellation.

    Source: arXiv 2505.08727 compares the two gradients with respect to *parameters*. This is a different quantity: use
    `gradient_alignment_from_parts` for that one, and neither for the other.

    Standard error: delete-a-group jackknife over ``min(num_groups, num_patches)`` groups, patches dealt round-robin.

    Args:
        z: consecutive tokens by features, ``[..., n, d]``; an incomplete last patch is dropped.
        g: gradient of the loss with respect to ``z``, any scale.
        patch: tokens in a patch.
        num_groups: jackknife groups.

    Returns:
        Cosine and standard error. NaN where ``g`` or H is zero, an entry is not finite or a patch is all zero; the
        standard error also with a single patch.

    Raises:
        ValueError: shapes differ, are no matrices of samples, or hold fewer tokens than a patch; no two groups.

    >>> import torch
    >>> from entropy_monitor.estimators.gradients import patch_matrix_entropy_gradient
    >>> z = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    >>> round(float(gradient_alignment(z, -patch_matrix_entropy_gradient(z)).cosine), 5)
    -1.0
    """
    z_ND = as_samples(z)
    check_num_groups(num_groups)
    with torch.no_grad(), full_precision(z_ND):
        z_BPD = split_patches(z_ND / largest_entry(z_ND, dim=(-2, -1)), patch)
        g_BPD = split_patches(scaled_gradient(g, z_ND), patch)
        return alignment_of_patches(
            z_BPD @ z_BPD.mT, g_BPD @ z_BPD.mT, g_BPD.square().sum((-2, -1)), num_groups=num_groups
        )


def scaled_gradient(g: Array, z_ND: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n d"]:
    """Scale the loss gradient at ``z`` to entries of at most 1, in the type of ``z``.

    The cosine does not know its scale, and squares of fp16-scaled gradients would underflow; so would a small fp64
    gradient, were it cast before it is scaled.

    Returns:
        The shape of ``z``.

    Raises:
        ValueError: ``g`` has another shape.
    """
    g_ND = as_samples(g, "g")
    if z_ND.shape != g_ND.shape:
        raise ValueError(
            f"g: expected the shape of z, {tuple(z_ND.shape)}; found {tuple(g_ND.shape)}: pass the loss gradient at z"
        )
    return (g_ND / largest_entry(g_ND, dim=(-2, -1))).to(z_ND.dtype)


def alignment_of_patches(
    k_BPP: Float[Tensor, "*batch b p p"],
    p_BPP: Float[Tensor, "*batch b p p"],
    square_g_B: Float[Tensor, "*batch b"],
    num_groups: int,
) -> Alignment:
    """Finish `gradient_alignment` from its small products ``z z^T``, ``g z^T`` and ``||g||^2`` of each patch.

    Returns:
        Cosine and standard error, in the type of the products.
    """
    dtype = k_BPP.dtype
    k_BPP, p_BPP = k_BPP.double(), p_BPP.double()
    t_B, q_B = trace(k_BPP), k_BPP.square().sum((-2, -1))
    k3_B = ((k_BPP @ k_BPP) * k_BPP).sum((-2, -1))
    sums_B3 = torch.stack(
        [
            4 * (trace(p_BPP) / t_B - (k_BPP * p_BPP).sum((-2, -1)) / q_B),
            16 * (k3_B / q_B.square() - 1 / t_B),
            square_g_B.double(),
        ],
        -1,
    )
    num_groups = min(num_groups, sums_B3.shape[-2])
    sums_G3 = group_one_hot(sums_B3, num_groups).mT @ sums_B3
    total_3 = sums_G3.sum(-2)
    std_error = jackknife(_cosine(total_3[..., None, :] - sums_G3), torch.tensor(num_groups, device=k_BPP.device))
    return Alignment(_cosine(total_3).to(dtype), std_error.to(dtype))


def _cosine(sums_3: Tensor) -> Tensor:
    """Turn ``<g, H>``, ``||H||^2`` and ``||g||^2`` into a cosine.

    Returns:
        NaN where a square norm is not positive.
    """
    return sums_3[..., 0] / (sums_3[..., 1] * sums_3[..., 2]).sqrt()


def check_num_groups(num_groups: int) -> None:
    """Refuse a jackknife without two groups.

    Raises:
        ValueError: there are fewer than two groups.
    """
    if num_groups < 2:
        raise ValueError(f"num_groups: expected at least 2, found {num_groups}: 16 is the usual choice")


def group_one_hot(like_BX: Tensor, num_groups: int) -> Tensor:
    """Deal the patches of dimension -2 round-robin: patch b into group ``b % num_groups``.

    Returns:
        ``[b, num_groups]`` of ones and zeros, in the type and on the device of ``like_BX``.
    """
    group_B = torch.arange(like_BX.shape[-2], device=like_BX.device) % num_groups
    return (group_B[:, None] == torch.arange(num_groups, device=like_BX.device)).to(like_BX.dtype)


def jackknife(left_out_G: Float[Tensor, "*batch g"], num_groups: Tensor) -> Float[Tensor, "*batch"]:
    """Standard error from estimates that each leave one group out: ``SE^2 = (g - 1) / g sum (x_g - mean)^2``.

    Args:
        left_out_G: estimates; only the first ``num_groups`` count, as groups fill from the first.
        num_groups: groups that hold a patch, integers ``[...]``.

    Returns:
        ``[...]``; NaN for fewer than two groups or where an estimate is NaN.
    """
    empty_G = torch.arange(left_out_G.shape[-1], device=left_out_G.device) >= num_groups[..., None]
    mean_1 = torch.where(empty_G, 0.0, left_out_G).sum(-1, keepdim=True) / num_groups[..., None]
    square_sum = torch.where(empty_G, 0.0, left_out_G - mean_1).square().sum(-1)
    return torch.where(num_groups < 2, math.nan, ((num_groups - 1) / num_groups * square_sum).sqrt())
