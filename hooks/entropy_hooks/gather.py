"""From an eager pass that we run ourselves to the same `Capture` that training's own pass gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch.autograd.graph import get_gradient_edge

from entropy_hooks.capture import Capture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.autograd.graph import GradientEdge

    from entropy_hooks.faults import Faults
    from entropy_hooks.tokens import PatchSample
    from entropy_hooks.watch import LayerRun

    _Wanted: TypeAlias = tuple[GradientEdge, Callable[[torch.Tensor], object]]
    """Where a gradient is taken, and what keeps it."""
    _Taken: TypeAlias = tuple[Callable[[torch.Tensor], object], torch.Tensor]


class Gathering:
    """Takes the sampled tokens of each layer as it runs, then their gradients in one backward pass."""

    def __init__(
        self, draw: Callable[[int, int, torch.device], PatchSample | None], faults: Faults, *, weights: bool
    ) -> None:
        """Begin.

        Args:
            draw: gives the sample for (sequences, tokens in each, device).
            faults: where layers that do not fit are counted.
            weights: take the gradients of the weights too; else training has left them in ``weight.grad``.
        """
        self._draw, self._faults, self._weights = draw, faults, weights
        self._places: dict[str, list[_Wanted]] = {}
        self.capture = Capture()

    def see(self, run: LayerRun) -> None:
        """Take in one layer."""
        capture = self.capture
        sequences = run.axes.sequences(run.z.detach())
        if capture.sample is None:
            num_sequences, length, _ = sequences.shape
            capture.sample = self._draw(num_sequences, length, run.z.device)
        assert capture.sample is not None  # the layer holds a patch
        if capture.add(run.layer, run.axes, sequences, run.linear, self._faults):
            self._places[run.layer] = list(self._wanted(capture.sample, run))

    def differentiate(
        self,
        roots: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor] | None = None,
        totals: Sequence[torch.Tensor] = (),
    ) -> None:
        """Take all gradients in one backward pass; one that the roots do not reach stays missing.

        Args:
            roots: what to differentiate.
            gradients: by what each is multiplied; None for a 0-d root.
            totals: roots whose gradient is told with all that comes to them by other roots, which is left out then.
        """
        self.keep(self.take(roots, gradients, totals))

    def take(
        self, roots: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor] | None, totals: Sequence[torch.Tensor]
    ) -> list[_Taken]:
        """The part of `differentiate` in which code of the user's runs.

        Returns:
            For `keep`.
        """
        told = [
            (root, gradient) for root, gradient in zip(roots, gradients or (), strict=False) if _is_in(root, totals)
        ]
        for root, gradient in told:
            root.register_hook(_always(gradient))
        wanted = [place for places in self._places.values() for place in places]
        taken: list[_Taken] = []
        if wanted:
            edges = [edge for edge, _ in wanted]
            found = cast(
                "Sequence[torch.Tensor | None]", torch.autograd.grad(roots, edges, gradients, allow_unused=True)
            )
            for (edge, keep), gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    # It is taken before the hooks of that very place are called.
                    there = (
                        total for root, total in told if (root.grad_fn, root.output_nr) == (edge.node, edge.output_nr)
                    )
                    taken.append((keep, next(there, gradient)))
        return taken

    def keep(self, taken: Sequence[_Taken]) -> None:
        """Select the sampled tokens of each gradient."""
        for keep, gradient in taken:
            keep(gradient)
        if not self.capture.gradients:
            self._faults.count(
                "no_gradients",
                "no layer has a gradient in our own pass (torch.no_grad, or reentrant checkpointing: give "
                "checkpoint(use_reentrant=False))",
            )

    def _wanted(self, sample: PatchSample, run: LayerRun) -> Iterator[_Wanted]:
        """Say which gradients of one layer are wanted: at its output, at its last linear layer's, and of that weight.

        Yields:
            Where each is taken, and what keeps it.
        """
        capture, layer = self.capture, run.layer
        linear = capture.linears.get(layer)

        def select(gradient: torch.Tensor) -> torch.Tensor:
            return sample.select(run.axes.sequences(gradient))

        def keep_output_gradient(gradient: torch.Tensor) -> None:
            capture.gradients[layer] = select(gradient)

        if run.z.requires_grad:
            yield get_gradient_edge(run.z), keep_output_gradient
        if linear is None or linear is not run.linear or run.linear_edge is None:
            return

        def keep_linear_gradient(gradient: torch.Tensor) -> None:
            linear.output_gradient = select(gradient)

        def keep_weight_gradient(gradient: torch.Tensor) -> None:
            linear.weight_gradient = gradient

        if linear.weight.requires_grad:
            yield run.linear_edge, keep_linear_gradient
            if self._weights:
                yield get_gradient_edge(linear.weight), keep_weight_gradient


def _is_in(tensor: torch.Tensor, tensors: Sequence[torch.Tensor]) -> bool:
    return any(tensor is one for one in tensors)


def _always(gradient: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor hook that gives this gradient, whatever has come."""
    return lambda _: gradient
