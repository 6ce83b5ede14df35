"""Where gradients enter a pass: what it returned, what it left in attributes, and how these depend on one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entropy_hooks.hidden import OWN_ATTRIBUTES
from entropy_hooks.structures import tensors_in
from entropy_hooks.user_hooks import is_computing

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

_PLAIN = (int, float, str, bytes, type(None))
_COMPILED = "CompiledFunction"
"""In the name of the node that stands for all of a compiled graph."""


def left_in(model: nn.Module) -> dict[str, torch.Tensor]:
    """Results that ``forward`` has left in attributes, as a loss that its layers add to the model's.

    Args:
        model: the user's module, unwrapped.

    Returns:
        Tensors with a history, by where they are; also those of attributes' attributes.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        # A weight that torch's own hook computes is no result.
        if any(map(is_computing, module._forward_pre_hooks.values())):  # pyright: ignore[reportPrivateUsage]
            continue
        for name, value in vars(module).items():
            if name in OWN_ATTRIBUTES or isinstance(value, _PLAIN) or id(value) in seen:
                continue
            seen.add(id(value))  # a configuration is the same in all modules
            for index, tensor in enumerate(tensors_in(value, depth=1)[0]):
                if tensor.grad_fn is not None:
                    found[f"{path}.{name}.{index}"] = tensor
    return found


@dataclass(frozen=True, slots=True)
class Relations:
    """How the outputs of one pass depend on one another; within one compiled graph that is not seen, nor felt."""

    repeated: frozenset[int]
    """Numbers of those that an earlier one already is."""
    behind: tuple[frozenset[int], ...]
    """For each output, the numbers of those that were computed from it: its gradient holds what came by them."""
    unclear: bool
    """Others were computed from one of them and also from what the same compiled graph may have made of it: how much of
    the gradient has been told cannot be known."""


def relations(outputs: Sequence[torch.Tensor]) -> Relations:
    """Look through the graph.

    Args:
        outputs: tensors with a history.

    Returns:
        How they depend on one another.
    """
    if len(outputs) < 2:
        return Relations(frozenset(), (frozenset(),) * len(outputs), unclear=False)
    alive: dict[int, Any] = {id(node): node for node in (output.grad_fn for output in outputs)}
    places = [(id(output.grad_fn), output.output_nr) for output in outputs]
    numbers: dict[tuple[int, int], int] = {}
    for number, place in enumerate(places):
        numbers.setdefault(place, number)
    led_to: set[tuple[int, int]] = set()
    next_ones: dict[int, set[int]] = {}
    for place, number in numbers.items():
        next_ones[number] = _outputs_below(alive[place[0]], numbers, alive, led_to)
    behind: list[set[int]] = [set() for _ in outputs]
    for number in next_ones:
        for below in _closure(number, next_ones):
            behind[below].add(number)
    compiled = {
        places[number] for number, others in enumerate(behind) if others and _is_compiled(alive[places[number][0]])
    }
    inside = led_to - numbers.keys()
    return Relations(
        frozenset(number for number, place in enumerate(places) if numbers[place] != number),
        tuple(map(frozenset, behind)),
        any(node == other for node, _ in compiled for other, _ in inside),
    )


def _outputs_below(
    start: Any, numbers: dict[tuple[int, int], int], alive: dict[int, Any], led_to: set[tuple[int, int]]
) -> set[int]:
    """Walk from one output, no further than to the next ones.

    Returns:
        Their numbers.
    """
    found: set[int] = set()
    seen, ahead = {id(start)}, [start]
    while ahead:
        for node, index in ahead.pop().next_functions:
            if node is None:
                continue
            alive[id(node)] = node  # so that no other is given its id
            led_to.add((id(node), index))
            if (id(node), index) in numbers:
                found.add(numbers[id(node), index])
            elif id(node) not in seen:
                seen.add(id(node))
                ahead.append(node)
    return found


def _closure(start: int, next_ones: dict[int, set[int]]) -> set[int]:
    found: set[int] = set()
    ahead = [start]
    while ahead:
        new = next_ones[ahead.pop()] - found
        found |= new
        ahead.extend(new)
    return found


def _is_compiled(node: Any) -> bool:
    return _COMPILED in node.name()
