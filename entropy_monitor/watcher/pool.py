"""The frames of one step as one sample: tokens of all ranks side by side. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from entropy_monitor.types import PATCH_LENGTH

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from entropy_monitor.types import Frame

_MAX_ENTRIES = 1 << 20
"""Activations estimated at once: large models stay within memory, and small ones within the cache."""


class Pooled(NamedTuple):
    """Sampled tokens of all ranks, for layers of equal shape."""

    layers: tuple[str, ...]
    z_LND: Tensor
    g_LND: Tensor | None
    """None unless every rank streams gradients."""
    frames: tuple[Frame, ...]
    """The frames that hold these layers, in the order of their tokens; ranks that hold others have none of them."""


def check_frames(frames: Sequence[Frame]) -> None:
    """Refuse frames that cannot be one sample.

    Raises:
        ValueError: no frames, frames of several steps, without arrays or of inconsistent shapes.
    """
    if not frames:
        raise ValueError("expected the frames of one step, found none: pass at least one")
    steps = {(frame.run_id, frame.attempt, frame.step) for frame in frames}
    if len(steps) > 1:
        raise ValueError(f"expected frames of one run, attempt and step; found {sorted(steps)}: measure each apart")
    for frame in frames:
        if not frame.groups:
            raise ValueError(
                f"expected frames with arrays; frame {frame.seq} of rank {frame.rank} was read without them"
            )
        shortest = min(group.activations.shape[1] for group in frame.groups)
        if not 0 <= frame.num_patches * PATCH_LENGTH <= shortest:
            raise ValueError(
                f"expected {frame.num_patches} patches of {PATCH_LENGTH} tokens in frame {frame.seq} of rank "
                f"{frame.rank}; found {shortest} tokens: the frame is damaged"
            )


def pool_frames(frames: Sequence[Frame]) -> Iterator[Pooled]:
    """Concatenate each layer's tokens over ranks, padding dropped.

    Yields:
        Few layers at a time; ranks that hold different layers (pipeline stages) give groups of their own.

    Raises:
        ValueError: ranks group the same layers differently.
    """
    holders: dict[tuple[str, ...], list[tuple[Frame, int]]] = {}
    for frame in frames:
        for index, group in enumerate(frame.groups):
            holders.setdefault(tuple(group.layers), []).append((frame, index))
    names = [layer for layers in holders for layer in layers]
    if len(set(names)) < len(names):
        raise ValueError(f"expected ranks to group their layers alike, found {list(holders)}: measure the ranks apart")
    for layers, held in holders.items():
        groups = [frame.groups[index] for frame, index in held]
        stops = [frame.num_patches * PATCH_LENGTH for frame, _ in held]
        activations = [group.activations[:, :stop] for group, stop in zip(groups, stops, strict=True)]
        gradients = [
            group.gradients[:, :stop] for group, stop in zip(groups, stops, strict=True) if group.gradients is not None
        ]
        size = sum(array[0].size for array in activations)
        step = max(1, _MAX_ENTRIES // max(1, size))
        for first in range(0, len(layers), step):
            few = slice(first, first + step)
            yield Pooled(
                layers[few],
                _side_by_side([array[few] for array in activations]),
                _side_by_side([array[few] for array in gradients]) if len(gradients) == len(held) else None,
                tuple(frame for frame, _ in held),
            )


def _side_by_side(arrays: Sequence[NDArray[np.float32]]) -> Tensor:
    tensors = [as_tensor(array) for array in arrays]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


def as_tensor(array: NDArray[np.float32]) -> Tensor:
    """Convert an array; those read from a store may be read-only, which torch warns about.

    Returns:
        The tensor.
    """
    return torch.as_tensor(np.require(array, requirements=["C", "W"]))


def is_finite(z_LND: Tensor) -> Tensor:
    """Tell which layers have finite entries alone; an empty sample is in order.

    Returns:
        ``[L]``.
    """
    # The largest entry passes NaN on, and costs a fraction of isfinite over all of them.
    if not z_LND.shape[1]:
        return torch.ones(z_LND.shape[0], dtype=torch.bool)
    return z_LND.abs().amax((1, 2)).isfinite()
