"""A restarted watcher takes up the sliding window where the one before it stood, as far as frames are still there."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING

from entropy_monitor.errors import CorruptFrameError, FrameGoneError
from entropy_monitor.store import FrameReader, list_commits, list_segments
from entropy_monitor.types import PATCH_LENGTH
from entropy_monitor.watcher.pool import check_frames, pool_frames
from entropy_monitor.watcher.soft import assign
from entropy_monitor.watcher.window import MIN_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from entropy_monitor.store import Run
    from entropy_monitor.types import Frame
    from entropy_monitor.watcher.window import InformationWindow

_ENOUGH = MIN_TOKENS * 5 // 4
"""Some tokens are not used, as what follows them is not known."""
logger = logging.getLogger(__name__)


def refill(window: InformationWindow, run: Run, attempt: int, cursor: Mapping[int, int]) -> None:
    """Take in the newest frames of an attempt that have been measured already.

    Args:
        window: an empty one.
        run: the run.
        attempt: the attempt under way.
        cursor: newest measured `seq` of each rank.
    """
    steps: dict[int, list[Frame]] = defaultdict(list)
    for rank, seq in cursor.items():
        for frame in _newest_frames(run, rank, attempt, seq, _ENOUGH // len(cursor)):
            steps[frame.step].append(frame)
    for step in sorted(steps):
        frames = sorted(steps[step], key=lambda frame: frame.rank)
        try:
            check_frames(frames)
            assigned = [assign(pooled) for pooled in pool_frames(frames)]
        except ValueError as error:  # it was undetermined when it was measured, too
            logger.info("step %d is not taken into the window again: %s", step, error)
            continue
        window.add(frames, [assignments for assignments in assigned if assignments is not None])


def _newest_frames(run: Run, rank: int, attempt: int, through: int, num_tokens: int) -> Iterator[Frame]:
    """Read backwards from a `seq`.

    Yields:
        Frames that can be read, newest first, until they hold so many tokens.
    """
    reader = FrameReader(run.objects, run.run_id, rank)
    for segment in reversed(list_segments(run.objects, rank)):
        for seq in reversed(list_commits(run.objects, rank, segment)):
            if seq > through:
                continue
            try:
                frame = reader.read(seq)
            except (FrameGoneError, CorruptFrameError):
                continue
            if frame is None:
                continue
            if frame.attempt != attempt or num_tokens <= 0:
                return
            num_tokens -= PATCH_LENGTH * frame.num_patches
            yield frame
