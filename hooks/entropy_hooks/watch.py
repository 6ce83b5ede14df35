"""Looking at one eager forward pass that we run ourselves."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from entropy_hooks.taps import first_embedding, first_tensor
from entropy_hooks.tokens import axes_of, too_short
from entropy_hooks.weight_space import linear_sample, writes_features
from entropy_monitor.types import PATCH_LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from entropy_hooks.capture import LinearSample
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


class Watch:
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
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _see_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.token_ids is None and args and isinstance(args[0], torch.Tensor):
            self.token_ids = args[0].detach()

    def _see_linear(self, layer: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sample = linear_sample(module, args, output)
        if sample is None:
            return
        edge = get_gradient_edge(output) if output.requires_grad else None
        self._running.setdefault(layer, {})[output.shape[-1]] = sample, edge

    def _see_output(self, layer: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        z = first_tensor(output)
        if z is None or not z.is_floating_point() or (axes := axes_of(module, z, self._token_dim)) is None:
            return
        self.sequence_first |= z.dim() == 3 and axes.token_dim == 0
        num_sequences, length, _ = axes.sequences(z).shape
        if not num_sequences or length < PATCH_LENGTH:
            self._faults.count("batch_too_short", too_short(layer, num_sequences, length))
            return
        linear, edge = self._running.pop(layer, {}).get(z.shape[-1], (None, None))
        if linear is not None and linear.output_shape != z.shape:
            linear = edge = None
        self._see(LayerRun(layer, z, axes, linear, edge))
