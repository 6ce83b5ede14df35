"""Sums of soft assignments over the tokens of each label, for label sets that refine one another."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from entropy_monitor.estimators.inputs import as_tensor
from entropy_monitor.estimators.soft_entropy import safe_log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int

    from entropy_monitor.estimators.inputs import Array

CACHED_ENTRIES = 1 << 17
"""Entries treated at once: half a megabyte of fp32 stays in the cache through logarithm, product and sum."""


class LabelSums(NamedTuple):
    """Sums over every distinct set of tokens that any order's labels define; V sets."""

    sums_VLM: Tensor
    """Summed assignments."""
    count_V: Tensor
    """Tokens, int64."""
    sets: tuple[Tensor, ...]
    """For each order, coarse to fine, the set of each label, ``[U_j]``."""


def as_labels(labels: Int[Array, " n"], num_tokens: int) -> Int[Tensor, " n"]:
    """Check that there is one integer per token.

    Returns:
        int64, ``[n]``.

    Raises:
        ValueError: not integers, or not so many.
    """
    tensor = as_tensor(labels, "labels")
    if tensor.shape != (num_tokens,) or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(
            f"labels: expected {num_tokens} integers, one per token; found {tuple(tensor.shape)} of {tensor.dtype}: "
            "number the labels"
        )
    return tensor.long()


def sum_labels(p_NLM: Float[Tensor, "n l m"], labels: Sequence[Int[Tensor, " n"]]) -> LabelSums:
    """Sum rows by the finest labels once, and build the coarser sums from those.

    A label that an order leaves whole shares its set with the order below, so that its sum and its entropy are never
    computed twice.

    Args:
        p_NLM: soft assignments.
        labels: orders from coarse to fine, each refining the one before, numbered from 0 without gaps.

    Returns:
        `LabelSums`.

    Raises:
        ValueError: labels with gaps, or of which one order does not refine the order before.
    """
    counts = [_counts(label_N) for label_N in labels]
    parents = [_parents(fine_N, coarse_N) for coarse_N, fine_N in pairwise(labels)]
    sets, merged = _number_sets(parents, [len(count_U) for count_U in counts])
    num_sets = len(counts[-1]) + sum(len(children_C.unique()) for _, children_C in merged)
    sums_VLM = p_NLM.new_zeros(num_sets, *p_NLM.shape[1:])
    sums_VLM.index_add_(0, labels[-1], p_NLM)
    for child_C, set_C in merged:  # from fine to coarse: each order's parts are ready when they are needed
        sums_VLM.index_add_(0, set_C, sums_VLM[child_C])
    count_V = torch.empty(num_sets, dtype=torch.int64, device=p_NLM.device)
    for set_U, count_U in zip(sets, counts, strict=True):
        count_V[set_U] = count_U
    return LabelSums(sums_VLM, count_V, sets)


def set_entropies(table: LabelSums) -> Float[Tensor, "v l"]:
    """Plug-in entropy of the mean assignment of every set.

    Returns:
        Nats, fp64.
    """
    inverse_V11 = (1 / table.count_V.double()).to(table.sums_VLM.dtype)[:, None, None]
    step = max(1, CACHED_ENTRIES // table.sums_VLM[0].numel())
    chunks: list[Tensor] = []
    for first in range(0, len(table.sums_VLM), step):
        share_VLM = table.sums_VLM[first : first + step] * inverse_V11[first : first + step]
        chunks.append(-safe_log(share_VLM).mul_(share_VLM).sum(-1).double())
    return torch.cat(chunks)


def _counts(label_N: Tensor) -> Tensor:
    smallest = int(label_N.min())
    count_U = torch.bincount(label_N.clamp_min(0))
    if smallest or not count_U.all():
        found = f"{smallest} the smallest" if smallest else f"no {int((count_U == 0).nonzero()[0])}"
        raise ValueError(
            f"labels: expected numbers from 0 without gaps, found {found}: use backoff_labels or "
            "torch.unique(return_inverse=True)"
        )
    return count_U


def _parents(fine_N: Tensor, coarse_N: Tensor) -> Tensor:
    """Find the coarse label around each fine one.

    Returns:
        ``[U_fine]``.

    Raises:
        ValueError: a fine label lies in several coarse ones.
    """
    parent_U = coarse_N.new_zeros(int(fine_N.max()) + 1)
    parent_U[fine_N] = coarse_N
    if not torch.equal(parent_U[fine_N], coarse_N):
        raise ValueError(
            "labels: expected each order to refine the one before, found labels that cross: use backoff_labels"
        )
    return parent_U


def _number_sets(
    parents: Sequence[Tensor], num_labels: Sequence[int]
) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, Tensor]]]:
    """Number the distinct sets of tokens: the finest labels first, then each coarser label that joins several.

    Returns:
        The set of each label, by order from coarse to fine; and for each order from fine to coarse, the sets that are
        joined with the sets they join.
    """
    set_U = torch.arange(num_labels[-1], device=parents[0].device if parents else None)
    sets, merged, num_sets = [set_U], list[tuple[Tensor, Tensor]](), num_labels[-1]
    for parent_U, num_parents in zip(reversed(parents), reversed(num_labels[:-1]), strict=True):
        several_U = torch.bincount(parent_U, minlength=num_parents) > 1
        coarse_U = torch.empty(num_parents, dtype=torch.int64, device=parent_U.device)
        coarse_U[parent_U] = set_U
        num_joined = int(several_U.sum())
        coarse_U[several_U] = torch.arange(num_sets, num_sets + num_joined, device=parent_U.device)
        child_C = several_U[parent_U].nonzero()[:, 0]
        merged.append((set_U[child_C], coarse_U[parent_U[child_C]]))
        num_sets += num_joined
        set_U = coarse_U
        sets.append(set_U)
    return tuple(reversed(sets)), merged
