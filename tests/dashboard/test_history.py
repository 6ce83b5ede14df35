"""Corrections, attempts and changed layers: what is shown, however the rows came."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from entropy_dashboard.history import LayerHistory, ScalarHistory, Series, StepOrder, select_rows
from entropy_monitor.store import MetricsBlock, MetricsLayout
from entropy_monitor.store.layout import SCALAR_COLUMNS

ROWS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 60)), min_size=1, max_size=60)


def slow_selection(rows: list[tuple[int, int]]) -> list[int]:
    """Each step once: of one attempt the last row, and none that a newer attempt has passed over."""
    last = {row: index for index, row in enumerate(rows)}
    spans = {a: (min(s for b, s in rows if a == b), max(s for b, s in rows if a == b)) for a, _ in rows}
    shown = {
        step: index
        for (attempt, step), index in last.items()
        if not any(newer > attempt and low <= step <= high for newer, (low, high) in spans.items())
    }
    return [shown[step] for step in sorted(shown)]


def split(rows: list, sizes: list[int]) -> list[list]:
    parts, start = [], 0
    for size in [*sizes, len(rows)]:
        if rows[start : start + size]:
            parts.append(rows[start : start + size])
        start += size
    return parts


@settings(deadline=None, max_examples=300)
@given(rows=ROWS)
def test_selection_equals_its_slow_twin(rows):
    attempts, steps = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    assert select_rows(attempts, steps).tolist() == slow_selection(rows)


@settings(deadline=None, max_examples=200)
@given(rows=ROWS, sizes=st.lists(st.integers(1, 8), max_size=30), most=st.integers(1, 40))
@example(rows=[(1, 1), (2, 0), (2, 2)], sizes=[2], most=1)  # an attempt grows past a row of an older one
def test_portions_do_not_matter(rows, sizes, most):
    """Appended in any portions, with corrections and new attempts, history equals one made at once."""
    order = StepOrder()
    series = Series(order, 2)
    values = np.random.default_rng(0).standard_normal((len(rows), 2)).astype(np.float32)
    values[::7, 1] = np.nan
    for part in split(list(range(len(rows))), sizes):
        series.append(values[part])
        attempts, steps = (np.array([rows[i][k] for i in part], np.int64) for k in (0, 1))
        changed = order.append(attempts, steps)
        if changed is not None:
            series.changed(changed)
        series.query(0, 100, most)  # asked in between, as a page does
    assert order.rows.tolist() == slow_selection(rows)
    fresh_order = StepOrder()
    fresh = Series(fresh_order, 2)
    fresh.append(values)
    fresh_order.append(*(np.array([row[k] for row in rows], np.int64) for k in (0, 1)))
    fresh.changed(0)
    fresh_order.stride = order.stride
    a, b = series.query(0, 100, most), fresh.query(0, 100, most)
    for name in ("number", "rows", "count", "mean", "low", "high"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def block(layers: tuple[str, ...], rows: list[tuple[int, int, float]]) -> MetricsBlock:
    layout = MetricsLayout(layers=layers, metrics=("mbe", "mbe_se"), scalars=("attempt", "step", "ce"), num_ranks=1)
    values = np.array([[[value, 0.1]] * len(layers) for _, _, value in rows], np.float32)
    scalars = np.array([[attempt, step, 10 * value] for attempt, step, value in rows], np.float64)
    return MetricsBlock(layout=layout, values=values, scalars=scalars, source=np.zeros((len(rows), 1), np.int64))


def history(*blocks: MetricsBlock) -> LayerHistory:
    made = LayerHistory(("mbe", "mbe_se", "absent"), ("ce",))
    for one in blocks:
        made.append(one)
    return made


def test_a_correction_replaces_its_row():
    made = history(block(("a",), [(1, 0, 1.0), (1, 10, 2.0), (1, 20, 3.0)]), block(("a",), [(1, 10, 9.0)]))
    assert made.order.steps.tolist() == [0, 10, 20]
    assert made.metric("mbe").shown()[:, 0].tolist() == [1.0, 9.0, 3.0]
    assert made.scalar("ce").tolist() == [10.0, 90.0, 30.0]


def test_a_resumed_job_draws_one_curve():
    """The newer attempt samples other steps than the older one; nothing zigzags between them."""
    first = block(("a",), [(1, step, 1.0) for step in range(0, 100, 10)])
    second = block(("a",), [(2, step, 2.0) for step in range(45, 75, 15)])
    made = history(first, second)
    assert made.order.steps.tolist() == [0, 10, 20, 30, 40, 45, 60, 70, 80, 90]
    assert made.metric("mbe").shown()[:, 0].tolist() == [1, 1, 1, 1, 1, 2, 2, 1, 1, 1]


def test_a_late_correction_of_an_old_attempt_changes_nothing_that_is_shown():
    made = history(block(("a",), [(1, 0, 1.0), (1, 10, 1.0)]), block(("a",), [(2, 0, 2.0), (2, 10, 2.0)]))
    assert made.append(block(("a",), [(1, 10, 7.0)])) is None
    assert made.metric("mbe").shown()[:, 0].tolist() == [2.0, 2.0]


def test_changed_layers_keep_their_history_under_their_names():
    made = history(block(("a", "b"), [(1, 0, 1.0)]), block(("b", "c"), [(1, 10, 2.0)]))
    assert made.layers == ("b", "c", "a")
    np.testing.assert_array_equal(made.metric("mbe").shown(), [[1, np.nan, 1], [2, 2, np.nan]])
    assert made.metric("mbe").query(0, 20, 10).count.sum() == 4


def test_a_metric_that_was_never_measured_is_undetermined():
    made = history(block(("a",), [(1, 0, 1.0)]))
    assert np.isnan(made.metric("absent").shown()).all()
    assert np.isnan(made.metric("absent").query(0, 10, 10).mean).all()


def test_scalars_keep_the_clock_s_digits():
    made = ScalarHistory(("loss", "wall_time_s"), SCALAR_COLUMNS)
    rows = np.full((2, len(SCALAR_COLUMNS)), np.nan)
    rows[:, SCALAR_COLUMNS.index("step")] = [0, 1]
    rows[:, SCALAR_COLUMNS.index("wall_time_s")] = [1.7e9, 1.7e9 + 0.25]
    made.append(1, rows)
    assert np.diff(made.values.shown()[:, 1]).tolist() == [0.25]
