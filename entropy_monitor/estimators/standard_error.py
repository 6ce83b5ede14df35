"""Standard errors of matrix-based entropy, free of resampling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from entropy_monitor.estimators.gradients import matrix_entropy_gradient
from entropy_monitor.estimators.inputs import Array, as_samples, as_tensor, check_patch, prepare

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def patch_standard_error(values: Float[Array, "*batch b"]) -> Float[Tensor, "*batch"]:
    """Standard error of the mean of independent patches, ``sd / sqrt(num_patches)``, in the unit of ``values``.

    Args:
        values: one value a patch, as from `patch_entropies`.

    Returns:
        ``[...]``; NaN for a single patch, from which no spread can be known.

    >>> import torch
    >>> float(patch_standard_error(torch.tensor([1.0, 3.0])))
    1.0
    """
    values_B = as_tensor(values, "values")
    values_B = values_B if values_B.is_floating_point() else values_B.float()
    num_patches = values_B.shape[-1]
    if num_patches < 2:
        return torch.full_like(values_B.sum(-1), math.nan)
    return values_B.std(-1) / math.sqrt(num_patches)


def matrix_entropy_standard_error(
    z: Float[Array, "*batch n d"], order: float = 2, patch: int = 8, normalize: bool = False, center: bool = False
) -> Float[Tensor, "*batch"]:
    """Standard error of the whole-sample `matrix_entropy` over the drawing of the tokens, in nats.

    With ``h = dS/dz``, and tokens of one patch drawn together::

        SE^2 = sum over patches of (sum_{i in patch} <z_i, h_i> / 2)^2

    the infinitesimal jackknife (weighting token i by ``1 + e`` scales ``z_i`` by ``1 + e / 2``). A last, shorter patch
    counts as one. Good to 40 % where tokens outnumber the effective rank; it errs high where the entropy's second-order
    noise rules, by up to a half on a flat spectrum or with few patches of like tokens.

    Args:
        z: tokens by features, ``[..., n, d]``, patches of consecutive rows.
        order: positive and finite.
        patch: tokens drawn together; 1 where they are independent.
        normalize: see `matrix_entropy`.
        center: see `matrix_entropy`; the estimated mean costs nothing to first order.

    Returns:
        ``[...]``; NaN for a non-finite matrix.

    Raises:
        ValueError: ``z`` is no matrix of samples, or ``order`` or ``patch`` is out of range.

    >>> import torch
    >>> z = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> 0 < float(matrix_entropy_standard_error(z)) < 0.2
    True
    """
    check_patch(patch)
    z_ND = prepare(as_samples(z), normalize, center)
    influence_N = (z_ND * matrix_entropy_gradient(z_ND, order)).sum(-1) / 2
    return sum_blocks(influence_N, patch).square().sum(-1).sqrt()


def sum_blocks(values_N: Float[Tensor, "*batch n"], block: int) -> Float[Tensor, "*batch b"]:
    """Sum consecutive entries in blocks; the last one may be shorter.

    Returns:
        ``[..., ceil(n / block)]``.
    """
    padded_N = torch.nn.functional.pad(values_N, (0, -values_N.shape[-1] % block))
    return padded_N.reshape(*padded_N.shape[:-1], -1, block).sum(-1)
