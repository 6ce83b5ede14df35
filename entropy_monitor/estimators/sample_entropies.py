"""Entropies of a whole sample of tokens, as estimates for the population they were drawn from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_monitor.estimators.inputs import Array, as_samples, full_precision, prepare, small_gram, split_patches
from entropy_monitor.estimators.spectrum import eigenvectors, positive_part
from entropy_monitor.estimators.standard_error import sum_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor


class SampleEntropies(NamedTuple):
    """Entropies of the token population in nats, each ``[...]``, with standard errors."""

    s1: Tensor
    """Von Neumann entropy, plug-in: low by the bias of a finite sample."""
    s1_std_error: Tensor
    s2: Tensor
    """Order 2, from the U-statistics: corrected for the finite sample."""
    s2_std_error: Tensor


def matrix_entropy_unbiased(
    z: Float[Array, "*batch n d"], block: int = 8, normalize: bool = False, center: bool = False
) -> Float[Tensor, "*batch"]:
    """Order-2 entropy of the population behind a sample of tokens, from U-statistics, in nats.

    With k the entries of ``K = z z^T`` and sums over pairs of **different** blocks only::

        tr S^2 ~ sum k_ij^2 / pairs,    (tr S)^2 ~ sum k_ii k_jj / pairs,    S_2 = log (tr S)^2 - log tr S^2

    where S is the second-moment matrix of the tokens. Each is unbiased; ``block=1`` gives
    ``(q - sum k_ii^2) / (n(n-1))`` for independent tokens, ``block=8`` leaves out the pairs of one sampled patch. The
    plug-in `matrix_entropy` differs: at n = 256 it is low by up to 1.3 nats. Orders other than 2 have no such form.
    With ``center`` the mean is the sample's own, which leaves a bias of order 1/n.

    Source: the estimator of tr S^2 by distinct pairs, for the entropy of arXiv 2505.08727.

    Args:
        z: tokens by features, ``[..., n, d]``, blocks of consecutive rows; the last may be shorter.
        block: tokens drawn together.
        normalize: see `matrix_entropy`.
        center: see `matrix_entropy`.

    Returns:
        ``[...]``; may pass ``log d`` by sampling noise; infinite or NaN where no two blocks overlap.

    Raises:
        ValueError: ``z`` is no matrix of samples or holds fewer than two blocks.

    >>> import torch
    >>> z = torch.randn(256, 40, generator=torch.Generator().manual_seed(0))
    >>> abs(float(matrix_entropy_unbiased(z, block=1) - torch.tensor(40.0).log())) < 0.05
    True
    """
    z_ND = _blocked(z, block, normalize, center)
    with full_precision(z_ND):
        return _entropy_of_pairs(*_pair_sums(z_ND, small_gram(z_ND), _own_mass(z_ND, block), block))[0]


def sample_entropies(
    z: Float[Array, "*batch n d"], block: int = 8, normalize: bool = False, center: bool = False
) -> SampleEntropies:
    """Plug-in S1 and U-statistic S2 of a sample with their standard errors, from one Gram matrix, in nats.

    Values are those of ``matrix_entropy(order=1)`` and `matrix_entropy_unbiased`; standard errors are
    ``SE^2 = sum over blocks of (sum_{i in block} <z_i, h_i> / 2)^2`` with ``h = dS/dz`` of the value given, as in
    `matrix_entropy_standard_error`. S1 takes eigenvectors on the smaller side (subsample above ``min(n, d)`` = 2048) in
    the precision of the Gram matrix: in fp32 it may differ by 1e-4 nats from S1 of fp64 eigenvalues, a hundredth of its
    standard error, for half the time.

    Args:
        z: tokens by features, ``[..., n, d]``, blocks of consecutive rows; the last may be shorter.
        block: tokens drawn together.
        normalize: see `matrix_entropy`.
        center: see `matrix_entropy`.

    Returns:
        `SampleEntropies`; NaN for a matrix that is non-finite or zero, the error of S2 also for two blocks.

    Raises:
        ValueError: ``z`` is no matrix of samples or holds fewer than two blocks.

    >>> import torch
    >>> z = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    >>> abs(float(sample_entropies(z, block=1).s2 - torch.tensor(4.0).log())) < 0.01
    True
    """
    z_ND = _blocked(z, block, normalize, center)
    with torch.no_grad(), full_precision(z_ND):
        return entropies_of_prepared(z_ND, _own_mass(z_ND, block), block, von_neumann)


def entropies_of_prepared(
    z_ND: Float[Tensor, "*batch n d"],
    own_mass_B: Float[Tensor, "*batch b"],
    block: int,
    gives_s1: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> SampleEntropies:
    """Finish `sample_entropies` for rows that are scaled already.

    Args:
        z_ND: centred, normalised and scaled as wanted, entries of at most 1.
        own_mass_B: ``sum k_ij^2`` over the pairs within each block.
        block: tokens drawn together.
        gives_s1: S1 and each token's influence from rows and Gram matrix, such as `von_neumann`.

    Returns:
        `SampleEntropies`, detached.
    """
    gram_SS = small_gram(z_ND)
    s2, s2_std_error = _entropy_of_pairs(*_pair_sums(z_ND, gram_SS, own_mass_B, block))
    s1, influence_N = gives_s1(z_ND, gram_SS)
    s1_std_error = sum_blocks(influence_N, block).square().sum(-1).sqrt()
    return SampleEntropies(s1, s1_std_error, s2, s2_std_error)


def _blocked(z: Array, block: int, normalize: bool, center: bool) -> Tensor:
    z_ND = as_samples(z)
    if not 1 <= block < z_ND.shape[-2]:
        raise ValueError(
            f"block: expected 1 to {z_ND.shape[-2] - 1}, two blocks in z {tuple(z_ND.shape)}; found {block}: "
            "pass more tokens or a shorter block"
        )
    return prepare(z_ND, normalize, center)


def _own_mass(z_ND: Tensor, block: int) -> Tensor:
    """Sum ``k_ij^2`` over the pairs within each block.

    Returns:
        ``[..., num_blocks]``.
    """
    z_BPD = split_patches(torch.nn.functional.pad(z_ND, (0, 0, 0, -z_ND.shape[-2] % block)), block)
    return (z_BPD @ z_BPD.mT).square().sum((-2, -1))


def _pair_sums(z_ND: Tensor, gram_SS: Tensor, own_mass_B: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Sum over pairs whose first token lies in a block and whose second lies in another.

    Returns:
        ``k_ii k_jj`` and ``k_ij^2``, each ``[..., num_blocks]``.
    """
    rows_first = z_ND.shape[-2] <= z_ND.shape[-1]
    row_mass_N = gram_SS.square().sum(-1) if rows_first else (z_ND @ gram_SS * z_ND).sum(-1)
    trace_B = sum_blocks(z_ND.square().sum(-1), block)
    return trace_B * (trace_B.sum(-1, keepdim=True) - trace_B), sum_blocks(row_mass_N, block) - own_mass_B


