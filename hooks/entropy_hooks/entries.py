"""Does a loss reach a pass by its outputs alone? Or by what a hook of the user's handed out, or a gradient penalty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import GradientEdge

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(slots=True)
class Entries:
    """Which nodes of the graph a pass has made, by their numbers: a reference would hold the graph."""

    first: int = field(default_factory=lambda: _next_number())
    """Number of the first node that the pass makes."""
    end: int = 0
    places: frozenset[tuple[int, int]] = frozenset()
    """Number and index of its outputs."""

    def close(self, outputs: Iterable[torch.Tensor]) -> None:
        """The pass has ended.

        Args:
            outputs: tensors with a history.
        """
        self.end = _next_number()
        self.places = frozenset((_number(output.grad_fn), output.output_nr) for output in outputs)

    def are_all_of(self, roots: tuple[Any, ...]) -> bool:
        """Walk from where a backward pass begins to where it enters this pass.

        Args:
            roots: what ``backward`` was called with.

        Returns:
            False if it enters elsewhere too.
        """
        seen: set[Any] = set()
        ahead = list(_edges(roots))
        while ahead:
            node, index = ahead.pop()
            number = _number(node)
            if number < self.first or not node.next_functions:
                continue  # of an earlier pass, or a parameter
            if number < self.end:
                if (number, index) not in self.places:
                    return False
            elif node not in seen:
                seen.add(node)
                ahead.extend((below, at) for below, at in node.next_functions if below is not None)
        return True


def _edges(roots: tuple[Any, ...]) -> Iterator[tuple[Any, int]]:
    for root in roots:
        if isinstance(root, GradientEdge):
            yield root.node, root.output_nr
        elif isinstance(root, torch.Tensor) and root.grad_fn is not None:
            yield root.grad_fn, root.output_nr


def _next_number() -> int:
    """Of this thread.

    Returns:
        What the next node will be given.
    """
    return torch._C._autograd._get_sequence_nr()  # pyright: ignore


def _number(node: Any) -> int:
    return node._sequence_nr()
