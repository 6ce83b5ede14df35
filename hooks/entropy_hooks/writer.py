"""The background writer: the only thread that writes frames and scalars.

It takes jobs from a queue that the ring bounds, so training never waits for the disk: what cannot be written is counted
and dropped.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entropy_monitor.errors import RunNotFoundError, SegmentTakenError
from entropy_monitor.store import FrameWriter, Retention, ScalarsWriter, was_deleted

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from entropy_hooks.faults import Faults
    from entropy_hooks.host import HostCopy, Ring, Slot
    from entropy_monitor.store import FrameData, FrameLayout, Objects


@dataclass(slots=True)
class FrameJob:
    """One frame on its way to the store."""

    layout: FrameLayout
    slot: Slot
    copy: HostCopy
    build: Callable[[], FrameData]
    """Makes the frame from the slot's buffers, once the copy is finished."""


@dataclass(slots=True)
class ScalarsJob:
    """Scalars of consecutive optimizer steps."""

    rows: list[dict[str, float]]
    figures: torch.Tensor
    """Shape ``[2 * len(rows)]``: loss and gradient norm of each row, valid once `copy` is finished."""
    copy: HostCopy


class Writer:
    """Owns the writer thread and what it counts."""

    def __init__(self, objects: Objects, rank: int, attempt: int, keep: int, ring: Ring, faults: Faults) -> None:
        self._objects, self._rank, self._attempt, self._keep = objects, rank, attempt, keep
        self._ring, self._faults = ring, faults
        self._queue: queue.SimpleQueue[FrameJob | ScalarsJob | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._pending = 0
        """Jobs submitted and not yet done with."""
        self._pending_frames = 0
        self._superseded = False
        self._frames: FrameWriter | None = None
        self._scalars: ScalarsWriter | None = None
        self._retention: Retention | None = None
        self._thread = threading.Thread(target=self._work, name="entropy-writer", daemon=True)
        self.committed = 0
        """Frames committed in this attempt."""
        self.dropped = 0
        """Frames of this attempt that will never be committed."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def removed_unmeasured(self) -> int:
        """Frames that retention removed before any watcher had measured them."""
        return self._retention.removed_unmeasured if self._retention is not None else 0

    def submit(self, job: FrameJob | ScalarsJob) -> None:
        """Hand over a job; never blocks and never raises."""
        if not self.alive:
            self._faults.count("writer_dead", "the writer thread has died: nothing is recorded any more")
            self._give_up(job)
            return
        with self._idle:
            self._pending += 1
            self._pending_frames += isinstance(job, FrameJob)
        self._queue.put(job)

    def drop(self) -> None:
        """Count a frame that could not even be handed over."""
        with self._idle:
            self.dropped += 1

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything submitted is in the store.

        Returns:
            False when the time ran out or the thread has died.
        """
        deadline = time.monotonic() + timeout_s
        with self._idle:
            while self._pending and self.alive and time.monotonic() < deadline:
                self._idle.wait(0.05)
            return not self._pending

    def stop(self, timeout_s: float) -> None:
        """Write what is queued and end the thread; what is left after the time counts as dropped."""
        if not self.flush(timeout_s):
            if self.alive:
                self._faults.count(
                    "flush_timeout", f"{self._pending} records were not written within {timeout_s:.0f} s"
                )
            with contextlib.suppress(queue.Empty):  # what counts as dropped must not be written behind the goodbye
                while True:
                    self._queue.get_nowait()
            with self._idle:
                self.dropped += self._pending_frames
        self._queue.put(None)
        if self.alive:
            self._thread.join(1.0)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job.copy.finish()
                if was_deleted(self._objects):
                    raise RunNotFoundError(f"{self._objects.url} was deleted: nothing is recorded until it is back")
                if isinstance(job, ScalarsJob):
                    self._write_scalars(job)
                else:
                    self._write_frame(job)
            except RunNotFoundError as error:
                self._faults.count("run_removed", error)
                self._give_up(job)
            except SegmentTakenError as error:
                self._superseded = True
                self._faults.count("superseded", error)
                self._give_up(job)
            except Exception as error:  # disk full, read-only, ...: counted, and the next frame is tried afresh
                self._faults.count("write_failed", error)
                self._give_up(job)
            except BaseException as error:  # nothing that a thread can be told to do may end the training job
                self._faults.count("writer_dead", error)
                self._give_up(job)
                return
            else:
                if isinstance(job, FrameJob):
                    self._ring.release(job.slot)
            finally:
                with self._idle:
                    self._pending -= 1
                    self._pending_frames -= isinstance(job, FrameJob)
                    self._idle.notify_all()
                del job  # not kept until the next one comes: it knows weights of the model

    def _write_scalars(self, job: ScalarsJob) -> None:
        if self._scalars is None:
            self._scalars = ScalarsWriter(self._objects, self._rank, self._attempt)
        for row, (loss, grad_norm) in zip(job.rows, job.figures.view(-1, 2).tolist(), strict=True):
            self._scalars.append({**row, "loss": loss, "grad_norm": grad_norm})
        self._scalars.flush()

    def _write_frame(self, job: FrameJob) -> None:
        if self._superseded:
            raise SegmentTakenError("a newer trainer writes this run")
        if self._frames is None:
            self._frames = FrameWriter(self._objects, self._rank, self._attempt)
        seq = self._frames.write(job.layout, job.build())
        self.committed += 1
        try:
            if self._retention is None:
                self._retention = Retention(self._objects, self._rank, self._keep)
            unmeasured = self._retention.removed_unmeasured
            self._retention.committed(seq)
        except Exception as error:  # the frame is safe; the ring is applied again at the next commit
            self._faults.count("retention_failed", error)
        else:
            if self._retention.removed_unmeasured > unmeasured:
                self._faults.count(
                    "frames_removed_unmeasured",
                    "the ring is full of frames that no watcher has measured: start `entropy-monitor watch`",
                    self._retention.removed_unmeasured - unmeasured,
                )

    def _give_up(self, job: FrameJob | ScalarsJob) -> None:
        if isinstance(job, FrameJob):
            self.drop()
            self._ring.release(job.slot)
