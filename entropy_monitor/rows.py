"""States made of numbers only, to and from columns of a float64 table, so that a restarted process goes on exactly."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from _typeshed import DataclassInstance

State = TypeVar("State", bound="DataclassInstance")


def state_to_row(state: DataclassInstance, prefix: str) -> dict[str, float]:
    """Give a flat dataclass of numbers as columns.

    Args:
        state: its fields are ints, bools and floats.
        prefix: put before each field's name, to keep several states apart in one row.

    Returns:
        A float for each field.
    """
    return {prefix + field.name: float(getattr(state, field.name)) for field in fields(state)}


def state_from_row(cls: type[State], row: Mapping[str, float], prefix: str) -> State:
    """Restore a state from columns; others in the row are ignored.

    Args:
        cls: a dataclass whose fields have defaults, an int where only whole numbers are valid.
        row: columns, as from `state_to_row`.
        prefix: the one given there.

    Returns:
        The state that gave the row.

    Raises:
        ValueError: a column is missing, or a count is not a whole number.
    """
    values: dict[str, Any] = {}
    for field in fields(cls):
        value = row.get(prefix + field.name)
        whole = isinstance(field.default, int)
        if value is None or (whole and not float(value).is_integer()):
            raise ValueError(
                f"{prefix}{field.name}: expected a {'whole ' if whole else ''}number, found {value}: pass a row that "
                f"was written for {cls.__name__}, or start with a new one"
            )
        values[field.name] = int(value) if whole else float(value)
    return cls(**values)
