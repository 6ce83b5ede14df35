"""Soft assignments of the sampled tokens: made once a frame, for its own entropy and for the window. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_monitor.estimators import soft_assign
from entropy_monitor.types import PATCH_LENGTH, TOKEN_OFFSETS
from entropy_monitor.watcher.pool import Pooled, is_finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from entropy_monitor.types import Frame


class Assignments(NamedTuple):
    """Soft assignments of the tokens that some layers share."""

    layers: tuple[str, ...]
    p_NLM: Tensor
    """Rows of probabilities over the reference points."""
    ranks: tuple[int, ...]
    """Whose tokens they are, in order."""
    num_tokens: tuple[int, ...]
    """How many of each rank."""
    tokens_NW: Tensor | None
    """Token ids at `TOKEN_OFFSETS`; None where a rank has not streamed them."""


def assign(pooled: Pooled) -> Assignments | None:
    """Assign the pooled tokens of few layers.

    Returns:
        The assignments, NaN for tokens of norm 0 and throughout a layer that is not finite; None without tokens.
    """
    if not pooled.z_LND.shape[1]:
        return None
    p_LNM = soft_assign(pooled.z_LND)
    p_LNM[~is_finite(pooled.z_LND)] = math.nan
    return Assignments(
        layers=pooled.layers,
        p_NLM=p_LNM.transpose(0, 1).contiguous(),
        ranks=tuple(frame.rank for frame in pooled.frames),
        num_tokens=tuple(frame.num_patches * PATCH_LENGTH for frame in pooled.frames),
        tokens_NW=_tokens(pooled.frames, pooled.z_LND.shape[1]),
    )


def determined_patches(p_NLM: Tensor) -> Tensor:
    """Tell which patches have a direction at each of their tokens: none that is zero or not finite.

    Returns:
        ``[L, B]``.
    """
    determined_NL = ~p_NLM[:, :, 0].isnan()
    return determined_NL.unflatten(0, (-1, PATCH_LENGTH)).all(1).T


def join_layers(assignments: Sequence[Assignments]) -> list[Assignments]:
    """Put layers that were assigned few at a time, and share their tokens, beside each other.

    Returns:
        One record for each set of ranks whose tokens layers share.
    """
    alike: dict[tuple[object, ...], list[Assignments]] = {}
    for assigned in assignments:
        alike.setdefault((assigned.ranks, assigned.num_tokens), []).append(assigned)
    return [
        group[0]._replace(
            layers=tuple(layer for assigned in group for layer in assigned.layers),
            p_NLM=torch.cat([assigned.p_NLM for assigned in group], dim=1),
        )
        for group in alike.values()
    ]


def _tokens(frames: Sequence[Frame], num_tokens: int) -> Tensor | None:
    windows = [frame.token_windows for frame in frames]
    if any(window is None or window.shape[1] != len(TOKEN_OFFSETS) for window in windows):
        return None
    kept = [
        torch.as_tensor(window[: frame.num_patches * PATCH_LENGTH]).long()
        for window, frame in zip(windows, frames, strict=True)
        if window is not None
    ]
    tokens_NW = torch.cat(kept)
    return tokens_NW if len(tokens_NW) == num_tokens else None
