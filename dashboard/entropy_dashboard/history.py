"""Rows as a person wants to see them: each step once, corrections applied, the newest attempt first.

The store has rows in commit order. Several rows of one (attempt, step) are corrections: the last counts. Where a newer
attempt has passed over steps, older attempts' rows there are hidden, so that a resumed job draws one curve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entropy_dashboard.pyramid import Buckets, Pyramid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from entropy_monitor.store import MetricsBlock


def select_rows(attempts_T: NDArray[np.int64], steps_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows to show.

    Args:
        attempts_T: attempt of each row, in commit order.
        steps_T: its step.

    Returns:
        Indices of the rows, by ascending step.
    """
    rows = np.arange(len(steps_T))
    order = np.lexsort((rows, steps_T, attempts_T))
    ends = np.append((np.diff(steps_T[order]) != 0) | (np.diff(attempts_T[order]) != 0), True)[: len(order)]
    order = order[ends]
    shown: list[NDArray[np.int64]] = []
    covered: list[tuple[int, int]] = []  # disjoint spans of steps that newer attempts have passed
    for attempt in np.unique(attempts_T)[::-1]:
        own = order[attempts_T[order] == attempt]
        steps = steps_T[own]
        hidden = np.zeros(len(own), bool)
        for low, high in covered:
            hidden[np.searchsorted(steps, low) : np.searchsorted(steps, high, side="right")] = True
        shown.append(own[~hidden])
        covered = _add_span(covered, int(steps[0]), int(steps[-1]))
    selected = np.concatenate(shown) if shown else rows
    return selected[np.argsort(steps_T[selected], kind="stable")]