def _entropy_of_pairs(trace_pairs_B: Tensor, mass_pairs_B: Tensor) -> tuple[Tensor, Tensor]:
    """Turn pair sums into S2 and its standard error; the pair count cancels.

    Returns:
        Value and standard error, ``[...]``.
    """
    trace_pairs, mass_pairs = trace_pairs_B.sum(-1), mass_pairs_B.sum(-1)
    influence_B = 2 * (trace_pairs_B / trace_pairs[..., None] - mass_pairs_B / mass_pairs[..., None])
    std_error = influence_B.square().sum(-1).sqrt()
    if influence_B.shape[-1] < 3:  # one pair of blocks: both have the same share in it, and no spread can be seen
        std_error = torch.full_like(std_error, torch.nan)
    return trace_pairs.log() - mass_pairs.log(), std_error


def von_neumann(z_ND: Tensor, gram_SS: Tensor) -> tuple[Tensor, Tensor]:
    """Give S1 and each token's ``<z_i, h_i> / 2 = -((K log A)_ii + S1 k_ii) / T``, ``A = K / T``.

    Returns:
        ``[...]`` and ``[..., n]``.
    """
    eigenvalues_S, vectors_SS = eigenvectors(gram_SS)
    total_1 = eigenvalues_S.sum(-1, keepdim=True)
    density_S, _ = positive_part(eigenvalues_S / total_1)
    entropy_1 = -(density_S * density_S.log()).sum(-1, keepdim=True)
    if z_ND.shape[-2] <= z_ND.shape[-1]:
        a_log_a_N = (vectors_SS.square() @ (density_S * density_S.log())[..., None])[..., 0]
    else:
        a_log_a_N = ((z_ND @ vectors_SS).square() @ density_S.log()[..., None])[..., 0] / total_1
    return entropy_1[..., 0], -(a_log_a_N + entropy_1 * z_ND.square().sum(-1) / total_1)
