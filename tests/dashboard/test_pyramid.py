"""The pyramid against a readable slow twin, and its promise that history does not change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_dashboard.pyramid import Buckets, Pyramid

VALUES = st.one_of(st.floats(-100, 100, width=32), st.just(float("nan")))


def slow_twin(rows: dict[int, list[float]], shift: int) -> dict[int, tuple[float, list[tuple[float, float, float]]]]:
    """Bucket number to mean step and (mean, low, high) of each column."""
    buckets: dict[int, tuple[float, list[tuple[float, float, float]]]] = {}
    for number in sorted({step >> shift for step in rows}):
        steps = [step for step in rows if step >> shift == number]
        columns = []
        for column in range(len(rows[steps[0]])):
            known = [v for step in steps if (v := rows[step][column]) == v]
            columns.append((np.mean(known), min(known), max(known)) if known else (np.nan,) * 3)
        buckets[number] = (float(np.mean(steps)), columns)
    return buckets


def assert_same(found: Buckets, wanted: dict[int, tuple[float, list[tuple[float, float, float]]]]) -> None:
    assert found.number.tolist() == list(wanted)
    for position, (step, columns) in enumerate(wanted.values()):
        assert found.step[position] == pytest.approx(step)
        for column, (mean, low, high) in enumerate(columns):
            assert found.mean[position, column] == pytest.approx(mean, rel=1e-4, abs=1e-3, nan_ok=True)
            assert found.low[position, column] == pytest.approx(low, nan_ok=True)
            assert found.high[position, column] == pytest.approx(high, nan_ok=True)


def fill(pyramid: Pyramid, rows: dict[int, list[float]], portions: list[int]) -> None:
    steps = np.array(sorted(rows), np.int64)
    values = np.array([rows[step] for step in steps.tolist()], np.float64).reshape(len(steps), -1)
    start = 0
    for stop in [*sorted({min(p, len(steps)) for p in portions}), len(steps)]:
        if stop > start:
            first = int(np.searchsorted(steps, steps[start] >> pyramid.base_shift << pyramid.base_shift))
            pyramid.replace_from(int(steps[start]), steps[first:stop], values[first:stop])
            start = stop


@settings(deadline=None, max_examples=150)
@given(
    rows=st.dictionaries(st.integers(0, 3000), st.lists(VALUES, min_size=2, max_size=2), min_size=1, max_size=60),
    portions=st.lists(st.integers(1, 60), max_size=6),
    base_shift=st.integers(0, 4),
    max_buckets=st.integers(1, 70),
)
def test_pyramid_equals_its_slow_twin(rows, portions, base_shift, max_buckets):
    pyramid = Pyramid(2, base_shift)
    fill(pyramid, rows, portions)
    found = pyramid.query(0, max(rows) + 1, max_buckets)
    wanted = slow_twin(rows, found.shift)
    if len(found) < len(wanted):  # the newest bucket may be withheld until half of it has passed
        number, _ = wanted.popitem()
        passed = ((max(rows) >> base_shift) + 1 << base_shift) - (number << found.shift)
        assert passed < 1 << (found.shift - 1)
    assert_same(found, wanted)
    assert len(found) <= max_buckets or found.shift == base_shift


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(st.integers(0, 500), min_size=2, max_size=60, unique=True),
    cut=st.integers(0, 59),
    base_shift=st.integers(0, 3),
)
def test_a_rewritten_tail_equals_a_fresh_pyramid(steps, cut, base_shift):
    steps = np.array(sorted(steps), np.int64)
    values = np.random.default_rng(1).standard_normal((len(steps), 3))
    cut = min(cut, len(steps) - 1)
    rewritten, fresh = Pyramid(3, base_shift), Pyramid(3, base_shift)
    rewritten.replace_from(0, steps, values)
    values[cut:] += 1.0
    first = int(np.searchsorted(steps, steps[cut] >> base_shift << base_shift))
    rewritten.replace_from(int(steps[cut]), steps[first:], values[first:])
    fresh.replace_from(0, steps, values)
    for most in (1, 4, 16, 64):
        a, b = rewritten.query(0, 501, most), fresh.query(0, 501, most)
        for name in ("number", "rows", "step", "count", "mean", "low", "high"):
            assert getattr(a, name).tobytes() == getattr(b, name).tobytes()


def test_unchanged_history_stays_byte_identical():
    random = np.random.default_rng(0)
    pyramid, steps = Pyramid(4, 3), np.arange(0, 40_000, 10)
    values = random.standard_normal((len(steps), 4))
    pyramid.replace_from(0, steps[:2000], values[:2000])
    before = pyramid.query(0, 20_000, 300)
    for row in range(2000, 2400):  # one row at a time, as a watcher writes them
        first = int(np.searchsorted(steps, steps[row] >> 3 << 3))
        pyramid.replace_from(int(steps[row]), steps[first : row + 1], values[first : row + 1])
    after = pyramid.query(0, 20_000, 300)
    count = len(before) - 1
    assert after.shift == before.shift
    for name in ("number", "step", "mean", "low", "high"):
        assert getattr(after, name)[:count].tobytes() == getattr(before, name)[:count].tobytes()


def test_a_new_row_leaves_a_long_history_as_it_was_sent():
    pyramid, steps = Pyramid(1, 0), np.arange(10_000)
    pyramid.replace_from(0, steps, steps[:, None].astype(float))
    before = pyramid.query(0, 10_000, 100)
    pyramid.replace_from(10_000, np.array([10_000]), np.array([[1.0]]))
    after = pyramid.query(0, 10_001, 100)
    assert after.mean.tobytes() == before.mean.tobytes()


def test_undetermined_is_a_gap_and_never_zero():
    pyramid = Pyramid(1)
    pyramid.replace_from(0, np.arange(4), np.array([[np.nan], [np.inf], [np.nan], [5.0]]))
    assert np.isnan(pyramid.query(0, 4, 4).mean[:3, 0]).all()
    assert pyramid.query(0, 4, 2).mean[:, 0].tolist()[1] == 5.0
    assert np.isnan(pyramid.query(0, 4, 2).mean[0, 0])


def test_an_empty_pyramid_has_no_buckets():
    assert len(Pyramid(3).query(0, 100, 10)) == 0
