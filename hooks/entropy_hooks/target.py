"""What is observed and steered; none of it is kept alive."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from entropy_hooks.wrapped_optimizers import look_through

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import nn
    from torch.optim import Optimizer


class Target:
    """One model in training.

    A model that its user has dropped must go, with its gradients and its optimizer's state: whoever never detaches, as
    in a launched job, would otherwise hold the first of many models for the length of the process.
    """

    def __init__(
        self,
        model: nn.Module,
        called: nn.Module,
        optimizers: Sequence[Optimizer],
        taps: Mapping[str, nn.Module],
        steered: tuple[str, ...],
        probe: Callable[[nn.Module], torch.Tensor] | None,
    ) -> None:
        """Name the parts.

        Args:
            model: the user's module, unwrapped.
            called: what the user's code calls: the model, or what wraps it.
            optimizers: whose steps are one step together, wrapped or not.
            taps: the observed layers by name, in model order.
            steered: names of those that are steered.
            probe: the user's function that runs the model on a fixed batch and returns its loss.
        """
        self._model, self._called = weakref.ref(model), weakref.ref(called)
        found = look_through(optimizers)
        self._optimizers = [weakref.ref(optimizer) for optimizer in found.inner]
        self._wrappers = [(weakref.ref(wrapper), frozenset(map(id, inner))) for wrapper, inner in found.wrappers]
        self._taps = {name: weakref.ref(module) for name, module in taps.items()}
        self.layers = tuple(taps)
        self.steered, self.probe = steered, probe

    @property
    def model_lives(self) -> bool:
        """Somebody still has the model, or it waits for the garbage collector."""
        return self._model() is not None

    @property
    def is_gone(self) -> bool:
        """Nobody can train it any more: the model lives while one of its optimizers does."""
        return all(optimizer() is None for optimizer in self._optimizers)

    def is_model(self, other: nn.Module) -> bool:
        """Whether it is this one.

        Returns:
            True or False.
        """
        return self._model() is other

    @property
    def model(self) -> nn.Module:
        """The user's module, unwrapped.

        Raises:
            ReferenceError: it is gone.
        """
        model = self._model()
        if model is None:
            raise ReferenceError("expected the model; found that its user has dropped it")
        return model

    @property
    def called(self) -> nn.Module:
        """What the user's code calls."""
        called = self._called()
        return self.model if called is None else called

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Those that are left, without what wraps them."""
        found = (optimizer() for optimizer in self._optimizers)
        return tuple(optimizer for optimizer in found if optimizer is not None)

    @property
    def wrappers(self) -> list[tuple[Optimizer, frozenset[int]]]:
        """Optimizers that wrap some of these and may be stepped in their place, with the ``id`` of each of these."""
        found = ((wrapper(), inner) for wrapper, inner in self._wrappers)
        return [(wrapper, inner) for wrapper, inner in found if wrapper is not None]

    @property
    def taps(self) -> dict[str, nn.Module]:
        """The observed layers that are left, by name."""
        found = ((name, module()) for name, module in self._taps.items())
        return {name: module for name, module in found if module is not None}

    @property
    def contaminated(self) -> frozenset[str]:
        """Layers at or before the last steered one: while steering, their loss gradient holds injected terms."""
        return frozenset(self.layers[: 1 + max(self.layers.index(name) for name in self.steered)])
