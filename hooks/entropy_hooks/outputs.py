"""Where gradients enter a pass: what it returned, what it left in attributes, and how these depend on one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entropy_hooks.hidden import OWN_ATTRIBUTES
from entropy_hooks.structures import tensors_in
from entropy_hooks.twin import computes_weights

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
        if any(map(computes_weights, module._forward_pre_hooks.values())):  # pyright: ignore[reportPrivateUsage]
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
    inner: frozenset[int]
    """Of those from which others were computed: their gradient holds what came by the others."""
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
        return Relations(frozenset(), frozenset(), unclear=False)
    nodes: dict[int, Any] = {id(node): node for node in (output.grad_fn for output in outputs)}
    places = [(id(output.grad_fn), output.output_nr) for output in outputs]
    led_to: set[tuple[int, int]] = set()
    ahead = list(nodes.values())
    while ahead:
        for node, index in ahead.pop().next_functions:
            if node is not None:
                led_to.add((id(node), index))
                if id(node) not in nodes:
                    nodes[id(node)] = node  # and kept alive, so that no other is given its id
                    ahead.append(node)
    inner = {number for number, place in enumerate(places) if place in led_to}
    compiled = {place for place in (places[number] for number in inner) if _COMPILED in nodes[place[0]].name()}
    return Relations(
        frozenset(number for number, place in enumerate(places) if place in places[:number]),
        frozenset(inner),
        any(node == other and index != another for node, index in compiled for other, another in led_to),
    )
