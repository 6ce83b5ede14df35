"""Labels from runs of tokens: n-grams with back-off, each order a refinement of the one below."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from entropy_monitor.estimators.inputs import as_tensor

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from entropy_monitor.estimators.inputs import Array


def backoff_labels(tokens: Int[Array, "n k"], min_count: int = 8) -> tuple[Int[Tensor, " n"], ...]:
    """Label each position by the n-grams beside it, backing off to shorter ones where they are rare.

    The label of order j is the longest run of the nearest tokens, of at most j, that occurs at least ``min_count``
    times in this sample. Order 1, the nearest token alone, is never backed off. Each label of order j + 1 therefore
    lies within one label of order j: the orders refine one another, and information grows with the order but for bias.

    Source: arXiv 2604.07569 labels by n-grams with back-off and does not say more; the threshold and the rule are ours.
    Without back-off most trigrams occur once, and once says nothing about H(Z|x).

    Args:
        tokens: ids, ``[n, k]``, nearest token first: for the input n-gram ending at a position its columns are the
            tokens at 0, -1, -2; for the output n-gram those at +1, +2, +3. Any integer is a token, -1 for "none" too.
        min_count: occurrences from which a longer run is its own label.

    Returns:
        k tensors ``[n]``, orders 1 to k, labels counted from 0 without gaps; on the device of ``tokens``.

    Raises:
        ValueError: not integers of shape ``[n, k]``, or ``min_count`` below 1.

    >>> import torch
    >>> first, second = backoff_labels(torch.tensor([[5, 1], [5, 1], [5, 2], [7, 1]]), min_count=2)
    >>> first.tolist(), second.tolist()
    ([0, 0, 0, 1], [2, 2, 0, 1])
    """
    tokens_NK = as_tensor(tokens, "tokens")
    if tokens_NK.ndim != 2 or 0 in tokens_NK.shape or tokens_NK.is_floating_point() or tokens_NK.is_complex():
        raise ValueError(
            f"tokens: expected integers of shape [n, k], none of them 0; found {tuple(tokens_NK.shape)} of "
            f"{tokens_NK.dtype}: pass one row per position, nearest token first"
        )
    if min_count < 1:
        raise ValueError(f"min_count: expected at least 1, found {min_count}: 8 is usual")
    _, run_N = torch.unique(tokens_NK[:, 0], return_inverse=True)
    labels = [run_N]
    for column_N in tokens_NK.long().T[1:]:
        run_N, count_N = _extend(run_N, column_N)
        # Longer runs get numbers above all shorter ones; numbering anew closes the gaps and keeps that order.
        kept_N = torch.where(count_N >= min_count, run_N + int(labels[-1].max()) + 1, labels[-1])
        labels.append(torch.unique(kept_N, return_inverse=True)[1])
    return tuple(labels)


def _extend(run_N: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor]:
    """Lengthen each run by the next token.

    Returns:
        Numbers of the longer runs, and how often each position's run occurs.
    """
    values_V, token_N = torch.unique(column_N, return_inverse=True)
    _, longer_N, counts_U = torch.unique(run_N * len(values_V) + token_N, return_inverse=True, return_counts=True)
    return longer_N, counts_U[longer_N]
