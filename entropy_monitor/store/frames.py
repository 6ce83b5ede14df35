"""Frames on disk: their shape, and which of them a run has.

A frame exists once its commit record does: `frame_writer` creates it last, `frame_reader` looks at it first and last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entropy_monitor.store import layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from entropy_monitor.store.objects import Objects

FRAME_SCALARS = ("loss", "lr", "grad_norm", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLayout:
    """Layers that share tokens, width and dtype, and so one array of the segment."""

    layers: tuple[str, ...]
    num_tokens: int
    num_features: int
    dtype: str
    """``bfloat16``, ``float16`` or ``float32``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameLayout:
    """Shape of every frame of a segment; a change of it opens a fresh segment."""

    groups: tuple[GroupLayout, ...]
    gradients: bool
    token_window: int
    """Token ids stored around each position; 0 stores none."""
    alignment_layers: tuple[str, ...]
    """Layers with weight-space alignment; empty stores none."""
    exact_layers: tuple[str, ...] = ()
    """Layers with exact alignment; empty stores none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameData:
    """One frame as its writer hands it over: host arrays in the stored types."""

    attempt: int
    step: int
    phase: str
    wall_time_s: float
    num_patches: int
    num_tokens_seen: int
    scalars: Mapping[str, float]
    """The values of `FRAME_SCALARS`; a missing one is NaN."""
    groups: tuple[NDArray[Any], ...]
    """Of shape ``(kinds, L, n, d)`` each; bfloat16 viewed as uint16."""
    tokens: NDArray[np.int32] | None = None
    alignment: NDArray[np.float32] | None = None
    alignment_info: NDArray[np.float32] | None = None
    exact_alignment: NDArray[np.float32] | None = None


def next_segment(objects: Objects, rank: int) -> int:
    """First segment number that was never used, also when retention has removed every segment.

    Returns:
        The number.
    """
    removed = objects.get_json(layout.retention_key(rank)) or {}
    return max([-1, int(removed.get("removed_through", -1)), *list_segments(objects, rank)]) + 1


def list_segments(objects: Objects, rank: int) -> list[int]:
    """Numbers of a rank's segments.

    Returns:
        The numbers, ascending.
    """
    return layout.numbers(objects.children(layout.frames_key(rank)), r"s(\d{6,})")


def list_commits(objects: Objects, rank: int, segment: int) -> list[int]:
    """Committed frames of one segment.

    Returns:
        Their `seq`, ascending.
    """
    names = objects.children(f"{layout.frames_key(rank, segment)}/commit")
    return [layout.SEGMENT_FRAMES * segment + slot for slot in layout.numbers(names, r"c\.(\d+)\.0")]


def list_ranks(objects: Objects) -> list[int]:
    """Ranks that have written frames.

    Returns:
        The ranks, ascending.
    """
    return layout.numbers(objects.children(f"{layout.ROOT}/frames"), r"r(\d{5,})")
