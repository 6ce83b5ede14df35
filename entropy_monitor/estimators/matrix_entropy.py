"""Matrix-based entropy: plug-in values, differentiable (arXiv 2505.08727)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from entropy_monitor.estimators.inputs import (
    Array,
    as_samples,
    full_precision,
    prepare,
    small_gram,
    split_patches,
    trace,
)
from entropy_monitor.estimators.spectrum import eigenvalues, identity_like, spectral_entropy

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_SAFE_SQUARES = (1e-24, 1e30)
"""Square norms of rows between which fp32 products neither overflow nor lose small entries."""


def matrix_entropy(
    z: Float[Array, "*batch n d"], order: float = 2, normalize: bool = False, center: bool = False
) -> Float[Tensor, "*batch"]:
    r"""Matrix-based Rényi entropy of the rows of ``z``, in nats.

    With ``A = K / tr K`` and ``K = z z^T``::

        S_a = log tr(A^a) / (1 - a),    S_1 = -tr(A log A),    S_2 = 2 log tr K - log ||K||_F^2

    Source: arXiv 2505.08727 (matrix-based entropy); order 2 is the form that paper uses. Order 2 needs no
    eigenvalues; others take them on the smaller side, so that the cost is ``min(n, d)^3``: above 2048 pass a subsample
    of the tokens. Of fp32 input S_1 is within 1e-4 nats of its fp64 value, orders below 1 are computed in fp64.

    Range: 0 (rank one) to ``log min(n, d)`` (orthogonal rows of equal norm), for any scale of ``z``. All-zero ``z`` has
    no spectrum and gives NaN. A zero row adds nothing. Bias: the plug-in value of a sample is low, at n = 256 by up to
    1.3 nats on flat spectra; see `matrix_entropy_unbiased`. Differentiable in ``z``, finite on degenerate spectra.

    Args:
        z: tokens by features, ``[..., n, d]``.
        order: from 0 (log of the numerical rank) to infinity (``-log`` of the largest eigenvalue).
        normalize: divide each row by its norm, after centring.
        center: subtract the mean row.

    Returns:
        Entropies, ``[...]``.

    Raises:
        ValueError: ``z`` is no matrix of samples, or ``order`` is negative.

    >>> import torch
    >>> round(float(matrix_entropy(3 * torch.eye(4, 6))), 6)
    1.386294
    """
    if not order >= 0:
        raise ValueError(f"order: expected a number from 0 to infinity, found {order}: 2 is the usual choice")
    z_ND = prepare(as_samples(z), normalize, center)
    dtype = z_ND.dtype
    # Powers below 1 magnify the rounding of the Gram matrix: 512 eigenvalues of 1e-8 weigh 0.05 at order 1/2.
    z_ND = z_ND.double() if order < 1 else z_ND
    with full_precision(z_ND):
        gram_SS = small_gram(z_ND)
        if order == 2:
            return 2 * trace(gram_SS).log() - gram_SS.square().sum((-2, -1)).log()
        eigenvalues_S = eigenvalues(gram_SS)
        return spectral_entropy(eigenvalues_S / eigenvalues_S.sum(-1, keepdim=True), order).to(dtype)


def patch_entropies(
    z: Float[Array, "*batch n d"], patch: int = 8, normalize: bool = False, center: bool = False
) -> Float[Tensor, "*batch b"]:
    """Order-2 entropy of each patch of consecutive tokens, in nats.

    Source: arXiv 2505.08727, which takes patches of 8 tokens. Values of different ``patch`` are not comparable: the
    maximum is ``log patch``. An incomplete last patch is dropped; pass documents separately, so that none is crossed.
    An all-zero patch is NaN, undetermined.

    Args:
        z: consecutive tokens by features, ``[..., n, d]``.
        patch: tokens in a patch.
        normalize: divide each row by its norm, after centring.
        center: subtract the mean of **all** n rows given, an incomplete last patch included.

    Returns:
        ``[..., n // patch]``.

    Raises:
        ValueError: ``z`` is no matrix of samples or has fewer tokens than a patch.

    >>> import torch
    >>> patch_entropies(torch.eye(5), patch=2).shape
    torch.Size([2])
    """
    z_ND = as_samples(z)
    if center:
        z_ND = z_ND - z_ND.mean(-2, keepdim=True)
    z_BPD = split_patches(z_ND, patch)
    with full_precision(z_BPD):
        gram_BPP = z_BPD @ z_BPD.mT
    # Scaling each patch first, as matrix_entropy does, takes four times as long as its Gram matrix. So squares are
    # taken as they come, and the patches whose squares may overflow or vanish are done again with care.
    square_norm_BP = gram_BPP.diagonal(dim1=-2, dim2=-1)
    doubtful_B = ~((square_norm_BP > _SAFE_SQUARES[0]) & (square_norm_BP < _SAFE_SQUARES[1])).all(-1)
    if not bool(doubtful_B.any()):
        return _order_two(gram_BPP, normalize)
    entropies_B = _order_two(torch.where(doubtful_B[..., None, None], identity_like(gram_BPP), gram_BPP), normalize)
    with_care = doubtful_B.nonzero(as_tuple=True)
    return entropies_B.index_put(with_care, matrix_entropy(z_BPD[with_care], normalize=normalize))


def _order_two(gram_BPP: Tensor, normalize: bool) -> Tensor:
    """Give ``-log ||A||_F^2`` with ``A = K / tr K``, K divided by its row norms first if asked.

    Returns:
        ``[..., b]``.
    """
    if normalize:
        inverse_norm_BP = gram_BPP.diagonal(dim1=-2, dim2=-1).rsqrt()
        gram_BPP = gram_BPP * inverse_norm_BP[..., :, None] * inverse_norm_BP[..., None, :]
    density_BPP = gram_BPP / trace(gram_BPP)[..., None, None]
    return -density_BPP.square().sum((-2, -1)).log()


def patch_matrix_entropy(
    z: Float[Array, "*batch n d"], patch: int = 8, normalize: bool = False, center: bool = False
) -> Float[Tensor, "*batch"]:
    """Mean of `patch_entropies`, in nats: the MBE of arXiv 2505.08727; ``normalize=True`` is the primary figure.

    Raw MBE falls when a single norm grows (one token of tenfold norm takes it from 1.95 to 0.14); the row-normalised
    one does not. NaN when any patch is undetermined.

    Args:
        z: consecutive tokens by features, ``[..., n, d]``.
        patch: tokens in a patch.
        normalize: divide each row by its norm, after centring.
        center: subtract the mean of all rows given.

    Returns:
        ``[...]``, from 0 to ``log patch``.

    >>> import torch
    >>> bool(patch_matrix_entropy(torch.eye(16)).isclose(torch.tensor(8.0).log()))
    True
    """
    return patch_entropies(z, patch, normalize, center).mean(-1)


def effective_rank(
    z: Float[Array, "*batch n d"], order: float = 1, normalize: bool = False, center: bool = False
) -> Float[Tensor, "*batch"]:
    """``exp(S_order)``: how many equally used dimensions have the entropy of ``z``; unit, dimensions.

    Source: Roy and Vetterli 2007 for order 1. Plug-in, with the bias of `matrix_entropy`, whose arguments these are.

    Args:
        z: tokens by features, ``[..., n, d]``.
        order: see `matrix_entropy`.
        normalize: see `matrix_entropy`.
        center: see `matrix_entropy`.

    Returns:
        ``[...]``, from 1 to ``min(n, d)``.

    >>> import torch
    >>> round(float(effective_rank(torch.eye(3, 5))), 6)
    3.0
    """
    return matrix_entropy(z, order, normalize, center).exp()