def _add_span(spans: list[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    apart = [span for span in spans if span[1] < low or span[0] > high]
    joined = [span for span in spans if span not in apart]
    return [*apart, (min([low, *(s[0] for s in joined)]), max([high, *(s[1] for s in joined)]))]


class StepOrder:
    """Which rows are shown, kept up to date as rows come."""

    def __init__(self) -> None:
        self._attempts = np.empty(0, np.int64)
        self._commit_steps = np.empty(0, np.int64)
        self.rows = np.empty(0, np.int64)
        """Shape ``(T,)``: the shown rows' numbers in commit order."""
        self.steps = np.empty(0, np.int64)
        """Shape ``(T,)``: their steps, strictly ascending."""
        self.stride = 1
        """Usual distance of two rows, steps."""
        self.wide_stride = 1
        """Distance of two rows that nine of ten pairs keep."""
        self._judged_at = 0

    def append(self, attempts_N: NDArray[np.int64], steps_N: NDArray[np.int64]) -> int | None:
        """Take rows in commit order.

        Args:
            attempts_N: their attempts.
            steps_N: their steps.

        Returns:
            The first step at which what is shown has changed; None when nothing has.
        """
        if len(steps_N) == 0:
            return None
        newest = int(self._attempts.max()) if len(self._attempts) else 0
        start = len(self._attempts)
        self._attempts = np.concatenate([self._attempts, attempts_N])
        self._commit_steps = np.concatenate([self._commit_steps, steps_N])
        ascending = np.diff(steps_N, prepend=self.steps[-1] if len(self.steps) else -1)
        # An attempt that grows past rows of an older one hides them: then all is selected anew.
        hides = len(self.rows) > 0 and attempts_N[0] == newest and self._attempts[self.rows[-1]] != newest
        if not hides and (ascending > 0).all() and (attempts_N >= newest).all() and (np.diff(attempts_N) >= 0).all():
            self.rows = np.concatenate([self.rows, np.arange(start, start + len(steps_N))])
            self.steps = np.concatenate([self.steps, steps_N])
            self._judge_stride()
            return int(steps_N[0])
        rows = select_rows(self._attempts, self._commit_steps)
        steps = self._commit_steps[rows]
        shared = min(len(rows), len(self.rows))
        differ = np.flatnonzero(rows[:shared] != self.rows[:shared])
        position = int(differ[0]) if len(differ) else shared
        changed = [int(part[position]) for part in (steps, self.steps) if position < len(part)]
        self.rows, self.steps, self._judged_at = rows, steps, 0
        self._judge_stride()
        return min(changed) if changed else None

    def _judge_stride(self) -> None:
        # Only now and then: it sorts all distances, and a stride that flutters would rebuild the pyramids.
        if len(self.steps) < 2 or len(self.steps) < 1.5 * self._judged_at:
            return
        distances = np.diff(self.steps)
        self.stride = int(np.median(distances))
        self.wide_stride = int(np.quantile(distances, 0.9))
        self._judged_at = len(self.steps)


class Series:
    """Columns over a `StepOrder`, with a pyramid that follows when it is asked."""

    def __init__(self, order: StepOrder, num_columns: int, dtype: type[np.floating] = np.float32) -> None:
        self._order = order
        self._values: NDArray[np.floating] = np.empty((64, num_columns), dtype)
        self._num_rows = 0
        self._pyramid: Pyramid | None = None
        self._changed_from: int | None = None

    def append(self, values_NC: NDArray[np.floating]) -> None:
        """Take rows, in commit order; `changed` follows."""
        size = self._num_rows + len(values_NC)
        if size > len(self._values):
            grown = np.empty((max(size, 2 * len(self._values)), self._values.shape[1]), self._values.dtype)
            grown[: self._num_rows] = self._values[: self._num_rows]
            self._values = grown
        self._values[self._num_rows : size] = values_NC
        self._num_rows = size

    def changed(self, step: int) -> None:
        """What is shown has changed from this step on."""
        self._changed_from = step if self._changed_from is None else min(step, self._changed_from)

    def committed(self) -> NDArray[np.floating]:
        """Every row, in commit order.

        Returns:
            A view, shape ``(T, C)``.
        """
        return self._values[: self._num_rows]

    def shown(self, start: int = 0) -> NDArray[np.floating]:
        """The shown rows from position `start` on, by step.

        Returns:
            A copy, shape ``(T, C)``.
        """
        return self._values[self._order.rows[start:]]

    def query(self, start: int, stop: int, max_buckets: int, min_shift: int = 0) -> Buckets:
        """A window in at most so many buckets; see `Pyramid.query`.

        Returns:
            The buckets.
        """
        shift = max(0, self._order.stride.bit_length() - 1)
        if self._pyramid is None or self._pyramid.base_shift != shift:
            self._pyramid, self._changed_from = Pyramid(self._values.shape[1], shift), 0
        if self._changed_from is not None:
            first = int(np.searchsorted(self._order.steps, self._changed_from >> shift << shift))
            self._pyramid.replace_from(self._changed_from, self._order.steps[first:], self.shown(first))
            self._changed_from = None
        return self._pyramid.query(start, stop, max_buckets, min_shift)


class LayerHistory:
    """Chosen per-layer metrics of every measured step, and the run's scalars beside them."""

    def __init__(self, metrics: Sequence[str], scalars: Sequence[str]) -> None:
        self.order = StepOrder()
        self.layers: tuple[str, ...] = ()
        """Every layer that was ever measured: the newest model's in its order, then those it no longer has."""
        self._names = tuple(metrics)
        self._scalar_names = tuple(scalars)
        self._metrics: dict[str, Series] = {}
        self.scalars = Series(self.order, len(self._scalar_names), np.float64)
        """The columns named at construction."""

    def append(self, block: MetricsBlock) -> int | None:
        """Take a block of rows.

        Args:
            block: rows as the store has them.

        Returns:
            The first step at which what is shown has changed; None when nothing has.
        """
        self._adopt_layers(block.layout.layers)
        columns = np.array([self.layers.index(layer) for layer in block.layout.layers], np.int64)
        for name, series in self._metrics.items():
            table = np.full((len(block.scalars), len(self.layers)), np.nan, np.float32)
            if name in block.layout.metrics:
                table[:, columns] = block.values[:, :, block.layout.metrics.index(name)]
            series.append(table)
        self.scalars.append(np.stack([block.column(name) for name in self._scalar_names], axis=1))
        attempts, steps = (block.column(name).astype(np.int64) for name in ("attempt", "step"))
        changed = self.order.append(attempts, steps)
        if changed is not None:
            for series in (self.scalars, *self._metrics.values()):
                series.changed(changed)
        return changed

    def metric(self, name: str) -> Series:
        """One metric, a column a layer.

        Returns:
            The series; empty before the first row.

        Raises:
            KeyError: this history was not asked to keep it.
        """
        if name not in self._names:
            raise KeyError(f"expected one of {', '.join(self._names)}; found {name}: name it when the history is made")
        return self._metrics[name] if self._metrics else Series(self.order, 0)

    def scalar(self, name: str) -> NDArray[np.floating]:
        """One scalar of every shown row, ``(T,)``.

        Returns:
            The values, by step.
        """
        return self.scalars.shown()[:, self._scalar_names.index(name)]

    def _adopt_layers(self, layers: tuple[str, ...]) -> None:
        known = set(self.layers)
        if self._metrics and known.issuperset(layers):
            return
        before, self.layers = self.layers, tuple(dict.fromkeys((*layers, *self.layers)))
        where = [self.layers.index(layer) for layer in before]
        for name in self._names:
            series = Series(self.order, len(self.layers))
            if name in self._metrics:
                old = self._metrics[name].committed()
                table = np.full((len(old), len(self.layers)), np.nan, np.float32)
                table[:, where] = old
                series.append(table)
            series.changed(0)
            self._metrics[name] = series


class ScalarHistory:
    """Columns of the table that has every optimizer step."""

    def __init__(self, columns: Sequence[str], stored: Sequence[str]) -> None:
        self.order = StepOrder()
        self._where = [stored.index(name) for name in columns]
        self._step = stored.index("step")
        self.values = Series(self.order, len(columns), np.float64)
        """The columns named at construction."""

    def append(self, attempt: int, rows_TS: NDArray[np.float64]) -> int | None:
        """Take rows of one attempt, as the store has them.

        Returns:
            The first step at which what is shown has changed; None when nothing has.
        """
        self.values.append(rows_TS[:, self._where])
        steps = rows_TS[:, self._step].astype(np.int64)
        changed = self.order.append(np.full(len(steps), attempt, np.int64), steps)
        if changed is not None:
            self.values.changed(changed)
        return changed
