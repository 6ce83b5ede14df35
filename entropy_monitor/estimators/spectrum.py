"""Eigenvalues of Gram matrices, and their entropy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch

from entropy_monitor.estimators.inputs import Array, as_samples, full_precision, prepare, small_gram

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def spectrum(z: Float[Array, "*batch n d"], normalize: bool = False, center: bool = False) -> Float[Tensor, "*batch s"]:
    """Eigenvalues of ``A = z z^T / tr z z^T``, largest first: what every entropy of ``z`` is made of.

    Source: arXiv 2505.08727. They sum to 1, have no unit, and are those of the second-moment matrix of the features as
    well; ``s = min(n, d)``, the others are 0. Rounding may leave an eigenvalue of 0 at -1e-7. Differentiable.

    Args:
        z: tokens by features, ``[..., n, d]``.
        normalize: divide each row by its norm, after centring.
        center: subtract the mean row.

    Returns:
        ``[..., min(n, d)]``, fp64; NaN for a matrix that is zero or not finite.

    Raises:
        ValueError: ``z`` is no matrix of samples.

    >>> import torch
    >>> spectrum(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    z_ND = prepare(as_samples(z), normalize, center)
    with full_precision(z_ND):
        eigenvalues_S = eigenvalues(small_gram(z_ND)).flip(-1)
    return eigenvalues_S / eigenvalues_S.sum(-1, keepdim=True)


def eigenvalues(gram_SS: Float[Tensor, "*batch s s"]) -> Float[Tensor, "*batch s"]:
    """Eigenvalues in the matrix's own precision, differentiable also where they coincide.

    A Gram matrix formed in fp32 is no truer than its fp32 eigenvalues, for which fp64 takes 1.7 times as long.

    Returns:
        Ascending, fp64; those of a singular matrix are zero only to rounding. NaN for a non-finite matrix.
    """
    safe_SS, undetermined = _replace_undetermined(gram_SS)
    values_S = cast("Tensor", torch.linalg.eigvalsh(safe_SS))  # pyright: ignore[reportUnknownMemberType]
    return torch.where(undetermined, math.nan, values_S.double())


def eigenvectors(gram_SS: Float[Tensor, "*batch s s"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors in the matrix's own precision: fp64 takes twice the time.

    Returns:
        ``[..., s]`` ascending, NaN for a non-finite matrix, and the vectors as columns, ``[..., s, s]``.
    """
    safe_SS, undetermined = _replace_undetermined(gram_SS)
    pair = torch.linalg.eigh(safe_SS)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    values_S, vectors_SS = cast("tuple[Tensor, Tensor]", pair)
    return torch.where(undetermined, math.nan, values_S), vectors_SS


def _replace_undetermined(gram_SS: Tensor) -> tuple[Tensor, Tensor]:
    # The solvers raise on NaN, which would take the other matrices of the batch along.
    undetermined = ~gram_SS.isfinite().all(-1).all(-1)[..., None]
    return torch.where(undetermined[..., None], identity_like(gram_SS), gram_SS), undetermined


def identity_like(matrix_SS: Float[Tensor, "*batch s s"]) -> Float[Tensor, "s s"]:
    """Give the identity of the matrix's size, type and device.

    Returns:
        Shape ``[s, s]``.
    """
    return torch.eye(matrix_SS.shape[-1], dtype=matrix_SS.dtype, device=matrix_SS.device)


def positive_part(density_S: Float[Tensor, "*batch s"]) -> tuple[Tensor, Tensor]:
    """Find the eigenvalues, of trace 1, that are zero to rounding, and put 1 in their place.

    Powers and logarithms then never meet a zero, where their infinite derivatives would turn into NaN.

    Returns:
        The eigenvalues, and True where they were zero; NaN stays.
    """
    zero_S = density_S <= density_S.shape[-1] * torch.finfo(torch.float64).eps
    return torch.where(zero_S, 1.0, density_S), zero_S


def spectral_entropy(density_S: Float[Tensor, "*batch s"], order: float) -> Float[Tensor, "*batch"]:
    """Rényi entropy of eigenvalues of trace 1, in nats, for any order but 2 (which needs no eigenvalues).

    Returns:
        ``[...]``; NaN where the spectrum is.
    """
    if math.isinf(order):
        return -density_S.amax(-1).log()
    positive_S, zero_S = positive_part(density_S)
    if order == 1:
        return -(positive_S * positive_S.log()).sum(-1)
    # NaN to the power of 0 would be 1.
    powers_S = positive_S * positive_S ** (order - 1)
    return torch.where(zero_S, 0.0, powers_S).sum(-1).log() / (1 - order)
