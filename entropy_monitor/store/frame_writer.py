"""Writes frames: one segment of 64 for each writer incarnation, the commit record last.

The record is created by conditional create after the arrays are whole, so whatever process is killed at whatever
moment, a reader finds a whole frame or none.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from entropy_monitor.errors import SegmentTakenError, StoreError
from entropy_monitor.store import layout
from entropy_monitor.store.arrays import Array, create_group, create_group_path, read_group_attributes
from entropy_monitor.store.frames import (
    FrameData,
    FrameLayout,
    next_segment,
)
from entropy_monitor.types import NUM_JACKKNIFE_GROUPS, PHASES

if TYPE_CHECKING:
    from entropy_monitor.store.objects import Objects

_STORED_TYPES = {"bfloat16": "u2", "float16": "f2", "float32": "f4"}  # zarr-python does not know bfloat16


@dataclass(slots=True)
class _Segment:
    number: int
    layout: FrameLayout
    arrays: list[Array] = field(default_factory=list[Array])
    tokens: Array | None = None
    alignment: Array | None = None
    alignment_info: Array | None = None
    exact_alignment: Array | None = None
    next_slot: int = 0


class FrameWriter:
    """Writes one rank's frames; owned by one thread."""

    def __init__(self, objects: Objects, rank: int, attempt: int) -> None:
        self._objects, self.rank, self.attempt = objects, rank, attempt
        self._uuid = uuid.uuid4().hex
        self._segment: _Segment | None = None
        self.claimed: list[int] = []
        """Segments this incarnation has claimed, oldest first."""

    def write(self, frame_layout: FrameLayout, frame: FrameData) -> int:
        """Write and commit one frame, then ring the bell.

        Args:
            frame_layout: its shape.
            frame: its contents.

        Returns:
            The frame's `seq`.

        Raises:
            SegmentTakenError: a newer writer of this rank exists; this one must stop.
            StoreError: the store cannot be written. Nothing of the frame is visible to readers.
        """
        segment = self._segment
        if segment is None or segment.layout != frame_layout or segment.next_slot == layout.SEGMENT_FRAMES:
            segment = self._segment = self._claim(frame_layout)
        slot = segment.next_slot
        segment.next_slot += 1  # a slot whose write failed is left as a gap, never written twice
        self._write_arrays(segment, slot, frame)
        self._refuse_zombie(segment.number)
        seq = layout.SEGMENT_FRAMES * segment.number + slot
        if not self._objects.create(layout.commit_key(self.rank, seq), _encode_commit(seq, frame)):
            raise SegmentTakenError(f"expected frame {seq} of rank {self.rank} to be new; another writer committed it")
        with contextlib.suppress(StoreError):  # the frame is committed, and whoever misses the bell polls
            self._objects.put(layout.bell_key(self.rank), str(seq).encode())
        return seq

    def _write_arrays(self, segment: _Segment, slot: int, frame: FrameData) -> None:
        pending = [
            (array, array.write((slot,), block[None]))
            for array, block in zip(segment.arrays, frame.groups, strict=True)
        ]
        optional = (
            (segment.tokens, frame.tokens),
            (segment.alignment, frame.alignment),
            (segment.alignment_info, frame.alignment_info),
            (segment.exact_alignment, frame.exact_alignment),
        )
        pending += [
            (array, array.write((slot,), block[None]))
            for array, block in optional
            if array is not None and block is not None
        ]
        for array, future in pending:
            array.wait(future)

    def _refuse_zombie(self, number: int) -> None:
        """A writer that was stopped while another took over must not commit behind the reader's back.

        The other one claims a newer segment, and its retention may remove this one, the newer one too.

        Raises:
            SegmentTakenError: it is such a writer.
        """
        newer = f"{layout.frames_key(self.rank, number + 1)}"
        if self._objects.exists(f"{newer}/zarr.json"):
            owner = (read_group_attributes(self._objects, newer) or {}).get("writer_uuid")
            is_superseded = owner != self._uuid  # our own, where a failed write kept us from using it
        else:
            is_superseded = not self._objects.exists(f"{layout.frames_key(self.rank, number)}/zarr.json")
        if is_superseded:
            raise SegmentTakenError(
                f"expected segment {number} to be rank {self.rank}'s newest; a newer trainer writes this run: "
                "stop one of the two, or give this one another run"
            )

    def _claim(self, frame_layout: FrameLayout) -> _Segment:
        create_group_path(self._objects, layout.frames_key(self.rank))
        if self.claimed:
            self._refuse_zombie(self.claimed[-1])
        self._segment = None  # whatever fails from here on, the older segment is not written again
        number = next_segment(self._objects, self.rank)
        attributes = self._attributes(number, frame_layout)
        while not create_group(self._objects, layout.frames_key(self.rank, number), attributes):
            number += 1
            attributes = self._attributes(number, frame_layout)
        self.claimed.append(number)
        return self._create_arrays(number, frame_layout)

    def _attributes(self, number: int, frame_layout: FrameLayout) -> dict[str, Any]:
        return {
            "first_seq": layout.SEGMENT_FRAMES * number,
            "attempt": self.attempt,
            "rank": self.rank,
            "writer_uuid": self._uuid,
            "layers": [list(group.layers) for group in frame_layout.groups],
            "logical_dtype": [group.dtype for group in frame_layout.groups],
            "alignment_layers": list(frame_layout.alignment_layers),
            "exact_layers": list(frame_layout.exact_layers),
            "kinds": ["activation", "gradient"][: 1 + frame_layout.gradients],
            "columns": list(layout.COMMIT_COLUMNS),
            "token_window": frame_layout.token_window,
        }

    def _create_arrays(self, number: int, frame_layout: FrameLayout) -> _Segment:
        key, frames = layout.frames_key(self.rank, number), layout.SEGMENT_FRAMES
        segment = _Segment(number, frame_layout)
        kinds = 1 + frame_layout.gradients
        for index, group in enumerate(frame_layout.groups):
            shape = (kinds, len(group.layers), group.num_tokens, group.num_features)
            segment.arrays.append(
                Array.create(
                    self._objects,
                    f"{key}/g{index}",
                    shape=(frames, *shape),
                    chunk=(1, *shape),
                    inner_chunk=(1, 1, 1, *shape[2:]),
                    dtype=_STORED_TYPES[group.dtype],
                    dimensions=["frame", *(f"{name}_{index}" for name in ("kind", "layer", "token", "feature"))],
                    attributes={"layers": list(group.layers), "logical_dtype": group.dtype},
                )
            )
        if frame_layout.token_window:
            shape = (frame_layout.groups[0].num_tokens, frame_layout.token_window)
            segment.tokens = self._side_array(f"{key}/tokens", shape, ("token_0", "window"), "i4", -1)
        if frame_layout.alignment_layers:
            layers, missing = len(frame_layout.alignment_layers), float("nan")
            shape = (layers, NUM_JACKKNIFE_GROUPS, 3)
            segment.alignment = self._side_array(
                f"{key}/alignment", shape, ("alignment_layer", "jackknife_group", "part"), "f4", missing
            )
            segment.alignment_info = self._side_array(
                f"{key}/alignment_info", (layers, 4), ("alignment_layer", "info"), "f4", missing
            )
        if frame_layout.exact_layers:
            shape = (len(frame_layout.exact_layers), 2)
            segment.exact_alignment = self._side_array(
                f"{key}/exact_alignment", shape, ("exact_layer", "exact_part"), "f4", float("nan")
            )
        # The commit record carries no checksum: it is created whole by one atomic operation that zarr writers lack.
        Array.create(
            self._objects,
            f"{key}/commit",
            shape=(frames, len(layout.COMMIT_COLUMNS)),
            chunk=(1, len(layout.COMMIT_COLUMNS)),
            dtype="f8",
            dimensions=("frame", "column"),
            fill=float("nan"),
            checksum=False,
            attributes={"columns": list(layout.COMMIT_COLUMNS), "phase_flag_meanings": list(PHASES)},
        )
        return segment

    def _side_array(
        self, key: str, shape: tuple[int, ...], dimensions: tuple[str, ...], dtype: str, fill: float
    ) -> Array:
        return Array.create(
            self._objects,
            key,
            shape=(layout.SEGMENT_FRAMES, *shape),
            chunk=(1, *shape),
            dtype=dtype,
            dimensions=("frame", *dimensions),
            fill=fill,
        )


def _encode_commit(seq: int, frame: FrameData) -> bytes:
    record = {
        "seq": seq,
        "attempt": frame.attempt,
        "step": frame.step,
        "phase": PHASES.index(frame.phase),  # type: ignore[arg-type]
        "wall_time_s": frame.wall_time_s,
        "num_patches": frame.num_patches,
        "num_tokens_seen": frame.num_tokens_seen,
        **frame.scalars,
    }
    return np.array([record.get(name, np.nan) for name in layout.COMMIT_COLUMNS], dtype="<f8").tobytes()
