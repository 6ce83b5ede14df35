"""Who lists commits and reads frames while others are being killed."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from entropy_monitor.errors import CorruptFrameError, FrameGoneError
from entropy_monitor.store import FrameReader, Run, list_commits, list_segments

from .struck import FEATURES, LAYERS, PATCHES, RANKS, activations_of

if TYPE_CHECKING:
    from .report import StormReport


class Observer(threading.Thread):
    """Believes nothing but what it has read."""

    def __init__(self, run: Run, report: StormReport) -> None:
        super().__init__(daemon=True)
        self._run, self._report = run, report
        self._stop_asked = threading.Event()
        self._readers = {rank: FrameReader(run.objects, run.run_id, rank) for rank in RANKS}
        self.commits: dict[int, set[int]] = {rank: set() for rank in RANKS}
        """Every commit ever seen, by rank."""
        self.steps: dict[tuple[int, int], tuple[int, int]] = {}
        """(attempt, step) of every frame read, by (rank, seq)."""
        self.phases: dict[tuple[int, int, int], str] = {}
        """Phase that a frame was trained in, by (rank, attempt, step)."""

    def run(self) -> None:
        """Look again and again; the last look comes after everything has ended."""
        while True:
            last_look = self._stop_asked.is_set()
            for rank in RANKS:
                segments = list_segments(self._run.objects, rank)
                seqs = [seq for segment in segments for seq in list_commits(self._run.objects, rank, segment)]
                for seq in sorted(set(seqs) - self.commits[rank]):
                    self.commits[rank].add(seq)
                    self.check(rank, seq)
            if last_look:
                return
            time.sleep(0.02)

    def finish(self) -> None:
        """Look a last time."""
        self._stop_asked.set()
        self.join()

    def check(self, rank: int, seq: int) -> None:
        """Read one committed frame and compare it with what its step must hold."""
        report = self._report
        try:
            frame = self._readers[rank].read(seq)
        except FrameGoneError:
            return
        except CorruptFrameError as error:
            report.corrupt += 1
            report.violations.append(f"corrupt: {error}")
            return
        if frame is None:
            return  # removed since it was listed
        report.reads += 1
        self.steps[rank, seq] = (frame.attempt, frame.step)
        self.phases[rank, frame.attempt, frame.step] = frame.phase
        activations = frame.activations
        whole = (
            (frame.rank, frame.seq, frame.num_patches) == (rank, seq, PATCHES)
            and frame.scalars["loss"] == frame.step
            and activations.shape == (LAYERS, 8 * PATCHES, FEATURES)
            and np.array_equal(activations, np.broadcast_to(activations_of(frame.step), activations.shape))
        )
        if not whole:
            report.half_read += 1
            report.violations.append(f"rank {rank} seq {seq} says step {frame.step} and holds something else")
