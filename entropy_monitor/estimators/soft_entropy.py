"""Soft entropy: the entropy of directions, over soft bins on the unit sphere (arXiv 2505.23960, used by 2604.07569).

Shape suffixes here and in the estimators of information: N tokens, D features, M bins, L layers (any leading
dimensions), U labels, B patches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch

from entropy_monitor.estimators import calibration
from entropy_monitor.estimators.inputs import (
    Array,
    as_samples,
    as_tensor,
    check_patch,
    full_precision,
    unit_rows,
)

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float
    from torch import Tensor

    from entropy_monitor.estimators.calibration import CalibrationMode

_SAFE_NORMS = (1e-15, 1e15)
"""Norms whose squares neither overflow nor underflow in fp32, with room for the products."""


_ROWS_AT_ONCE = 1024
"""Scores of so many rows stay in the cache until they are shares."""


class SoftEntropy(NamedTuple):
    """Soft entropy with its error, each ``[...]``."""

    value: Tensor
    """``plug_in - bias``."""
    std_error: Tensor
    """Infinitesimal jackknife, over the drawing of patches."""
    plug_in: Tensor
    """What `soft_entropy` gives: low in a small sample."""
    bias: Tensor
    """Expected error of ``plug_in`` to second order, negative."""


class SoftBinOptions(TypedDict, total=False):
    """The options of `soft_assign`."""

    num_bins: int
    seed: int
    mode: CalibrationMode
    reference_points: Array | None
    temperature: float | None


def soft_assign(
    z: Float[Array, "*batch n d"],
    *,
    num_bins: int = 100,
    seed: int = 0,
    mode: CalibrationMode = "auto",
    reference_points: Float[Array, "m d"] | None = None,
    temperature: float | None = None,
) -> Float[Tensor, "*batch n m"]:
    """Distribute each row over soft bins: softmax of its cosines with the reference points, over the temperature.

    Only the direction of a row matters. A row of zeros has none: it is NaN, undetermined, as is a non-finite row; the
    others are not touched by it. Differentiable.

    Source: arXiv 2505.23960.

    Args:
        z: tokens by features, ``[..., n, d]``.
        num_bins: reference points to draw, when none are given.
        seed: see `reference_points`.
        mode: see `soft_temperature`.
        reference_points: the unit vectors to use, ``[m, d]``; drawn when None.
        temperature: softmax temperature in units of cosine; that of `soft_temperature` when None.

    Returns:
        Shares that sum to 1, ``[..., n, m]``, fp64 for fp64 and otherwise fp32.

    Raises:
        ValueError: ``z`` is no matrix of samples, or points or temperature do not fit it.

    >>> import torch
    >>> p = soft_assign(torch.eye(4), num_bins=5)
    >>> p.shape, bool(p.sum(-1).isclose(torch.ones(4)).all())
    (torch.Size([4, 5]), True)
    """
    z_ND = as_samples(z)
    points_MD, temperature = soft_bins(z_ND.shape[-1], num_bins, seed, mode, reference_points, temperature)
    points_DM = points_MD.to(z_ND).mT.contiguous()
    with full_precision(z_ND):
        few = z_ND.split(_ROWS_AT_ONCE, dim=-2)
        return torch.cat([_assign(rows_ND, points_DM, temperature) for rows_ND in few], dim=-2)


def _assign(z_ND: Tensor, points_DM: Tensor, temperature: float) -> Tensor:
    norm_N1 = z_ND.norm(dim=-1, keepdim=True)
    odd_N1 = ~((norm_N1 > _SAFE_NORMS[0]) & (norm_N1 < _SAFE_NORMS[1]))
    if odd_N1.any():  # rare: rescaling every row would cost two passes over z
        z_ND = torch.where(odd_N1, unit_rows(z_ND), z_ND)
        norm_N1 = z_ND.norm(dim=-1, keepdim=True)
    # Scaling the scores normalises the rows and divides by the temperature without writing z again.
    return torch.softmax(z_ND @ points_DM * (1 / (norm_N1 * temperature)), dim=-1)


def soft_entropy(
    z: Float[Array, "*batch n d"],
    *,
    normalize: bool = False,
    **bins: Unpack[SoftBinOptions],
) -> Float[Tensor, "*batch"]:
    """Entropy of the directions of the rows of ``z`` over soft bins, plug-in, in nats.

    ``H = -sum_b P_b log P_b`` with P the mean of `soft_assign` over the rows. Range: 0 to ``log m``; a single row has
    the entropy of its own assignment, which is above 0. Values are comparable at equal reference points, temperature
    and number of bins only. `soft_entropy_estimate` adds the standard error and corrects the bias of a small sample.

    Source: arXiv 2505.23960; arXiv 2604.07569 shows it divided by ``log m``.

    Args:
        z: tokens by features, ``[..., n, d]``.
        normalize: divide by ``log m``.
        **bins: the options of `soft_assign`: ``num_bins``, ``seed``, ``mode``, ``reference_points``, ``temperature``.

    Returns:
        ``[...]``; NaN where a row has no direction.

    >>> import torch
    >>> z = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    >>> bool(0.98 < soft_entropy(z, normalize=True) < 1)
    True
    """
    p_NM = soft_assign(z, **bins)
    return entropy_of_shares(p_NM.mean(-2)) / (math.log(p_NM.shape[-1]) if normalize else 1)


def soft_entropy_estimate(
    z: Float[Array, "*batch n d"],
    *,
    patch: int = 8,
    normalize: bool = False,
    **bins: Unpack[SoftBinOptions],
) -> SoftEntropy:
    """Soft entropy corrected for the finite sample, with its standard error, in nats.

    With tokens of a patch drawn together and ``psi_i = -sum_b p_ib log P_b - H``::

        SE^2 = sum over patches of (sum_{i in patch} psi_i)^2 / n^2
        bias = -1/2 sum_b Var(P_b) / P_b,    Var(P_b) from the spread of patches

    the infinitesimal jackknife, and the second-order term of ``E H(P)``. A last, shorter patch counts as one. At the
    maximum entropy the first-order influence vanishes and the standard error errs low.

    Source: the estimator of arXiv 2505.23960; error and correction are the delta method's.

    Args:
        z: consecutive tokens by features, ``[..., n, d]``.
        patch: tokens drawn together; 1 where they are independent.
        normalize: divide every figure by ``log m``.
        **bins: the options of `soft_assign`: ``num_bins``, ``seed``, ``mode``, ``reference_points``, ``temperature``.

    Returns:
        `SoftEntropy`, detached; error and bias are NaN for a single patch.

    Raises:
        ValueError: ``patch`` is below 1, or as for `soft_assign`.

    >>> import torch
    >>> z = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    >>> estimate = soft_entropy_estimate(z, patch=1)
    >>> bool(estimate.value > estimate.plug_in), bool(0 < estimate.std_error < 0.05)
    (True, True)
    """
    with torch.no_grad():
        p_NM = soft_assign(z, **bins)
        estimate = entropy_of_assignments(p_NM, patch)
        unit = math.log(p_NM.shape[-1]) if normalize else 1
        return SoftEntropy(*(figure / unit for figure in estimate))


def entropy_of_assignments(p: Float[Array, "*batch n m"], patch: int) -> SoftEntropy:
    """Finish `soft_entropy_estimate` for tokens that have been assigned.

    Args:
        p: soft assignments of consecutive tokens, ``[..., n, m]``.
        patch: tokens drawn together.

    Returns:
        `SoftEntropy`, in nats.

    Raises:
        ValueError: ``p`` is no matrix of samples, or ``patch`` is below 1.

    >>> import torch
    >>> float(entropy_of_assignments(torch.eye(2).repeat(8, 1), patch=2).std_error)
    0.0
    """
    check_patch(patch)
    p_NM = as_samples(p, "p")
    share_M = p_NM.mean(-2)
    plug_in = entropy_of_shares(share_M)
    sums_BM = sum_patches(p_NM - share_M[..., None, :], patch)
    # psi summed over a patch: sums of p - P against -log P, as sum_b P_b (-log P_b) = H.
    influence_B = -(sums_BM @ safe_log(share_M)[..., None])[..., 0]
    std_error = _nan_for_one_patch(influence_B.square().sum(-1).sqrt() / p_NM.shape[-2], sums_BM)
    bias = -second_order(sums_BM.square().sum(-2), share_M, sums_BM.shape[-2]) / p_NM.shape[-2] ** 2
    return SoftEntropy(plug_in - bias, std_error, plug_in, bias)


def soft_bins(
    num_features: int,
    num_bins: int = 100,
    seed: int = 0,
    mode: CalibrationMode = "auto",
    reference_points: Array | None = None,
    temperature: float | None = None,
) -> tuple[Tensor, float]:
    """Complete reference points and temperature from what the caller gave.

    Returns:
        Points ``[m, d]`` and temperature.

    Raises:
        ValueError: they do not fit the activations.
    """
    if reference_points is None:
        points_MD = calibration.reference_points(num_features, num_bins, seed)
    else:
        points_MD = as_tensor(reference_points, "reference_points")
    if points_MD.ndim != 2 or points_MD.shape[1] != num_features or points_MD.shape[0] < 2:
        raise ValueError(
            f"reference_points: expected [m, {num_features}] with m of at least 2; found {tuple(points_MD.shape)}: "
            "draw them with reference_points(num_features)"
        )
    if temperature is None:
        temperature = calibration.soft_temperature(num_features, points_MD.shape[0], mode)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, found {temperature}: leave it None")
    return points_MD, temperature


def safe_log(shares: Tensor) -> Tensor:
    """Logarithm, finite at 0, where it is only ever multiplied by 0.

    Returns:
        The logarithms; NaN stays NaN.
    """
    return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()


def entropy_of_shares(share_M: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
    """Entropy of distributions, in nats.

    Returns:
        ``[...]``.
    """
    return -(share_M * safe_log(share_M)).sum(-1)


def sum_patches(p_NM: Float[Tensor, "*batch n m"], patch: int) -> Float[Tensor, "*batch b m"]:
    """Sum consecutive rows in patches; the last one may be shorter.

    Returns:
        ``[..., ceil(n / patch), m]``.
    """
    if patch == 1:
        return p_NM
    padded_NM = torch.nn.functional.pad(p_NM, (0, 0, 0, -p_NM.shape[-2] % patch))
    return padded_NM.unflatten(-2, (-1, patch)).sum(-2)


def second_order(squares_M: Tensor, share_M: Tensor, num_patches: int) -> Tensor:
    """``1/2 sum_b V_b / P_b``, half the curvature of entropy against a variance, unbiased for few patches.

    Args:
        squares_M: summed squared deviations of patch sums, ``[..., m]``.
        share_M: mean shares, ``[..., m]``; a bin of share 0 never varies.
        num_patches: how many patches were summed.

    Returns:
        ``[...]``; NaN for a single patch.
    """
    if num_patches < 2:
        return torch.full_like(share_M[..., 0], math.nan)
    ratio_M = torch.where(share_M == 0, 0.0, squares_M / share_M)
    return ratio_M.sum(-1) * (num_patches / (num_patches - 1) / 2)


def _nan_for_one_patch(std_error: Tensor, sums_BM: Tensor) -> Tensor:
    return std_error if sums_BM.shape[-2] > 1 else torch.full_like(std_error, math.nan)
