"""The one computation behind `mutual_information` and `information_plane`: soft assignments against label sets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch

from entropy_monitor.estimators.label_sums import set_entropies, sum_labels
from entropy_monitor.estimators.rarefaction import ConditionalBias, LearnedFrom, conditional_bias
from entropy_monitor.estimators.soft_entropy import entropy_of_shares, safe_log, second_order, sum_patches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

Correction: TypeAlias = Literal["rarefied", "none"]

_ENTRIES_AT_ONCE = 1 << 18
"""Influences are taken in chunks of about a megabyte of fp32."""


class OrderInformation(NamedTuple):
    """Information about one label set, L layers, nats, fp64."""

    plug_in_L: Tensor
    bias_L: Tensor
    std_error_L: Tensor
    psi_BL: Tensor
    """Influences summed over each patch that was looked at, mean 0."""
    num_labels: int
    learned_from: LearnedFrom


def check_correction(correction: str) -> None:
    """Refuse an unknown correction.

    Raises:
        ValueError: neither of the two.
    """
    if correction not in {"rarefied", "none"}:
        raise ValueError(f"correction: expected rarefied or none, found {correction!r}: rarefied is usual")


def refined_information(
    p_NLM: Float[Tensor, "n l m"],
    labels: Sequence[Int[Tensor, " n"]],
    *,
    correction: Correction,
    patch: int,
    influence: slice,
    seed: int,
) -> tuple[OrderInformation, ...]:
    """Estimate the information about label sets that refine one another.

    Args:
        p_NLM: soft assignments of consecutive tokens.
        labels: orders from coarse to fine, numbered from 0 without gaps.
        correction: see `mutual_information`.
        patch: tokens drawn together.
        influence: rows from which standard errors are taken, whole patches.
        seed: of the private generator that chooses what the bias is learned from.

    Returns:
        One for each order.
    """
    table = sum_labels(p_NLM, labels)
    entropy_VL = set_entropies(table)
    num_tokens, finest_U = len(p_NLM), table.sets[-1]
    share_LM = table.sums_VLM[: len(finest_U)].sum(0) / num_tokens
    entropy_L = entropy_of_shares(share_LM.double())
    sample_RLM = p_NLM[influence]
    rarefied = correction == "rarefied"
    total_bias_L = bias_of_tokens(sample_RLM, share_LM, num_tokens) if rarefied else torch.zeros_like(entropy_L)
    orders: list[OrderInformation] = []
    for label_N, set_U in zip(labels, table.sets, strict=True):
        count_U, entropy_UL = table.count_V[set_U], entropy_VL[set_U]
        plug_in_L = entropy_L - (count_U.double() / num_tokens) @ entropy_UL
        label_R = label_N[influence]
        psi_RL = influences(sample_RLM, table.sums_VLM, table.count_V, set_U[label_R], share_LM)
        bias = None
        if rarefied:
            generator = torch.Generator().manual_seed(seed)  # each order as it would be by itself
            bias = conditional_bias(p_NLM, label_N, count_U, entropy_UL, entropy_L, generator)
            psi_RL = psi_RL - bias.added_by_one_UL[label_R]
        psi_BL = sum_patches(psi_RL - psi_RL.mean(0), patch)
        orders.append(order_information(plug_in_L, bias, total_bias_L, psi_BL, len(sample_RLM), num_tokens, len(set_U)))
    return tuple(orders)


def covariance(
    first_BL: Float[Tensor, "b l"], second_BL: Float[Tensor, "b l"], num_rows: int, num_tokens: int
) -> Float[Tensor, " l"]:
    """Covariance of two figures from their patches' influences: the variance where both are the same.

    Args:
        first_BL: sums of influences over patches, mean 0.
        second_BL: those of the other figure.
        num_rows: tokens in the patches looked at.
        num_tokens: tokens behind the figures.

    Returns:
        Nats squared; NaN for a single patch.
    """
    if len(first_BL) < 2:
        return torch.full_like(first_BL[0], math.nan)
    return (first_BL * second_BL).sum(0) / (num_rows * num_tokens)


def bias_of_total(
    sums_BLM: Float[Tensor, "b l m"], size_B: Float[Tensor, " b"], share_LM: Float[Tensor, "l m"], num_tokens: int
) -> Float[Tensor, " l"]:
    """How far the plug-in H(Z) is expected low, ``1/2 sum_b Var(P_b) / P_b``.

    Args:
        sums_BLM: assignments summed over patches, those looked at.
        size_B: tokens in each.
        share_LM: mean assignment of all tokens.
        num_tokens: tokens behind the entropy.

    Returns:
        Nats, fp64; NaN for a single patch.
    """
    num_rows = size_B.sum()
    mean_LM = sums_BLM.sum(0) / num_rows
    squares_LM = (sums_BLM - size_B[:, None, None] * mean_LM).square_().sum(0)
    return second_order(squares_LM, share_LM, len(sums_BLM)).double() / (num_rows * num_tokens)


def bias_of_tokens(
    p_RLM: Float[Tensor, "r l m"], share_LM: Float[Tensor, "l m"], num_tokens: int
) -> Float[Tensor, " l"]:
    """`bias_of_total` as if tokens were independent, for use within information.

    Likeness within a patch lowers H(Z) and H(Z|X) alike, to second order, and what is learned of H(Z|X) does not know
    of it: counted in H(Z) alone, it would be taken for information.

    Returns:
        Nats, fp64; NaN for a single token.
    """
    num_rows = len(p_RLM)
    # The sum of squares by its norm reads p once and writes nothing.
    squares_LM = torch.linalg.vector_norm(p_RLM, dim=0).square() - num_rows * p_RLM.mean(0).square()
    return second_order(squares_LM.clamp_min(0), share_LM, num_rows).double() / (num_rows * num_tokens)


def order_information(
    plug_in_L: Float[Tensor, " l"],
    bias: ConditionalBias | None,
    total_bias_L: Float[Tensor, " l"],
    psi_BL: Float[Tensor, "b l"],
    num_rows: int,
    num_tokens: int,
    num_labels: int,
) -> OrderInformation:
    """Put the parts together; the errors of influences and of the learned bias add up as if they were independent.

    Args:
        plug_in_L: plug-in information.
        bias: of H(Z|X); None for no correction.
        total_bias_L: of H(Z).
        psi_BL: sums of influences over patches, mean 0.
        num_rows: tokens in the patches looked at.
        num_tokens: tokens behind the figures.
        num_labels: distinct labels.

    Returns:
        `OrderInformation`; exactly 0 for a single label.
    """
    variance_L = covariance(psi_BL, psi_BL, num_rows, num_tokens)
    if num_labels == 1:  # H(Z|X) is H(Z): all else would be rounding, and noise of the correction; NaN stays
        zero_L = 0 * plug_in_L.abs()
        return OrderInformation(zero_L, zero_L, 0 * variance_L, psi_BL, num_labels, "none")
    if bias is None:
        return OrderInformation(plug_in_L, torch.zeros_like(plug_in_L), variance_L.sqrt(), psi_BL, num_labels, "none")
    std_error_L = (variance_L + bias.variance_L).sqrt()
    return OrderInformation(plug_in_L, bias.value_L - total_bias_L, std_error_L, psi_BL, num_labels, bias.learned_from)


def influences(p_RLM: Tensor, sums_VLM: Tensor, count_V: Tensor, set_R: Tensor, share_LM: Tensor) -> Tensor:
    """Give each row's ``sum_b p_b log(P_xb / P_b)``, the mean of which is the information.

    Args:
        p_RLM: soft assignments.
        sums_VLM: assignments summed over the tokens of each label.
        count_V: tokens of each label.
        set_R: the label of each row.
        share_LM: mean assignment of all tokens.

    Returns:
        fp64, ``[R, L]``.
    """
    step = max(1, _ENTRIES_AT_ONCE // share_LM.numel())
    log_share_LM = safe_log(share_LM)
    # Logarithms are most of the work: of the labels where these are fewer than the rows, else of the rows' own.
    log_ratio_VLM = None
    if len(p_RLM) > len(sums_VLM):
        log_ratio_VLM = safe_log(sums_VLM / count_V[:, None, None]).sub_(log_share_LM)
    chunks: list[Tensor] = []
    for first in range(0, len(p_RLM), step):
        few = slice(first, first + step)
        if log_ratio_VLM is None:
            share_RLM = sums_VLM[set_R[few]] / count_V[set_R[few], None, None]
            log_ratio_RLM = safe_log(share_RLM).sub_(log_share_LM)
        else:
            log_ratio_RLM = log_ratio_VLM[set_R[few]]
        chunks.append(log_ratio_RLM.mul_(p_RLM[few]).sum(-1))
    return torch.cat(chunks).double()
