"""Frames: one segment of 64 for each writer incarnation, the commit record written last.

A frame exists once its commit record does. The record is created by conditional create after the arrays are whole, so
whatever process is killed at whatever moment, a reader finds a whole frame or none.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from entropy_monitor.errors import CorruptFrameError, FrameGoneError, SegmentTakenError, StoreError
from entropy_monitor.store import layout
from entropy_monitor.store.arrays import Array, create_group, create_group_path, read_group_attributes
from entropy_monitor.types import NUM_JACKKNIFE_GROUPS, PHASES, AlignmentParts, Frame, LayerGroup

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from entropy_monitor.store.objects import Objects

_STORED_TYPES = {"bfloat16": "u2", "float16": "f2", "float32": "f4"}  # zarr-python does not know bfloat16
FRAME_SCALARS = ("loss", "lr", "grad_norm", "weight")
_MAX_EXACT_INTEGER = 1 << 53  # of a float64


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


@dataclass(slots=True)
class _Segment:
    number: int
    layout: FrameLayout
    arrays: list[Array] = field(default_factory=list[Array])
    tokens: Array | None = None
    alignment: Array | None = None
    alignment_info: Array | None = None
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


def _decode_commit(value: bytes) -> dict[str, float] | None:
    """Read a commit record.

    Returns:
        Its columns, or None where it cannot be what `_encode_commit` wrote.
    """
    if len(value) != 8 * len(layout.COMMIT_COLUMNS):
        return None
    columns: tuple[str, ...] = layout.COMMIT_COLUMNS
    record: dict[str, float] = dict(zip(columns, np.frombuffer(value, "<f8").tolist(), strict=True))
    whole = ("seq", "attempt", "step", "phase", "num_patches", "num_tokens_seen")
    if not all(record[name].is_integer() and 0 <= record[name] < _MAX_EXACT_INTEGER for name in whole):
        return None
    # A record of zeros, which a power cut may leave, is the attempt 0 that does not exist.
    return record if record["attempt"] >= 1 and record["phase"] < len(PHASES) else None


@dataclass(frozen=True, slots=True)
class _OpenSegment:
    """A segment's arrays, opened for reading."""

    number: int
    groups: tuple[tuple[Array, tuple[str, ...], str], ...]
    """Array, layers and logical dtype of each group."""
    tokens: Array | None
    alignment: tuple[tuple[str, ...], Array, Array] | None
    """Layers, parts and info."""


class FrameReader:
    """Reads one rank's frames by `seq`; caches the open segment."""

    def __init__(self, objects: Objects, run_id: str, rank: int) -> None:
        self._objects, self._run_id, self.rank = objects, run_id, rank
        self._open: _OpenSegment | None = None

    def read(self, seq: int, *, arrays: bool = True) -> Frame | None:
        """Read one frame.

        Args:
            seq: its number.
            arrays: False reads the commit record alone.

        Returns:
            The frame, or None when it is not committed (yet, or any more).

        Raises:
            FrameGoneError: retention removed it while it was being read.
            CorruptFrameError: it is committed, but its data are missing or fail their checksum.
        """
        frame = self.read_commit(seq)
        if frame is None or not arrays:
            return frame
        try:
            groups, tokens, alignment = self._read_arrays(seq)
        except CorruptFrameError as error:
            if self._objects.get(layout.commit_key(self.rank, seq)) is None:
                raise FrameGoneError(f"frame {seq} of rank {self.rank} was removed by retention while read") from error
            raise
        # The record is removed before the data: if it is still there, what was read was whole.
        if self._objects.get(layout.commit_key(self.rank, seq)) is None:
            raise FrameGoneError(f"frame {seq} of rank {self.rank} was removed by retention while read")
        return _with_arrays(frame, groups, tokens, alignment)

    def is_committed(self, seq: int) -> bool:
        """Whether there is a commit record.

        Returns:
            True or False, at the moment of the call.
        """
        return self._objects.exists(layout.commit_key(self.rank, seq))

    def read_commit(self, seq: int) -> Frame | None:
        """Read a frame's commit record.

        Returns:
            The frame without arrays, or None when it is not committed.

        Raises:
            CorruptFrameError: the record is damaged.
        """
        value = self._objects.get(layout.commit_key(self.rank, seq))
        if value is None:
            return None
        record = _decode_commit(value)
        if record is None or record["seq"] != seq:
            raise CorruptFrameError(
                f"expected a commit record of {8 * len(layout.COMMIT_COLUMNS)} bytes that says seq {seq}; found "
                f"{len(value)} bytes at {layout.commit_key(self.rank, seq)}: the frame counts as undetermined"
            )
        return Frame(
            run_id=self._run_id,
            attempt=int(record["attempt"]),
            rank=self.rank,
            seq=seq,
            step=int(record["step"]),
            phase=PHASES[int(record["phase"])],
            wall_time_s=record["wall_time_s"],
            num_patches=int(record["num_patches"]),
            num_tokens_seen=int(record["num_tokens_seen"]),
            scalars={name: record[name] for name in FRAME_SCALARS},
        )

    def _read_arrays(self, seq: int) -> tuple[tuple[LayerGroup, ...], NDArray[np.int32] | None, AlignmentParts | None]:
        number, slot = divmod(seq, layout.SEGMENT_FRAMES)
        if self._open is None or self._open.number != number:
            self._open = self._open_segment(number)
        groups = tuple(_decode(array.read(slot), layers, dtype) for array, layers, dtype in self._open.groups)
        tokens = None if self._open.tokens is None else self._open.tokens.read(slot)
        if self._open.alignment is None:
            return groups, tokens, None
        layers, parts, info = self._open.alignment
        return groups, tokens, AlignmentParts(layers, parts.read(slot), info.read(slot))

    def _open_segment(self, number: int) -> _OpenSegment:
        key = layout.frames_key(self.rank, number)
        attributes = read_group_attributes(self._objects, key)
        if attributes is None:
            raise CorruptFrameError(f"expected a readable zarr.json at {self._objects.url}/{key}; found none")

        def open_array(name: str) -> Array:
            return Array.open(self._objects, f"{key}/{name}")

        try:
            groups = [
                (open_array(f"g{index}"), tuple(layers), dtype)
                for index, (layers, dtype) in enumerate(
                    zip(attributes["layers"], attributes["logical_dtype"], strict=True)
                )
            ]
            aligned = tuple(attributes["alignment_layers"])
            return _OpenSegment(
                number,
                tuple(groups),
                open_array("tokens") if attributes["token_window"] else None,
                (aligned, open_array("alignment"), open_array("alignment_info")) if aligned else None,
            )
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise CorruptFrameError(f"expected readable arrays at {self._objects.url}/{key}; {error}") from error

    def seqs(self) -> Iterator[int]:
        """Every committed frame, oldest first.

        Yields:
            The `seq` of each.
        """
        for segment in list_segments(self._objects, self.rank):
            yield from list_commits(self._objects, self.rank, segment)


def _decode(block: NDArray[Any], layers: tuple[str, ...], dtype: str) -> LayerGroup:
    if dtype == "bfloat16":  # its bits are the upper half of a float32's
        block = (block.astype(np.uint32) << 16).view(np.float32)
    else:
        block = block.astype(np.float32, copy=False)
    return LayerGroup(layers, block[0], block[1] if len(block) > 1 else None)


def _with_arrays(
    frame: Frame,
    groups: tuple[LayerGroup, ...],
    tokens: NDArray[np.int32] | None,
    alignment: AlignmentParts | None,
) -> Frame:
    return replace(frame, groups=groups, token_windows=tokens, alignment=alignment)
