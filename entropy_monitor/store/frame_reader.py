"""Reads frames: the commit record, the data, and the commit record again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from entropy_monitor.errors import CorruptFrameError, FrameGoneError
from entropy_monitor.store import layout
from entropy_monitor.store.arrays import Array, read_group_attributes
from entropy_monitor.store.frames import (
    FRAME_SCALARS,
    list_commits,
    list_segments,
)
from entropy_monitor.types import PHASES, AlignmentParts, ExactAlignment, Frame, LayerGroup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from entropy_monitor.store.objects import Objects

_MAX_EXACT_INTEGER = 1 << 53  # of a float64


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
    exact: tuple[tuple[str, ...], Array] | None
    """Layers and cosines."""


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
            whole = self._read_arrays(frame)
        except CorruptFrameError as error:
            if self._objects.get(layout.commit_key(self.rank, seq)) is None:
                raise FrameGoneError(f"frame {seq} of rank {self.rank} was removed by retention while read") from error
            raise
        # The record is removed before the data: if it is still there, what was read was whole.
        if self._objects.get(layout.commit_key(self.rank, seq)) is None:
            raise FrameGoneError(f"frame {seq} of rank {self.rank} was removed by retention while read")
        return whole

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

    def _read_arrays(self, frame: Frame) -> Frame:
        number, slot = divmod(frame.seq, layout.SEGMENT_FRAMES)
        if self._open is None or self._open.number != number:
            self._open = self._open_segment(number)
        found = replace(
            frame,
            groups=tuple(_decode(array.read(slot), layers, dtype) for array, layers, dtype in self._open.groups),
            token_windows=None if self._open.tokens is None else self._open.tokens.read(slot),
        )
        if self._open.alignment is not None:
            layers, parts, info = self._open.alignment
            found = replace(found, alignment=AlignmentParts(layers, parts.read(slot), info.read(slot)))
        if self._open.exact is not None:
            layers, cosines = self._open.exact
            found = replace(found, exact_alignment=ExactAlignment(layers, cosines.read(slot)))
        return found

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
            exact = tuple(attributes.get("exact_layers", ()))  # segments of earlier versions have none
            return _OpenSegment(
                number,
                tuple(groups),
                open_array("tokens") if attributes["token_window"] else None,
                (aligned, open_array("alignment"), open_array("alignment_info")) if aligned else None,
                (exact, open_array("exact_alignment")) if exact else None,
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
