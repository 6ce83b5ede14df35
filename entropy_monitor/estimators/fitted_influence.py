"""Von Neumann entropy with a standard error that needs no eigenvectors, for every layer at every step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch

from entropy_monitor.estimators.spectrum import eigenvalues, positive_part

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_DEGREE = 4


def fitted_von_neumann(
    z_ND: Float[Tensor, "*batch n d"], gram_SS: Float[Tensor, "*batch s s"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch n"]]:
    """Give S1, and of each token ``<z_i, dS1/dz_i> / 2 = -((A log A)_ii + S1 a_ii)``, ``A = z z^T / T``, approximately.

    The diagonal of ``A log A`` would take eigenvectors, twice the time of eigenvalues. Instead ``x log x`` is fitted at
    the eigenvalues by a polynomial of degree 4, of which the diagonal is sums over one product A A. The standard error
    that follows is within 15 % of the exact one (flat and power-law spectra, with an offset and without),
    where the infinitesimal jackknife itself is good to 40 %; S1 is exact.

    Args:
        z_ND: scaled rows.
        gram_SS: their Gram matrix on the smaller side.

    Returns:
        S1 in nats and influences; NaN for a matrix that is not finite or zero.
    """
    eigenvalues_S = eigenvalues(gram_SS)
    total_1 = eigenvalues_S.sum(-1, keepdim=True)
    density_S, zero_S = positive_part(eigenvalues_S / total_1)
    information_S = density_S * density_S.log()
    entropy_1 = -information_S.sum(-1, keepdim=True)
    largest_1 = torch.where(zero_S, 0.0, density_S).amax(-1, keepdim=True)
    num_zeros = max(0, z_ND.shape[-2] - gram_SS.shape[-1])
    ratio_S = torch.where(zero_S, 0.0, density_S) / largest_1
    coefficients_K = _fit(ratio_S, information_S, num_zeros, torch.finfo(z_ND.dtype).eps)
    powers_NK = _power_diagonals(z_ND, gram_SS, (total_1 * largest_1).to(z_ND.dtype))
    log_N = (powers_NK.double() @ coefficients_K[..., None])[..., 0]
    influence_N = -(log_N + entropy_1 * largest_1 * powers_NK[..., 1])
    return entropy_1[..., 0].to(z_ND.dtype), influence_N.to(z_ND.dtype)


def _fit(ratio_S: Tensor, values_S: Tensor, num_zeros: int, precision: float) -> Tensor:
    """Fit a polynomial by least squares, to all eigenvalues of ``z z^T``: also to zeros that the smaller side lacks.

    What the fit can only reach by coefficients larger than the inverse of `precision` it leaves: the diagonals that
    they will multiply are not known any better.

    Returns:
        Coefficients from degree 0, ``[..., 5]``; NaN where a value is.
    """
    undetermined = ~(ratio_S.isfinite() & values_S.isfinite()).all(-1, keepdim=True)
    # The solver raises on NaN, which would take the other matrices of the batch along.
    ratio_S, values_S = (torch.where(undetermined, 0.0, tensor) for tensor in (ratio_S, values_S))
    ratio_S, values_S = (torch.nn.functional.pad(tensor, (0, 1)) for tensor in (ratio_S, values_S))
    powers_SK = torch.stack([ratio_S**power for power in range(_DEGREE + 1)], -1)
    powers_SK[..., -1, :] *= math.sqrt(num_zeros)
    solution = torch.linalg.lstsq(powers_SK, values_S[..., None], driver="gelsd", rcond=precision)  # pyright: ignore[reportUnknownMemberType]
    return torch.where(undetermined, math.nan, cast("Tensor", solution.solution)[..., 0])


def _power_diagonals(z_ND: Tensor, gram_SS: Tensor, scale_1: Tensor) -> Tensor:
    """Give the diagonals of ``B^0 .. B^4``, ``B = z z^T / scale``.

    Returns:
        ``[..., n, 5]``.
    """
    if z_ND.shape[-2] <= z_ND.shape[-1]:
        first_NN = gram_SS / scale_1[..., None]
        second_NN = first_NN @ first_NN
        diagonals = [
            first_NN.diagonal(dim1=-2, dim2=-1),
            first_NN.square().sum(-1),
            (first_NN * second_NN).sum(-1),
            second_NN.square().sum(-1),
        ]
    else:
        root_ND = z_ND / scale_1.sqrt()[..., None]
        first_ND = root_ND @ (gram_SS / scale_1[..., None])
        second_ND = first_ND @ (gram_SS / scale_1[..., None])
        diagonals = [
            root_ND.square().sum(-1),
            (root_ND * first_ND).sum(-1),
            first_ND.square().sum(-1),
            (first_ND * second_ND).sum(-1),
        ]
    return torch.stack([torch.ones_like(diagonals[0]), *diagonals], -1)
