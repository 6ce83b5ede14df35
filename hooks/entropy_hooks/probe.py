"""The probe: a fixed batch on which the model is run once more, at the parameters of a sampled step."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from entropy_hooks.capture import LinearSample
from entropy_hooks.probe_batch import detached_copy
from entropy_hooks.probe_loss import depends_on, find_loss
from entropy_hooks.taps import first_embedding, first_tensor
from entropy_hooks.tokens import axes_of
from entropy_hooks.undisturbed import is_sharded, undisturbed
from entropy_hooks.weight_space import writes_features
from entropy_monitor.types import PATCH_LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from entropy_hooks.faults import Faults
    from entropy_hooks.tokens import TokenAxes


@dataclass(slots=True)
class LayerRun:
    """A tapped layer's output at the moment it was made; the model may overwrite it later."""

    layer: str
    z: torch.Tensor
    axes: TokenAxes
    linear: LinearSample | None
    """The last linear layer inside it that made an output of this shape."""
    linear_edge: GradientEdge | None
    """That output's place in the graph."""


@dataclass(slots=True)
class ProbeRun:
    """A forward pass on the probe, its graph alive."""

    loss: torch.Tensor
    token_ids: torch.Tensor | None


class Probe:
    """Runs the model on the fixed batch, undisturbed; owned by the training thread."""

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, nn.Module],
        function: Callable[[nn.Module], torch.Tensor] | None,
        token_dim: int | None,
        faults: Faults,
    ) -> None:
        self.model, self._taps, self._function = model, taps, function
        self._token_dim, self._faults = token_dim, faults
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.usable = True
        """False once it is known that this model cannot be probed."""

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
        watch = _Watch(self.model, self._taps, self._token_dim, see, self._faults)
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

    def _loss(self, output: Any, watch: _Watch) -> torch.Tensor | None:
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


class _Watch:
    """Hooks for the length of one forward pass."""

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, nn.Module],
        token_dim: int | None,
        see: Callable[[LayerRun], None],
        faults: Faults,
    ) -> None:
        self._token_dim, self._see, self._faults = token_dim, see, faults
        self._running: dict[str, dict[int, tuple[LinearSample, GradientEdge | None]]] = {}
        self.token_ids: torch.Tensor | None = None
        self.sequence_first = False
        embedding = first_embedding(model)
        self.num_ids = 0 if embedding is None else embedding.num_embeddings
        self._handles: list[RemovableHandle] = []
        if embedding is not None:
            self._handles.append(embedding.register_forward_pre_hook(self._see_tokens))
        for name, module in taps.items():
            for inner in module.modules():
                if writes_features(inner) is not None:
                    self._handles.append(inner.register_forward_hook(functools.partial(self._see_linear, name)))
            self._handles.append(module.register_forward_hook(functools.partial(self._see_output, name)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _see_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.token_ids is None and args and isinstance(args[0], torch.Tensor):
            self.token_ids = args[0].detach()

    def _see_linear(self, layer: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recognised = writes_features(module)
        if recognised is None or not args or not isinstance(output, torch.Tensor):
            return
        weight, _, transposed = recognised
        sample = LinearSample(module, weight, transposed, args[0].detach(), output.shape)
        edge = get_gradient_edge(output) if output.requires_grad else None
        self._running.setdefault(layer, {})[output.shape[-1]] = sample, edge

    def _see_output(self, layer: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        z = first_tensor(output)
        if z is None or not z.is_floating_point() or (axes := axes_of(module, z, self._token_dim)) is None:
            return
        self.sequence_first |= z.dim() == 3 and axes.token_dim == 0
        num_sequences, length, _ = axes.sequences(z).shape
        if not num_sequences or length < PATCH_LENGTH:
            self._faults.count(
                "batch_too_short",
                f"expected a probe of 8 tokens a sequence or more; found {(num_sequences, length)} in {layer}: give "
                "attach(probe=...) longer sequences, or token_dim if its tokens lie along another axis",
            )
            return
        linear, edge = self._running.pop(layer, {}).get(z.shape[-1], (None, None))
        if linear is not None and linear.output_shape != z.shape:
            linear = edge = None
        self._see(LayerRun(layer, z, axes, linear, edge))


def _described(output: Any) -> str:
    tensor = first_tensor(output)
    what = f"a tensor {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
    without = tensor is not None and not tensor.requires_grad
    return f"{what} without a gradient (torch.no_grad or detach)" if without else what
