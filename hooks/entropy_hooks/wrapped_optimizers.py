"""Optimizers inside optimizers: Accelerate's and Lightning's wrappers, SAM, Lookahead.

Which of them a loop steps shows at run time: SAM's ``second_step()`` steps the optimizer inside and never SAM itself,
its ``step(closure)`` steps both. So both are hooked, and a step of the wrapper is a step of all that it wraps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from entropy_monitor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Wrapped:
    """What is inside some optimizers."""

    inner: tuple[Optimizer, ...]
    """Those that wrap no other."""
    wrappers: tuple[tuple[Optimizer, tuple[Optimizer, ...]], ...]
    """Those that do and call step hooks of their own, each with those inner ones that it stands for."""


def look_through(optimizers: Sequence[Optimizer]) -> Wrapped:
    """Look inside each.

    A wrapper is an optimizer that holds, in an attribute or in a list there, others that together train the parameters
    that it trains.

    Args:
        optimizers: as their user gave them.

    Returns:
        All that may be stepped.

    Raises:
        ConfigError: one of them has no step hooks, and no optimizer inside that has.
    """
    inner: dict[int, Optimizer] = {}
    wrappers: dict[int, tuple[Optimizer, tuple[Optimizer, ...]]] = {}
    for optimizer in optimizers:
        found = _look(optimizer, set())
        inner.update((id(each), each) for each in found.inner)
        wrappers.update((id(each), (each, stands_for)) for each, stands_for in found.wrappers)
    for each in inner.values():
        if "_optimizer_step_pre_hooks" not in vars(each):
            raise ConfigError(
                f"expected an optimizer with step hooks; found {type(each).__name__}, which never calls "
                "Optimizer.__init__: give the optimizers that it steps"
            )
    return Wrapped(tuple(inner.values()), tuple(wrappers.values()))


def _look(optimizer: Optimizer, seen: set[int]) -> Wrapped:
    seen.add(id(optimizer))
    below = [_look(each, seen) for each in _held(optimizer) if id(each) not in seen]
    inner = {id(each): each for found in below for each in found.inner}
    calls_hooks = _calls_step_hooks(optimizer)
    if not inner or (calls_hooks and _parameters(optimizer) != set[int]().union(*map(_parameters, inner.values()))):
        return Wrapped((optimizer,), ())  # it trains others besides, or shards of its own
    ours = ((optimizer, tuple(inner.values())),) if calls_hooks else ()
    return Wrapped(tuple(inner.values()), ours + tuple(pair for found in below for pair in found.wrappers))


def _held(optimizer: Optimizer) -> Iterator[Optimizer]:
    for value in vars(optimizer).values():
        values: Any = (value,)
        if isinstance(value, list | tuple | dict):
            values = value.values() if isinstance(value, dict) else value  # pyright: ignore[reportUnknownVariableType]
        for each in values:
            if issubclass(type(each), Optimizer):
                yield each


def _calls_step_hooks(optimizer: Optimizer) -> bool:
    """Accelerate's and Lightning's wrappers are optimizers by name alone, whose ``step`` torch has not wrapped.

    Returns:
        True or False.
    """
    return "_optimizer_step_pre_hooks" in vars(optimizer) and getattr(type(optimizer).step, "hooked", False) is True


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
