"""Which of the models and optimizers that were seen is observed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from entropy_hooks.discovery.scan import scan_for_root
from entropy_hooks.taps import unwrap

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn
    from torch.optim import Optimizer

    from entropy_hooks.discovery.seen import Seen, Stepped


@dataclass(frozen=True, slots=True)
class Found:
    """What is observed."""

    model: nn.Module
    """As it was called: wrapped, if it is."""
    stepped: tuple[Stepped, ...]
    """The optimizers of its parameters, in the order in which they step."""
    others: tuple[str, ...]
    """What else trains in this process, in words."""
    scanned: bool
    """Found among all objects, not by its calls."""

    @property
    def last(self) -> Stepped:
        """The optimizer whose step ends the iteration."""
        return self.stepped[-1]

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """As `attach` takes them."""
        return tuple(stepped.optimizer for stepped in self.stepped)

    def __str__(self) -> str:
        names = " and ".join(stepped.name for stepped in self.stepped)
        also = f"; not observed: {', '.join(self.others)}" if self.others else ""
        return f"{type(unwrap(self.model)).__name__} with {names}{also}"


def choose(seen: Seen) -> Found | None:
    """The model with the most trained parameters, and its optimizers.

    Args:
        seen: one round of the training loop.

    Returns:
        The choice; None when no module holds parameters of these optimizers.
    """
    trained = {id(parameter) for stepped in seen.stepped for parameter in _parameters(stepped)}
    sizes = [_trained(root, trained) for root in seen.roots]
    scanned = not any(sizes)
    model = scan_for_root(trained) if scanned else seen.roots[sizes.index(max(sizes))]
    if model is None:
        return None
    own = {id(parameter) for parameter in model.parameters()}
    stepped = tuple(one for one in seen.stepped if any(id(parameter) in own for parameter in _parameters(one)))
    inner = unwrap(model)
    others = [
        type(unwrap(root)).__name__
        for root, size in zip(seen.roots, sizes, strict=True)
        if size and unwrap(root) is not inner
    ]
    others += [one.name for one in seen.stepped if one not in stepped]
    return Found(model, stepped, tuple(others), scanned)


def waits_for_optimizer(seen: Seen) -> bool:
    """Whether a called module has parameters to train whose optimizer has not stepped.

    A generator, say, that steps once for five steps of its discriminator.

    Returns:
        True while another step may change the choice.
    """
    trained = {id(parameter) for stepped in seen.stepped for parameter in _parameters(stepped)}
    return any(
        not _trained(root, trained) and any(parameter.requires_grad for parameter in root.parameters())
        for root in seen.roots
    )


def _parameters(stepped: Stepped) -> list[nn.Parameter]:
    return [parameter for group in stepped.optimizer.param_groups for parameter in group["params"]]


def _trained(root: nn.Module, trained: Collection[int]) -> int:
    return sum(parameter.numel() for parameter in root.parameters() if id(parameter) in trained)
