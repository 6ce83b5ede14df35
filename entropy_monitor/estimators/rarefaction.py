"""The bias of plug-in entropy in small samples, learned from labels with many tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch

from entropy_monitor.estimators.label_sums import CACHED_ENTRIES
from entropy_monitor.estimators.soft_entropy import safe_log

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

NUM_ROWS = 32
"""Tokens a label must have to be learned from, and that are taken from it."""
MAX_GROUPS = 64
"""Labels learned from at most."""

LearnedFrom: TypeAlias = Literal["labels", "pooled groups", "none"]


class LearnedBias(NamedTuple):
    """How far the entropy of a mean of k rows is expected below that of very many, in nats, fp64.

    J estimates: the first from all groups of rows, the others each without one of them.
    """

    bias_KJL: Tensor
    """At k = 1, 2, 4, 8 and 16."""
    scale_JL: Tensor
    """Above, the bias is ``scale / (k + offset)``."""
    offset_JL: Tensor

    def at(self, count_C: Int[Tensor, " c"]) -> Float[Tensor, "c j l"]:
        """Give the bias at each count; up to 16 linear in log k between the learned ones.

        Returns:
            Nats, fp64.
        """
        return torch.tensordot(_hats(count_C), self.bias_KJL, dims=1) + self._above_16(count_C)

    def mean(self, count_C: Int[Tensor, " c"], share_C: Float[Tensor, " c"]) -> Float[Tensor, "j l"]:
        """Give ``sum_c share_c b(count_c)``, the bias of H(Z|X), without spelling out b at each count.

        Returns:
            Nats, fp64.
        """
        large_C = count_C > 16
        small_JL = torch.tensordot(share_C @ _hats(count_C), self.bias_KJL, dims=1)
        return small_JL + torch.tensordot(share_C[large_C], self._above_16(count_C[large_C]), dims=1)

    def added_by_one(self, count_C: Int[Tensor, " c"]) -> Float[Tensor, "c l"]:
        """Give ``k b(k) - (k - 1) b(k - 1)``: what one token adds to ``sum_x n_x b(n_x)``.

        Returns:
            Nats, fp64.
        """
        full = LearnedBias(self.bias_KJL[:, :1], self.scale_JL[:1], self.offset_JL[:1])
        count_C1 = count_C[:, None]
        return count_C1 * full.at(count_C)[:, 0] - (count_C1 - 1) * full.at(count_C - 1)[:, 0]

    def _above_16(self, count_C: Tensor) -> Tensor:
        count_C11 = count_C[:, None, None]
        return torch.where(count_C11 > 16, self.scale_JL / (count_C11 + self.offset_JL), 0.0)


class ConditionalBias(NamedTuple):
    """How far the plug-in H(Z|X) is expected low, in nats, fp64."""

    value_L: Tensor
    variance_L: Tensor
    """By leaving out one group of rows at a time; errs high where the labels learned from are all there are."""
    added_by_one_UL: Tensor
    """What each token of a label adds, times the number of tokens."""
    learned_from: LearnedFrom


def choose_rows(
    label_N: Int[Tensor, " n"], count_U: Int[Tensor, " u"], generator: torch.Generator
) -> tuple[Int[Tensor, "g k"], Int[Tensor, " g"] | None]:
    """Choose up to 64 labels of at least 32 tokens, and 32 tokens of each; where there are none, random groups.

    All such labels are equally likely, whatever their counts. In the sum that is to be corrected, a frequent label
    stands with ``n_x/n Q_x/(2 n_x) = Q_x/(2 n)``, all alike; and the rare ones, of a few tokens each, weigh nearly
    alike, too. Weights by count would let a few function words speak for all.

    Args:
        label_N: numbered from 0.
        count_U: tokens of each label.
        generator: private, on the CPU.

    Returns:
        Indices of tokens in random order, and the label of each group; None for pooled groups.
    """
    device = label_N.device
    frequent_F = (count_U >= NUM_ROWS).nonzero()[:, 0]
    if not len(frequent_F):
        num_groups = min(MAX_GROUPS, len(label_N) // NUM_ROWS)
        shuffled_N = torch.randperm(len(label_N), generator=generator)[: num_groups * NUM_ROWS]
        return shuffled_N.reshape(num_groups, NUM_ROWS).to(device), None
    chosen_G = frequent_F[torch.randperm(len(frequent_F), generator=generator)[:MAX_GROUPS].sort().values.to(device)]
    group_U = torch.full_like(count_U, -1)
    group_U[chosen_G] = torch.arange(len(chosen_G), device=device)
    token_C = (group_U[label_N] >= 0).nonzero()[:, 0]
    token_C = token_C[torch.argsort(group_U[label_N[token_C]], stable=True)]
    first_G1 = (count_U[chosen_G].cumsum(0) - count_U[chosen_G])[:, None]
    # One of each 32nd part of the occurrences, so that all times are heard, at random within it, as text has rhythms;
    # and shuffled: neighbours in time, which are alike, fall into different means.
    edge_GE = count_U[chosen_G][:, None] * torch.arange(NUM_ROWS + 1, device=device) // NUM_ROWS
    share_GK = torch.rand(len(chosen_G), NUM_ROWS, generator=generator, dtype=torch.float64).to(device)
    occurrence_GK = edge_GE[:, :-1] + (share_GK * edge_GE.diff(dim=1)).long()
    shuffled_K = torch.randperm(NUM_ROWS, generator=generator).to(device)
    return token_C[first_G1 + occurrence_GK[:, shuffled_K]], chosen_G


def learn_bias(
    p_RLM: Float[Tensor, "r l m"],
    rows_GK: Int[Tensor, "g 32"],
    entropy_GL: Float[Tensor, "g l"],
    count_G: Int[Tensor, " g"],
) -> LearnedBias:
    """Learn b(k) = H - E H(mean of k rows) from groups of 32 rows of one label each.

    What entropy gains from means of k rows to means of 2 k rows of the same label is an unbiased estimate of
    ``b(k) - b(2 k)``, and needs no knowledge of H. From 16 rows on, b is taken to be ``a / (k + c)``, which falls as
    the second-order term ``Q / (2 k)`` for large k: c is found from the gains at 8 and 16, and a from the gain from 16
    rows to all of a label's. (Q itself, ``sum_b var(p_b) / mean(p_b)``, reads half of its value in 32 rows, as shares
    are heavy-tailed.)

    Args:
        p_RLM: soft assignments.
        rows_GK: the rows of each group.
        entropy_GL: plug-in entropy of each group's label, over all its tokens.
        count_G: tokens of that label, at least 32.

    Returns:
        `LearnedBias`, each group counting alike.
    """
    num_groups = len(rows_GK)
    without_one_GG = (1 - torch.eye(num_groups, dtype=torch.float64)) / torch.tensor(num_groups - 1.0)
    all_1G = torch.full((1, num_groups), 1 / num_groups, dtype=torch.float64)
    weight_JG = torch.cat([all_1G, without_one_GG]).to(p_RLM.device)
    entropy_KJL = weight_JG @ _entropies_of_means(p_RLM, rows_GK)
    gain_8_JL, gain_16_JL = entropy_KJL[4] - entropy_KJL[3], entropy_KJL[5] - entropy_KJL[4]
    # gain_8 / gain_16 = (32 + c) / (2 (8 + c)): c falls from infinity to 0 as the ratio rises from 1/2 to 2.
    smallest = torch.finfo(torch.float64).tiny
    offset_JL = 16 * (2 * gain_16_JL - gain_8_JL).clamp_min(0) / (2 * gain_8_JL - gain_16_JL).clamp_min(smallest)
    offset_JL = offset_JL.clamp_max(NUM_ROWS)  # beyond, it is the noise of few labels that speaks
    end_JL = (weight_JG[:, :, None] / (count_G[:, None] + offset_JL[:, None])).sum(1)
    scale_JL = (weight_JG @ entropy_GL - entropy_KJL[4]) / (1 / (16 + offset_JL) - end_JL)
    return LearnedBias(scale_JL / (16 + offset_JL) + entropy_KJL[4] - entropy_KJL[:5], scale_JL, offset_JL)


def _entropies_of_means(p_RLM: Tensor, rows_GK: Tensor) -> Tensor:
    """Give the entropy of the means of 1, 2, 4, ..., 32 rows, averaged over the means of each group.

    Returns:
        Nats, fp64, ``[6, G, L]``.
    """
    few = max(1, CACHED_ENTRIES // (NUM_ROWS * p_RLM[0].numel()))
    masses: list[Tensor] = []
    for rows_FK in rows_GK.split(few):
        sums_FKLM = p_RLM[rows_FK]
        levels = [_sum_s_log_s(sums_FKLM)]
        while sums_FKLM.shape[1] > 1:
            sums_FKLM = sums_FKLM[:, ::2] + sums_FKLM[:, 1::2]
            levels.append(_sum_s_log_s(sums_FKLM))
        masses.append(torch.stack(levels))
    mass_KGL = torch.cat(masses, dim=1).double() / NUM_ROWS
    # A mean P of k rows, with sum S = k P, has the entropy log k - sum S log S / k.
    return torch.arange(len(mass_KGL), device=mass_KGL.device)[:, None, None] * math.log(2) - mass_KGL


def _sum_s_log_s(sums_FKLM: Tensor) -> Tensor:
    return safe_log(sums_FKLM).mul_(sums_FKLM).sum((1, 3))


def _hats(count_C: Tensor) -> Tensor:
    """Weights of the bias at 1, 2, 4, 8 and 16 in that at each count; 0 above 16.

    Returns:
        fp64, ``[C, 5]``.
    """
    position_C1 = count_C.double().log2()[:, None]
    hats_CK = (1 - (position_C1 - torch.arange(5, device=count_C.device)).abs()).clamp_min(0)
    return torch.where(position_C1 > 4, 0.0, hats_CK)


def conditional_bias(
    p_RLM: Float[Tensor, "r l m"],
    label_R: Int[Tensor, " r"],
    count_U: Int[Tensor, " u"],
    entropy_UL: Float[Tensor, "u l"],
    entropy_L: Float[Tensor, " l"],
    generator: torch.Generator,
) -> ConditionalBias:
    """``sum_x n_x/n b(n_x)``: how far the plug-in H(Z|X) is expected low.

    Args:
        p_RLM: the tokens to learn from, all or a sample.
        label_R: their labels.
        count_U: tokens of each label, among all.
        entropy_UL: plug-in entropy of each label, fp64.
        entropy_L: plug-in entropy of all tokens, fp64.
        generator: private, on the CPU.

    Returns:
        `ConditionalBias`; NaN from fewer than 32 tokens, its variance from a single group.
    """
    if len(label_R) < NUM_ROWS:
        unknown_L = torch.full_like(entropy_L, math.nan)
        return ConditionalBias(unknown_L, unknown_L, torch.full_like(entropy_UL, math.nan), "none")
    rows_GK, chosen_G = choose_rows(label_R, torch.bincount(label_R, minlength=len(count_U)), generator)
    if chosen_G is None:
        reference_GL, count_G = entropy_L.expand(len(rows_GK), -1), count_U.sum().expand(len(rows_GK))
    else:
        reference_GL, count_G = entropy_UL[chosen_G], count_U[chosen_G]
    learned = learn_bias(p_RLM, rows_GK, reference_GL, count_G)
    # Labels of equal counts share their bias, and there are few different counts.
    value_C, place_U, times_C = torch.unique(count_U, return_inverse=True, return_counts=True)
    share_C = (value_C * times_C).double() / count_U.sum()
    bias_JL = learned.mean(value_C, share_C)
    spread_L = (bias_JL[1:] - bias_JL[1:].mean(0)).square().sum(0)
    return ConditionalBias(
        bias_JL[0],
        spread_L * (len(rows_GK) - 1) / len(rows_GK),
        learned.added_by_one(value_C)[place_U],
        "pooled groups" if chosen_G is None else "labels",
    )
