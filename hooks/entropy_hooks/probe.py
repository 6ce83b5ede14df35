"""The probe: a fixed batch on which the model is run once more, at the parameters of a sampled step."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from entropy_hooks.copies import detached_copy
from entropy_hooks.probe_loss import depends_on, find_loss
from entropy_hooks.taps import first_tensor
from entropy_hooks.undisturbed import is_sharded, undisturbed
from entropy_hooks.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import nn

    from entropy_hooks.faults import Faults
    from entropy_hooks.target import Target
    from entropy_hooks.watch import LayerRun


@dataclass(slots=True)
class ProbeRun:
    """A forward pass on the probe, its graph alive."""

    loss: torch.Tensor
    token_ids: torch.Tensor | None


class Probe:
    """Runs the model on the fixed batch, undisturbed; owned by the training thread."""

    def __init__(self, target: Target, token_dim: int | None, faults: Faults) -> None:
        self._target, self._function, self._token_dim, self._faults = target, target.probe, token_dim, faults
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.usable = True
        """False once it is known that this model cannot be probed."""

    @property
    def model(self) -> nn.Module:
        """The user's module, unwrapped."""
        return self._target.model

    def keep_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Without a function of the user's, the first training batch is the probe; never raises."""
        if self._function is None and self._inputs is None and self.usable:
            try:
                self._inputs = detached_copy((args, kwargs))
            except Exception as error:  # whatever the user's own classes do when they are copied
                self._give_up(
                    "probe_batch_not_kept",
                    f"expected a first batch that can be copied; found {type(error).__name__}: {error}: "
                    "give attach(probe=...)",
                )

    @contextlib.contextmanager
    def run(self, see: Callable[[LayerRun], None]) -> Generator[ProbeRun | None]:
        """Run forward; backward passes belong inside the ``with`` block.

        Args:
            see: is called with each tapped layer's output as it is made, if it holds a patch; twice for a layer that
                runs twice.

        Yields:
            The run, or None where there is no batch yet or no loss.
        """
        if self.usable and is_sharded(self.model):
            self._give_up("probe_sharded", "each rank holds a part of the parameters: the probe cannot run by itself")
        if self.usable and self._function is None and self._inputs is None:
            self._faults.count(
                "no_probe_batch",
                "the model has not run before this optimizer step (compiled, or in a closure): give attach(probe=...)",
            )
        if not self.usable or (self._function is None and self._inputs is None):
            yield None
            return
        with undisturbed(self.model):
            yield self._forward(see)

    def _forward(self, see: Callable[[LayerRun], None]) -> ProbeRun | None:
        watch = Watch(self.model, self._target.taps, self._token_dim, see, self._faults)
        try:
            if self._function is not None:
                output: Any = self._function(self.model)
            else:
                assert self._inputs is not None
                args, kwargs = detached_copy(self._inputs)  # a model may write into what it is given
                output = self.model(*args, **kwargs)
        finally:
            watch.remove()  # checkpointed blocks run again in the backward pass: that is not looked at
        loss = self._loss(output, watch)
        return None if loss is None else ProbeRun(loss, watch.token_ids)

    def _loss(self, output: Any, watch: Watch) -> torch.Tensor | None:
        if self._function is None:
            loss = find_loss(output, watch.token_ids, watch.num_ids, sequence_first=watch.sequence_first)
        else:
            scalar = isinstance(output, torch.Tensor) and output.numel() == 1 and output.requires_grad
            loss = output.reshape(()) if scalar else None
        if loss is None:
            self._give_up(
                "no_probe_loss",
                f"expected the model's loss on the probe batch; found {_described(output)}: give attach(probe=...), a "
                "function of the model that returns a 0-d loss",
            )
        elif not depends_on(loss, self.model.parameters()):
            self._give_up(
                "probe_failed",
                "expected a loss that depends on the model's trained parameters; found none of them in its graph: give "
                "attach(probe=...), a function that runs the model it is given",
            )
            return None
        return loss

    def _give_up(self, kind: str, detail: str) -> None:
        self.usable = False
        self._faults.count(kind, detail)


def _described(output: Any) -> str:
    tensor = first_tensor(output)
    what = f"a tensor {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
    without = tensor is not None and not tensor.requires_grad
    return f"{what} without a gradient (torch.no_grad or detach)" if without else what
