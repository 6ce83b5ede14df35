"""Alignment of the gradients of cross-entropy and matrix-based entropy with respect to one weight matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from entropy_monitor.estimators.alignment import Alignment, check_num_groups, group_one_hot, jackknife
from entropy_monitor.estimators.inputs import Array, as_samples, full_precision, split_patches
from entropy_monitor.estimators.standard_error import sum_blocks

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_NUM_BANDS = 4
"""Five eighths of the arithmetic of a full square; more bands save little and make thin products."""


def weight_alignment_parts(
    x: Float[Array, "*batch n d_in"],
    h: Float[Array, "*batch n d"],
    weight_gradient: Float[Array, "*batch d d_in"],
    patch: int = 8,
    num_groups: int = 16,
) -> Float[Tensor, "*batch g 3"]:
    """Partial sums of the **weight-space** alignment for a linear layer ``z = W x + b``, by jackknife group.

    The gradient of MBE with respect to W is ``sum_i h_i x_i^T``. With ``W_g`` the loss gradient of W over the full
    batch and patches dealt round-robin into groups, the three numbers of group g are::

        a_g = sum_{i in g} h_i . (W_g x_i)
        r_g = sum_{i in g, j outside i's patch} (h_i . h_j) (x_i . x_j)
        w_g = the same with i and j both in g

    Source: the parameter-gradient cosine of arXiv 2505.08727, from sampled tokens. Costs two symmetric n x n products
    and one by W_g; no value is read back from the device.

    Args:
        x: inputs of the linear layer at the sampled tokens, ``[..., n, d_in]``; an incomplete last patch is dropped.
        h: ``dMBE/dz`` at the same tokens (`patch_matrix_entropy_gradient`), ``[..., n, d]``.
        weight_gradient: gradient of the loss with respect to W, ``[..., d, d_in]``.
        patch: tokens in a patch.
        num_groups: jackknife groups; those beyond the number of patches are zero.

    Returns:
        ``[..., num_groups, 3]``, for `gradient_alignment_from_parts`.

    Raises:
        ValueError: the shapes do not belong together, or there are fewer tokens than a patch, or no two groups.

    >>> import torch
    >>> weight_alignment_parts(torch.ones(16, 3), torch.ones(16, 2), torch.ones(2, 3)).sum(0)
    tensor([ 96., 768.,   0.])
    """
    x_NE, h_ND = as_samples(x, "x"), as_samples(h, "h")
    weight_gradient_DE = as_samples(weight_gradient, "weight_gradient")
    check_num_groups(num_groups)
    num_tokens, num_inputs = x_NE.shape[-2:]
    if h_ND.shape[-2] != num_tokens or weight_gradient_DE.shape[-2:] != (h_ND.shape[-1], num_inputs):
        raise ValueError(
            "expected x [n, d_in], h [n, d] and weight_gradient [d, d_in]; found "
            f"{tuple(x_NE.shape)}, {tuple(h_ND.shape)} and {tuple(weight_gradient_DE.shape)}: "
            "transpose a gradient stored as [d_in, d]"
        )
    with torch.no_grad(), full_precision(x_NE):
        projection_NE = h_ND @ weight_gradient_DE
    return projected_weight_alignment_parts(x_NE, h_ND, projection_NE, patch, num_groups)


def projected_weight_alignment_parts(
    x: Float[Array, "*batch n d_in"],
    h: Float[Array, "*batch n d"],
    projection: Float[Array, "*batch n d_in"],
    patch: int = 8,
    num_groups: int = 16,
) -> Float[Tensor, "*batch g 3"]:
    """`weight_alignment_parts` with ``h_i W_g`` given, so that many layers can be batched without stacking weights.

    Args:
        x: inputs of the linear layer at the sampled tokens, ``[..., n, d_in]``; those of a leading
            dimension of 1 are shared by all h.
        h: ``dMBE/dz`` at the same tokens, ``[..., n, d]``.
        projection: ``h @ W_g``, ``[..., n, d_in]``.
        patch: tokens in a patch.
        num_groups: jackknife groups; those beyond the number of patches are zero.

    Returns:
        ``[..., num_groups, 3]``, for `gradient_alignment_from_parts`.

    Raises:
        ValueError: the shapes do not belong together, or there are fewer tokens than a patch, or no two groups.

    >>> import torch
    >>> projected_weight_alignment_parts(torch.ones(16, 3), torch.ones(16, 2), torch.full((16, 3), 2.0)).sum(0)
    tensor([ 96., 768.,   0.])
    """
    x_NE, h_ND, projection_NE = as_samples(x, "x"), as_samples(h, "h"), as_samples(projection, "projection")
    check_num_groups(num_groups)
    shared = zip(x_NE.shape[:-2], projection_NE.shape[:-2], strict=False)
    if (
        x_NE.ndim != projection_NE.ndim
        or any(of_x not in (1, of_h) for of_x, of_h in shared)
        or projection_NE.shape[-2:] != x_NE.shape[-2:]
        or h_ND.shape[:-1] != projection_NE.shape[:-1]
    ):
        raise ValueError(
            f"expected x and projection [n, d_in] and h [n, d]; found {tuple(x_NE.shape)}, "
            f"{tuple(projection_NE.shape)} and {tuple(h_ND.shape)}: give them for the same tokens"
        )
    with torch.no_grad(), full_precision(x_NE):
        x_NE, h_ND, projection_NE = (
            split_patches(samples, patch).flatten(-3, -2) for samples in (x_NE, h_ND, projection_NE)
        )
        along_B = sum_blocks((projection_NE * x_NE).sum(-1), patch)
        pairs_BB = _pair_sums(x_NE, h_ND, patch)
        groups_BG = group_one_hot(along_B[..., None], num_groups)
        to_group_BG = pairs_BB @ groups_BG
        return torch.stack([along_B @ groups_BG, pairs_BB.sum(-1) @ groups_BG, (to_group_BG * groups_BG).sum(-2)], -1)


def _pair_sums(x_NE: Tensor, h_ND: Tensor, patch: int) -> Tensor:
    """Sum ``(h_i . h_j) (x_i . x_j)`` over the pairs of tokens of each two patches.

    Both products are symmetric: on the CPU they are computed in bands of rows, from the diagonal to the right.

    Returns:
        ``[..., b, b]``, zero on the diagonal.
    """
    num_patches = h_ND.shape[-2] // patch
    per_band = num_patches if h_ND.device.type != "cpu" else -(-num_patches // _NUM_BANDS)
    bands: list[Tensor] = []
    for first in range(0, num_patches, per_band):
        rows, rest = slice(first * patch, (first + per_band) * patch), slice(first * patch, None)
        pairs_RN = (h_ND[..., rows, :] @ h_ND[..., rest, :].mT) * (x_NE[..., rows, :] @ x_NE[..., rest, :].mT)
        band_BR = sum_blocks(sum_blocks(pairs_RN, patch).mT, patch)
        bands.append(torch.nn.functional.pad(band_BR.mT, (first, 0)))
    above_BB = torch.cat(bands, -2).triu(1)
    return above_BB + above_BB.mT


def gradient_alignment_from_parts(
    parts: Float[Array, "*batch g 3"],
    gradient_norm: Float[Array, "*batch"] | float,
    num_patches: Float[Array, "*batch"] | float,
) -> Alignment:
    """Cosine, in **weight space**, between the loss gradient W_g and the MBE gradient of one linear layer.

    With (a), (r), (w) from `weight_alignment_parts`, ``U = sum r`` and B sampled patches::

        cos = sum a / (||W_g|| sqrt(U B / (B - 1)))

    U leaves out pairs of one patch, whose shared noise would swell the norm and shrink the cosine (on one layer: true
    -.190, this form -.190 +- .030, sampled gradients -.094 +- .073). It stands for a batch much larger than the sample:
    where **all** patches were sampled the exact square norm is U plus the pairs within patches, not ``U B / (B - 1)``.

    That ratio is biased in a few dozen patches (by up to .6 of its standard deviation where the cosine is -.8); the
    jackknife's estimate of the bias is taken off: ``G cos - sum_g (1 - m_g / B) cos_g``, where ``cos_g`` leaves out the
    m_g patches of group g by ``sum a - a_g`` and ``U - 2 r_g + w_g``.

    Source: arXiv 2505.08727; jackknife of unequal groups, Busing et al. 1999. Standard error: jackknife over the G
    groups that hold patches, widened as Student's t with G - 1 degrees of freedom asks, so that two of them hold the
    truth in 95 % of draws, as they do of a normal error.

    Args:
        parts: ``[..., num_groups, 3]``.
        gradient_norm: ``||W_g||``, ``[...]``.
        num_patches: B, ``[...]``.

    Returns:
        Cosine and standard error, fp64; not bounded by 1, as the norm is an estimate. NaN, undetermined, where
        ``||W_g||`` is 0, or ``U <= 0`` with all patches or with any group left out, as for B below 3.

    Raises:
        ValueError: ``parts`` does not end in ``[num_groups, 3]``.

    >>> import torch
    >>> parts = weight_alignment_parts(torch.ones(32, 3), torch.ones(32, 2), -torch.ones(2, 3))
    >>> round(float(gradient_alignment_from_parts(parts, 6**0.5, 4).cosine), 5)
    -1.0
    """
    parts_G3 = as_samples(parts, "parts").double()
    if parts_G3.shape[-1] != 3:
        raise ValueError(
            f"parts: expected [..., num_groups, 3], found {tuple(parts_G3.shape)}: pass weight_alignment_parts' result"
        )
    norm, count = (
        torch.as_tensor(value, device=parts_G3.device).double().expand(parts_G3.shape[:-2])
        for value in (gradient_norm, num_patches)
    )
    along_G, row_G, within_G = parts_G3.unbind(-1)
    along_1, square_1 = along_G.sum(-1, keepdim=True), row_G.sum(-1, keepdim=True)
    num_groups = parts_G3.shape[-2]
    # Round-robin dealing: group g holds the patches g, g + num_groups, ...
    group = torch.arange(num_groups, device=parts_G3.device)
    held_G = ((count[..., None] - group) / num_groups).ceil().clamp(min=0)
    left_out_G = _cosine(along_1 - along_G, square_1 - 2 * row_G + within_G, norm[..., None], count[..., None] - held_G)
    num_held = count.clamp(max=num_groups)
    weighted_G = torch.where(held_G > 0, (1 - held_G / count[..., None]) * left_out_G, 0.0)
    cosine = num_held * _cosine(along_1[..., 0], square_1[..., 0], norm, count) - weighted_G.sum(-1)
    return Alignment(cosine, jackknife(left_out_G, num_held) * _student_factor(num_held - 1))


def _student_factor(freedom: Tensor) -> Tensor:
    """Give the ratio of the quantiles of Student's t and of the normal distribution at two standard deviations.

    Source: Abramowitz and Stegun 26.7.5 to the third order: 4 % low at two degrees of freedom, within 2e-4 above seven.

    Returns:
        Factors above 1.
    """
    return (2 + 2.5 / freedom + 3.0625 / freedom**2 + 2.859375 / freedom**3) / 2


def _cosine(along: Tensor, square: Tensor, norm: Tensor, num_patches: Tensor) -> Tensor:
    """Divide by the norms, off-patch pairs scaled up to all pairs.

    Returns:
        NaN where the square norm is not positive.
    """
    cosine = along / (norm * (square * num_patches / (num_patches - 1)).sqrt())
    return torch.where((square > 0) & (norm > 0) & (num_patches > 1), cosine, math.nan)
