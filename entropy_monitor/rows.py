"""States made of numbers only, to and from columns of a float64 table, so that a restarted process goes on exactly."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from _typeshed import DataclassInstance

State = TypeVar("State", bound="DataclassInstance")


def state_to_row(state: DataclassInstance, prefix: str) -> dict[str, float]:
    """Give a dataclass of numbers as columns.

    A number stands under its field's name. A tuple of floats is spread over columns numbered from ``_000``. A state
    within the state has its fields' names behind its own and an underscore.

    Args:
        state: its fields are ints, bools, floats, tuples of floats, and such states.
        prefix: put before each name, to keep several states apart in one row.

    Returns:
        A float for each number.
    """
    row: dict[str, float] = {}
    for field in fields(state):
        name, value = prefix + field.name, getattr(state, field.name)
        if isinstance(value, tuple):
            numbers = cast("tuple[float, ...]", value)
            row |= {_numbered(name, index): float(number) for index, number in enumerate(numbers)}
        elif is_dataclass(value):
            row |= state_to_row(cast("DataclassInstance", value), f"{name}_")
        else:
            row[name] = float(value)
    return row


def state_from_row(cls: type[State], row: Mapping[str, float], prefix: str) -> State:
    """Restore a state from columns; others in the row are ignored.

    Args:
        cls: a dataclass whose fields have defaults: an int where only whole numbers are valid, a tuple as long as
            those that are written, a state where there is a state.
        row: columns, as from `state_to_row`.
        prefix: the one given there.

    Returns:
        The state that gave the row.

    Raises:
        ValueError: a column is missing, or a count is not a whole number.
    """
    blank, values = cls(), dict[str, Any]()
    for field in fields(cls):
        name, default = prefix + field.name, getattr(blank, field.name)
        if isinstance(default, tuple):
            length = len(cast("tuple[float, ...]", default))
            values[field.name] = tuple(_number(cls, row, _numbered(name, index)) for index in range(length))
        elif is_dataclass(default):
            values[field.name] = state_from_row(type(cast("DataclassInstance", default)), row, f"{name}_")
        elif isinstance(default, int):
            values[field.name] = int(_number(cls, row, name, whole=True))
        else:
            values[field.name] = _number(cls, row, name)
    return cls(**values)


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index:03d}"


def _number(cls: type[DataclassInstance], row: Mapping[str, float], column: str, *, whole: bool = False) -> float:
    value = row.get(column)
    if value is None or (whole and not float(value).is_integer()):
        raise ValueError(
            f"{column}: expected a {'whole ' if whole else ''}number, found {value}: pass a row that "
            f"was written for {cls.__name__}, or start with a new one"
        )
    return float(value)
