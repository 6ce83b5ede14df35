"""Min/max/mean pyramid over steps: any window of a long run as a few hundred rows, in microseconds.

A bucket of level k holds the steps ``[number << k, (number + 1) << k)``. Edges depend on the step alone, never on when
or in which portions rows came, so that unchanged history stays byte-identical and is not sent again.

Shape letters: B buckets, T rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Consecutive buckets of one level; those without any row are absent."""

    shift: int
    """A bucket is ``1 << shift`` steps wide."""
    number: NDArray[np.int64]
    """Shape ``(B,)``; ``number << shift`` is the first step of the bucket."""
    rows: NDArray[np.int64]
    """Shape ``(B,)``: rows in the bucket, determined or not."""
    step: NDArray[np.float64]
    """Shape ``(B,)``: mean step of the rows."""
    count: NDArray[np.int64]
    """Shape ``(B, C)``: determined values behind each figure."""
    mean: NDArray[np.float32]
    """Shape ``(B, C)``; NaN where nothing was determined."""
    low: NDArray[np.float32]
    """Shape ``(B, C)``: smallest determined value."""
    high: NDArray[np.float32]
    """Shape ``(B, C)``: largest determined value."""

    def __len__(self) -> int:
        return len(self.number)


_ARRAYS = tuple(field.name for field in fields(Buckets) if field.name != "shift")


def bucket_rows(shift: int, steps_T: NDArray[np.int64], values_TC: NDArray[np.floating]) -> Buckets:
    """Buckets of single rows.

    Args:
        shift: logarithm of the buckets' width.
        steps_T: ascending steps.
        values_TC: their values; what is not finite counts as undetermined.

    Returns:
        The buckets.
    """
    values = np.where(np.isfinite(values_TC), values_TC, np.nan).astype(np.float32)
    rows = Buckets(
        shift=shift,
        number=steps_T >> shift,
        rows=np.ones(len(steps_T), np.int64),
        step=steps_T.astype(np.float64),
        count=np.isfinite(values).astype(np.int64),
        mean=values,
        low=values,
        high=values,
    )
    return _merge_equal(rows)


def coarser(buckets: Buckets) -> Buckets:
    """The same history in buckets of twice the width.

    Returns:
        The buckets of the next level.
    """
    arrays: dict[str, Any] = {name: getattr(buckets, name) for name in _ARRAYS if name != "number"}
    return _merge_equal(Buckets(shift=buckets.shift + 1, number=buckets.number >> 1, **arrays))


def _merge_equal(buckets: Buckets) -> Buckets:
    if len(buckets) == 0:
        return buckets
    first = np.flatnonzero(np.diff(buckets.number, prepend=buckets.number[0] - 1) != 0)
    rows = np.add.reduceat(buckets.rows, first)
    count = np.add.reduceat(buckets.count, first, axis=0)
    totals = np.where(buckets.count > 0, buckets.mean.astype(np.float64) * buckets.count, 0.0)
    sums = np.add.reduceat(totals, first, axis=0)
    mean = np.divide(sums, count, out=np.full(sums.shape, np.nan), where=count > 0)
    return Buckets(
        shift=buckets.shift,
        number=buckets.number[first],
        rows=rows,
        step=np.add.reduceat(buckets.step * buckets.rows, first) / rows,
        count=count,
        mean=mean.astype(np.float32),
        # fmin and fmax leave NaN out: one undetermined row does not hide its neighbours.
        low=np.fmin.reduceat(buckets.low, first, axis=0),
        high=np.fmax.reduceat(buckets.high, first, axis=0),
    )


class _Level:
    """A growing table of buckets of one width."""

    def __init__(self, like: Buckets) -> None:
        self.shift = like.shift
        self.size = 0
        self._arrays: dict[str, NDArray[Any]] = {
            name: np.empty((64, *getattr(like, name).shape[1:]), getattr(like, name).dtype) for name in _ARRAYS
        }

    @property
    def number(self) -> NDArray[np.int64]:
        return self._arrays["number"][: self.size]

    def replace_from(self, number: int, tail: Buckets) -> None:
        keep = int(np.searchsorted(self.number, number))
        size = keep + len(tail)
        for name, array in self._arrays.items():
            if size > len(array):
                grown = np.empty((max(size, 2 * len(array)), *array.shape[1:]), array.dtype)
                grown[:keep] = array[:keep]
                self._arrays[name] = array = grown
            array[keep:size] = getattr(tail, name)
        self.size = size

    def part(self, start: int, stop: int) -> Buckets:
        return Buckets(shift=self.shift, **{name: array[start:stop].copy() for name, array in self._arrays.items()})


class Pyramid:
    """Levels of doubling bucket width over columns that share their steps."""

    def __init__(self, num_columns: int, base_shift: int = 0) -> None:
        self.base_shift = base_shift
        """Logarithm of the finest width; about the distance of two rows, since finer levels would repeat them."""
        self._empty = bucket_rows(base_shift, np.empty(0, np.int64), np.empty((0, num_columns), np.float32))
        self._levels = [_Level(self._empty)]

    def replace_from(self, step: int, steps_T: NDArray[np.int64], values_TC: NDArray[np.floating]) -> None:
        """Forget everything from the bucket of `step` on, then take these rows; an append is the common case.

        Args:
            step: first step that may have changed.
            steps_T: ascending steps of all rows from that bucket's first step on.
            values_TC: their values, NaN where undetermined.
        """
        tail, number = bucket_rows(self.base_shift, steps_T, values_TC), step >> self.base_shift
        assert len(tail) == 0 or tail.number[0] >= number
        self._levels[0].replace_from(number, tail)
        depth = 0
        while self._levels[depth].size > 1:
            finer, depth, number = self._levels[depth], depth + 1, number >> 1
            if depth == len(self._levels):
                self._levels.append(_Level(coarser(finer.part(0, 0))))
                number = 0  # a new level needs the whole history
            first = int(np.searchsorted(finer.number, number << 1))
            self._levels[depth].replace_from(number, coarser(finer.part(first, finer.size)))
        del self._levels[depth + 1 :]

    def query(self, start: int, stop: int, max_buckets: int, min_shift: int = 0) -> Buckets:
        """The finest level that shows a window in so many buckets.

        The newest bucket is withheld until half its width has passed: a line's end would jump about, and every new
        row would change what has been sent.

        Args:
            start: first step of the window.
            stop: step behind the window.
            max_buckets: at most so many.
            min_shift: smallest logarithm of the width.

        Returns:
            The buckets that meet the window.
        """
        for level in self._levels:
            first = int(np.searchsorted(level.number, start >> level.shift))
            last = int(np.searchsorted(level.number, -(-stop >> level.shift)))
            if level.shift >= min_shift and last - first <= max_buckets:
                break
        else:
            level = self._levels[-1]
            first, last = 0, level.size
        newest = self._levels[0].number
        if last - first > 1 and last == level.size and level.shift > self.base_shift:
            passed = ((int(newest[-1]) + 1) << self.base_shift) - (int(level.number[-1]) << level.shift)
            last -= passed < 1 << (level.shift - 1)
        return level.part(first, last)
