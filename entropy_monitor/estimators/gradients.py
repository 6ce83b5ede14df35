"""Closed-form gradients of matrix-based entropy: finite where autograd through an eigendecomposition is not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from entropy_monitor.estimators.inputs import (
    Array,
    as_samples,
    full_precision,
    largest_entry,
    small_gram,
    split_patches,
    trace,
)
from entropy_monitor.estimators.spectrum import eigenvectors, identity_like, positive_part

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def matrix_entropy_gradient(z: Float[Array, "*batch n d"], order: float = 2) -> Float[Tensor, "*batch n d"]:
    """Gradient of `matrix_entropy` with respect to ``z``, in nats per unit of ``z``.

    With ``K = z z^T`` and ``T = tr K``::

        dS_2/dz = 4 (z / T - K z / ||K||_F^2)
        dS_a/dz = 2a / (1 - a) [K^(a-1) z / tr K^a - z / T]
        dS_1/dz = -(2 / T) (log(K / T) + S_1 I) z

    Source: derivatives of the entropy in arXiv 2505.08727. Orthogonal to ``z``, as the entropy is scale-free. Powers
    and logarithms act on the range of K. An all-zero matrix, where no gradient exists, gets zeros.

    Args:
        z: tokens by features, ``[..., n, d]``.
        order: positive and finite.

    Returns:
        ``[..., n, d]``, detached.

    Raises:
        ValueError: ``z`` is no matrix of samples, or ``order`` is out of range.

    >>> import torch
    >>> bool(matrix_entropy_gradient(torch.eye(3)).abs().max() < 1e-6)
    True
    """
    if not 0 < order < math.inf:
        raise ValueError(f"order: expected a positive finite number, found {order}: 2 is the usual choice")
    z_ND = as_samples(z).detach()
    dtype = z_ND.dtype
    scale = largest_entry(z_ND, dim=(-2, -1))
    # In fp32 the Gram matrix cannot tell the null space from small eigenvalues, which the logarithm magnifies.
    z_ND = z_ND / scale if order == 2 else (z_ND / scale).double()
    with torch.no_grad(), full_precision(z_ND):
        gram_SS = small_gram(z_ND)
        trace_11 = trace(gram_SS)[..., None, None]
        trace_11 = torch.where(trace_11 == 0, 1.0, trace_11)
        factor_SS = (_order_two_factor if order == 2 else _spectral_factor)(gram_SS / trace_11, order)
        rows_first = z_ND.shape[-2] <= z_ND.shape[-1]
        product_ND = factor_SS @ z_ND if rows_first else z_ND @ factor_SS
        return (product_ND / trace_11 / scale).to(dtype)


def _order_two_factor(density_SS: Tensor, order: float) -> Tensor:
    """Give M with ``dS/dz = M z / T`` from ``A = K / T``.

    Returns:
        ``4 (I - A / ||A||_F^2)``.
    """
    assert order == 2
    purity_11 = density_SS.square().sum((-2, -1), keepdim=True)
    return 4 * (identity_like(density_SS) - density_SS / torch.where(purity_11 == 0, 1.0, purity_11))


def _spectral_factor(density_SS: Tensor, order: float) -> Tensor:
    """Give M with ``dS/dz = M z / T`` for any order, by eigenvectors.

    Returns:
        Zero on the null space of A, where ``M z`` is zero whatever M is; NaN for a non-finite matrix.
    """
    eigenvalues_S, vectors_SS = eigenvectors(density_SS)
    positive_S, zero_S = positive_part(eigenvalues_S)
    if order == 1:
        entropy_1 = -(positive_S * positive_S.log()).sum(-1, keepdim=True)
        factor_S = -2 * (positive_S.log() + entropy_1)
    else:
        power_trace_1 = torch.where(zero_S, 0.0, positive_S**order).sum(-1, keepdim=True)
        factor_S = 2 * order / (1 - order) * (positive_S ** (order - 1) / power_trace_1 - 1)
    return (vectors_SS * torch.where(zero_S, 0.0, factor_S)[..., None, :]) @ vectors_SS.mT


def patch_matrix_entropy_gradient(
    z: Float[Array, "*batch n d"], patch: int = 8, normalize: bool = False
) -> Float[Tensor, "*batch n d"]:
    """Gradient of `patch_matrix_entropy`, the mean over patches, with respect to ``z``; nats per unit of ``z``.

    Per patch ``h = 4 (z / T - K z / ||K||_F^2) / num_patches``; with ``normalize`` the same of ``z^ = z / ||z||``,
    chained through the normalisation of each row: ``(h - z^ (z^ . h)) / ||z||``. Source: arXiv 2505.08727.

    Both forms are one small matrix per patch times ``z``, so that the activations are read twice and written once. No
    value is read back from the device. Zero rows and all-zero patches get zero gradients; tokens behind the last whole
    patch too. A non-finite entry makes its own patch NaN. Valid for row norms from 1e-18 to 1e+18 in fp32: squares
    outside vanish or overflow. In fp32 the products follow the process's TF32 setting.

    Args:
        z: consecutive tokens by features, ``[..., n, d]``; each leading index is a mean of its own, so that the
            gradient of the mean over a batch of sequences is this over the number of sequences.
        patch: tokens in a patch.
        normalize: differentiate the row-normalised entropy.

    Returns:
        ``[..., n, d]``, detached.

    >>> import torch
    >>> patch_matrix_entropy_gradient(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), patch=2, normalize=True)
    tensor([[ 0.1171, -0.2341],
            [-0.2341,  0.1171]])
    """
    z_ND = as_samples(z).detach()
    z_BPD = split_patches(z_ND, patch)
    with torch.no_grad(), full_precision(z_ND):
        gram_BPP = z_BPD @ z_BPD.mT
        factor_BPP = (_normalized_patch_factor if normalize else _raw_patch_factor)(gram_BPP)
        gradient_ND = (factor_BPP / z_BPD.shape[-3] @ z_BPD).flatten(-3, -2)
    num_left_over = z_ND.shape[-2] - gradient_ND.shape[-2]
    return torch.nn.functional.pad(gradient_ND, (0, 0, 0, num_left_over)) if num_left_over else gradient_ND


def _raw_patch_factor(gram_BPP: Tensor) -> Tensor:
    """Give M with ``dS_2/dz = M z``.

    Returns:
        ``4 (I - A / ||A||_F^2) / T`` with ``A = K / T``.
    """
    trace_B11 = trace(gram_BPP)[..., None, None]
    trace_B11 = torch.where(trace_B11 == 0, 1.0, trace_B11)
    return _order_two_factor(gram_BPP / trace_B11, 2) / trace_B11


def _normalized_patch_factor(gram_BPP: Tensor) -> Tensor:
    """Give M with ``dS_2(z^)/dz = M z``; the projection keeps of h only ``-4 (K^ z^)_i / q`` less its part along z^_i.

    Returns:
        ``-4 / q (K^_ij / (r_i r_j) - [i = j] sum_k K^_ik^2 / r_i^2)``, r the row norms, K^ the Gram matrix of z^.
    """
    square_norm_BP = gram_BPP.diagonal(dim1=-2, dim2=-1)
    inverse_norm_BP = torch.where(square_norm_BP == 0, 0.0, square_norm_BP.rsqrt())
    inverse_norms_BPP = inverse_norm_BP[..., :, None] * inverse_norm_BP[..., None, :]
    cosine_BPP = gram_BPP * inverse_norms_BPP
    row_mass_BP = cosine_BPP.square().sum(-1)
    mass_B11 = row_mass_BP.sum(-1)[..., None, None]
    along_row_BPP = torch.diag_embed(row_mass_BP)
    return -4 / torch.where(mass_B11 == 0, 1.0, mass_B11) * (cosine_BPP - along_row_BPP) * inverse_norms_BPP
