import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_monitor.rows import state_from_row, state_to_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    count: int = 0
    level: float = math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    step: int = -1
    inner: Inner = field(default_factory=Inner)
    parts: tuple[float, ...] = (0.0,) * 3


numbers = st.floats(allow_nan=True, allow_infinity=True)
whole = st.integers(-(2**53), 2**53)
states = st.builds(
    Outer, step=whole, inner=st.builds(Inner, count=whole, level=numbers), parts=st.tuples(numbers, numbers, numbers)
)


def test_columns_are_named_by_field_place_and_prefix():
    state = Outer(step=7, inner=Inner(count=2, level=0.5), parts=(1.0, 2.0, 3.0))
    assert state_to_row(state, "a_") == {
        "a_step": 7.0,
        "a_inner_count": 2.0,
        "a_inner_level": 0.5,
        "a_parts_000": 1.0,
        "a_parts_001": 2.0,
        "a_parts_002": 3.0,
    }


@given(states)
def test_a_row_of_floats_restores_the_state_bit_for_bit(state):
    row = state_to_row(state, "a_")
    assert all(type(number) is float for number in row.values())
    again = state_from_row(Outer, {**row, "other": 1.0}, "a_")
    assert repr(again) == repr(state)  # tells -0.0 from 0.0, and takes a NaN for itself


@given(states, states)
def test_states_with_different_prefixes_share_a_row(one, other):
    row = state_to_row(one, "a_") | state_to_row(other, "b_")
    assert repr(state_from_row(Outer, row, "a_")) == repr(one)
    assert repr(state_from_row(Outer, row, "b_")) == repr(other)


@pytest.mark.parametrize("column", ["a_step", "a_inner_count", "a_inner_level", "a_parts_001"])
def test_a_missing_column_is_named(column):
    row = state_to_row(Outer(), "a_")
    del row[column]
    with pytest.raises(ValueError, match=f"{column}: expected a (whole )?number, found None"):
        state_from_row(Outer, row, "a_")


@pytest.mark.parametrize("column", ["a_step", "a_inner_count"])
@pytest.mark.parametrize("value", [0.5, math.nan, math.inf])
def test_a_count_that_is_not_whole_is_refused(column, value):
    with pytest.raises(ValueError, match=f"{column}: expected a whole number, found {value}"):
        state_from_row(Outer, {**state_to_row(Outer(), "a_"), column: value}, "a_")
