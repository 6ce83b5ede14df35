"""When a run is over although nobody has detached, and what is said where its model trains on."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from entropy_hooks.probe_loss import depends_on

if TYPE_CHECKING:
    from entropy_hooks.faults import Faults
    from entropy_hooks.target import Target

logger = logging.getLogger("entropy_hooks")

PATIENCE_S = 60.0
"""How long a model whose optimizers are gone may stand still before its run ends: a second stage takes its time."""
_MAX_LOOKS = 3
"""Backward passes whose graph is searched for the model."""


class Ending:
    """Asks whether anybody can train the model any more; a `backward.BackwardListener`.

    Where model and optimizers are gone, nothing is lost. Where the model is left, it may be for an evaluation, or for a
    second stage with a new optimizer, which we do not see step: backward passes through it, and parameters that change
    between them, show which.
    """

    def __init__(self, target: Target, faults: Faults) -> None:
        self._target, self._faults = target, faults
        self._looks = 0
        self._versions: list[int] | None = None
        """How often each parameter had been written to at the last backward pass, since the optimizers are gone."""
        self._trains_on = False
        self._gone_since: float | None = None

    def is_over(self) -> bool:
        """Whether the run ends here; the pulse thread asks.

        Returns:
            True or False.
        """
        if not self._target.is_gone:
            return False
        if not self._target.model_lives or self._trains_on:
            return True
        if self._gone_since is None:
            self._gone_since = time.monotonic()
        if time.monotonic() - self._gone_since < PATIENCE_S:
            return False
        logger.info("the optimizer is gone, and its model has not trained for %.0f s: the run ends here", PATIENCE_S)
        return True

    def before_backward(self, roots: tuple[Any, ...], gradients: Any) -> None:
        """Is it our model's, which somebody else's optimizer steps?"""
        if self._trains_on or self._looks == _MAX_LOOKS or not self._target.is_gone or not self._target.model_lives:
            return
        try:
            self._look(roots)
        except Exception as error:  # must not reach the training job
            self._faults.count("hook_error", error)

    def after_backward(self) -> None:
        """The backward pass has ended."""

    def _look(self, roots: tuple[Any, ...]) -> None:
        parameters = [parameter for parameter in self._target.model.parameters() if parameter.requires_grad]
        before, self._versions = self._versions, [parameter._version for parameter in parameters]
        if before is None or before == self._versions:
            return
        self._looks += 1
        tensors = [root for root in roots if isinstance(root, torch.Tensor) and root.grad_fn is not None]
        if not any(depends_on(root, parameters) for root in tensors):
            return
        self._trains_on = True
        self._faults.count(
            "optimizer_replaced",
            "expected the optimizer that attach was given; found that it is gone while its model trains on (a second "
            "stage?), and the run ends here: detach(), then attach(model, new_optimizer), where that one is made",
        )
