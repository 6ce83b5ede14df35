"""Names of everything in a run; `docs/store.md` draws the tree."""

from __future__ import annotations

import re

ROOT = "store.zarr"
SEGMENT_FRAMES = 64
"""Frames in one frame segment, and the factor between a segment's number and its first `seq`."""
TABLE_CHUNK_ROWS = 64
"""Rows rewritten with every append to the metrics table."""
TABLE_SEGMENT_ROWS = 4096
"""Rows in one segment of a table."""

COMMIT_COLUMNS = (
    "seq",
    "attempt",
    "step",
    "phase",
    "wall_time_s",
    "num_patches",
    "num_tokens_seen",
    "loss",
    "lr",
    "grad_norm",
    "weight",
)
"""Columns of a frame's commit record, float64."""

SCALAR_COLUMNS = ("step", "loss", "lr", "grad_norm", "num_tokens_seen", "phase", "weight", "wall_time_s")
"""Columns of the table that has every optimizer step, float64."""


def rank_name(rank: int) -> str:
    """``r00003`` for rank 3."""
    return f"r{rank:05d}"


def segment_name(segment: int) -> str:
    """``s000012`` for segment 12."""
    return f"s{segment:06d}"


def frames_key(rank: int, segment: int | None = None) -> str:
    """Group of a rank's frames, or of one segment of them."""
    rank_key = f"{ROOT}/frames/{rank_name(rank)}"
    return rank_key if segment is None else f"{rank_key}/{segment_name(segment)}"


def scalars_key(rank: int, segment: int | None = None) -> str:
    """Group of a rank's per-step scalars, or of one segment of them."""
    rank_key = f"{ROOT}/scalars/{rank_name(rank)}"
    return rank_key if segment is None else f"{rank_key}/{segment_name(segment)}"


def metrics_key(segment: int | None = None) -> str:
    """Group of the metrics, or of one segment of them."""
    return f"{ROOT}/metrics" if segment is None else f"{ROOT}/metrics/{segment_name(segment)}"


def commit_key(rank: int, seq: int) -> str:
    """The zarr chunk that holds a frame's commit record; its creation is the commit."""
    segment, slot = divmod(seq, SEGMENT_FRAMES)
    return f"{frames_key(rank, segment)}/commit/c.{slot}.0"


def attempt_key(attempt: int) -> str:
    """The record of one start of the trainer."""
    return f"attempts/{attempt:06d}.json"


def event_key(number: int) -> str:
    """One event."""
    return f"events/{number:08d}.json"


def command_key(number: int) -> str:
    """One command."""
    return f"control/commands/{number:08d}.json"


def ack_key(number: int, rank: int) -> str:
    """One rank's answer to one command."""
    return f"control/acks/{number:08d}.{rank_name(rank)}.json"


def heartbeat_key(who: str) -> str:
    """Heartbeat of ``r00000``, ... or ``watcher``."""
    return f"heartbeat/{who}.json"


def retention_key(rank: int) -> str:
    """What retention has removed of a rank's frames."""
    return f"retention/{rank_name(rank)}.json"


def bell_key(rank: int) -> str:
    """Rewritten after every commit, so that a watcher need not poll; a hint, never the truth."""
    return f"bell/{rank_name(rank)}"


def numbers(names: list[str], pattern: str) -> list[int]:
    """Numbers in those names that match a pattern with one group, ascending."""
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))
