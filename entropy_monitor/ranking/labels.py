"""Labels of every token of a text: what ends at it, and what follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from entropy_monitor.estimators import backoff_labels

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

ORDERS = (1, 2, 3)
_NOTHING = -1
"""Stands for a token outside the block or behind the text's end."""


def ngram_labels(ids_T: Int[Tensor, " t"], block: int) -> dict[str, Int[Tensor, " n"]]:
    """Label the tokens of all whole blocks by input and output n-grams, with back-off.

    The input n-gram ends at the token and does not reach out of its block, which is all that the model sees. The output
    n-gram starts after the token and may reach into what follows the block.

    Args:
        ids_T: token ids of the text in order, ``[t]``.
        block: tokens that the model sees at once; those behind the last whole block get no label.

    Returns:
        ``input_1`` to ``input_3`` and ``output_1`` to ``output_3``, integers ``[n]``, n a multiple of ``block``.

    >>> import torch
    >>> labels = ngram_labels(torch.tensor([5, 6, 5, 6, 5]), block=2)
    >>> labels["input_1"].tolist(), labels["output_1"].tolist()
    ([0, 1, 0, 1], [1, 0, 1, 0])
    """
    num_tokens = len(ids_T) // block * block
    inputs_NK = torch.stack([_earlier(ids_T[:num_tokens], block, distance) for distance in range(len(ORDERS))], 1)
    outputs_NK = torch.stack([_later(ids_T, num_tokens, distance) for distance in ORDERS], 1)
    return {
        f"{side}_{order}": label_N
        for side, tokens_NK in (("input", inputs_NK), ("output", outputs_NK))
        for order, label_N in zip(ORDERS, backoff_labels(tokens_NK), strict=True)
    }


def _earlier(ids_N: Tensor, block: int, distance: int) -> Tensor:
    shifted = ids_N.reshape(-1, block).roll(distance, dims=1)
    shifted[:, :distance] = _NOTHING
    return shifted.flatten()


def _later(ids_T: Tensor, num_tokens: int, distance: int) -> Tensor:
    padded_T = torch.nn.functional.pad(ids_T, (0, distance), value=_NOTHING)
    return padded_T[distance : distance + num_tokens]
