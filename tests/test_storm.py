"""Promises 3 and 4 under SIGKILL: trainers, watcher or both die 40 times, at moments that nobody chose."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from benchmarks._storm import Storm

if TYPE_CHECKING:
    from pathlib import Path

KILLS = 40


@pytest.mark.slow
@pytest.mark.timeout(270)
def test_nothing_is_lost_torn_or_done_twice_in_a_kill_storm(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"storm of {KILLS} kills, seed {seed}")  # shown when it fails
    report = Storm(tmp_path, seed).run(KILLS)
    print("\n".join(report.lines()))
    assert report.violations == []
    assert (report.corrupt, report.half_read, report.lost) == (0, 0, 0)
    # A storm that destroyed nothing, or in which nothing lived, proves nothing.
    assert sum(report.kills.values()) == KILLS
    assert set(report.kills) == {"trainers", "watcher", "both"}
    assert report.attempts > 3
    assert min(report.reads, report.frames_seen, report.frames_measured) > 300
    assert report.frames_removed > 0
    assert set(report.answers) == {"applied", "expired", "rejected"}
    assert report.unanswered == 0
    assert report.applied > 10
