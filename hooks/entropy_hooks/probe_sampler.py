"""What a sampled step asks of the probe: the exact audit, and in probe mode the frame itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import torch
from torch.autograd.graph import get_gradient_edge

from entropy_hooks.capture import Capture
from entropy_hooks.exact import audit
from entropy_hooks.frame import ObservedPass
from entropy_hooks.probe import Probe
from entropy_hooks.tokens import draw_patches
from entropy_hooks.weight_space import reduce_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.autograd.graph import GradientEdge

    from entropy_hooks.faults import Faults
    from entropy_hooks.observer import Observer
    from entropy_hooks.probe import LayerRun
    from entropy_hooks.session import Target
    from entropy_hooks.tokens import PatchSample
    from entropy_monitor.config import MonitorOptions

    _Wanted: TypeAlias = tuple[GradientEdge, Callable[[torch.Tensor], object]]
    """Where a gradient is taken, and what keeps it."""

_Found = TypeVar("_Found")


class ProbeSampler:
    """Asks the probe with our observation hooks silent; whatever fails is counted."""

    def __init__(self, target: Target, observer: Observer, options: MonitorOptions, faults: Faults) -> None:
        self._observer, self._options, self._faults = observer, options, faults
        self._layers = tuple(target.taps)
        self._probe = Probe(target.model, target.taps, target.probe, options.token_dim, faults)
        observer.on_inputs = self._probe.keep_inputs
        self._sample: PatchSample | None = None
        """The patches, drawn at the first look and kept: curves carry no noise from the choice of tokens."""
        self._generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))

    def audit(self) -> torch.Tensor | None:
        """Ask for the exact alignment.

        Returns:
            Cosines ``[L, 2]``, see `exact.audit`; None where there are none.
        """
        return self._ask(lambda: audit(self._probe, self._layers))

    def observe(self) -> ObservedPass | None:
        """Observe the probe as a training pass is observed: activations, gradients, weight-space sums, loss.

        Returns:
            The pass, or None where there is none.
        """
        return self._ask(self._observe)

    def _ask(self, question: Callable[[], _Found]) -> _Found | None:
        try:
            with self._observer.silenced():
                return question()
        except Exception as error:  # the model's own code has run, or memory was short: training goes on
            self._faults.count("probe_failed", error)
            return None

    def _observe(self) -> ObservedPass | None:
        capture = Capture()
        wanted: dict[str, list[_Wanted]] = {}

        def see(run: LayerRun) -> None:
            if self._take(capture, run):
                wanted[run.layer] = list(_wanted(capture, run))

        with self._probe.run(see) as run:
            if run is None or capture.sample is None:
                return None
            capture.token_ids = run.token_ids
            if self._options.gradients:
                _differentiate(run.loss, [entry for entries in wanted.values() for entry in entries])
                if not capture.gradients:
                    self._faults.count(
                        "no_gradients",
                        "no layer of the probe has a gradient (torch.no_grad, or reentrant checkpointing: give "
                        "checkpoint(use_reentrant=False))",
                    )
        observed = ObservedPass(capture, loss=run.loss.detach())
        if self._options.gradients and self._options.weight_alignment:
            observed.weight_space = reduce_layers(capture, frozenset(), capture.sample.num_batch_patches)
        capture.linears.clear()  # with copies of weights and their gradients, which must not wait for the writer
        return observed

    def _take(self, capture: Capture, run: LayerRun) -> bool:
        """Gather the sampled tokens of one layer.

        Returns:
            Whether the layer has them.
        """
        sequences = run.axes.sequences(run.z.detach())
        if self._sample is None:
            num_sequences, length, _ = sequences.shape
            self._sample = draw_patches(num_sequences, length, self._options.patches, self._generator, run.z.device)
        assert self._sample is not None  # the layer holds a patch
        if not self._sample.fits(sequences):
            self._faults.count("other_tokens", f"{run.layer} has other tokens than the probe's first layer: left out")
            return False
        capture.sample = self._sample
        capture.activations[run.layer], capture.axes[run.layer] = self._sample.select(sequences), run.axes
        if run.linear is not None and self._sample.fits(inputs := run.axes.sequences(run.linear.inputs)):
            run.linear.inputs = self._sample.select(inputs)
            capture.linears[run.layer] = run.linear
        return True


def _wanted(capture: Capture, run: LayerRun) -> Iterator[_Wanted]:
    """Say which gradients of one layer are wanted: at its output, at its last linear layer's, and of that weight.

    Yields:
        Where each is taken, and what keeps it.
    """
    sample, layer, linear = capture.sample, run.layer, capture.linears.get(run.layer)
    assert sample is not None

    def select(gradient: torch.Tensor) -> torch.Tensor:
        return sample.select(run.axes.sequences(gradient))

    def keep_output_gradient(gradient: torch.Tensor) -> None:
        capture.gradients[layer] = select(gradient)

    if run.z.requires_grad:
        yield get_gradient_edge(run.z), keep_output_gradient
    if linear is not None and linear is run.linear and run.linear_edge is not None and linear.weight.requires_grad:

        def keep_linear_gradient(gradient: torch.Tensor) -> None:
            linear.output_gradient = select(gradient)

        def keep_weight_gradient(gradient: torch.Tensor) -> None:
            linear.weight_gradient = gradient

        yield run.linear_edge, keep_linear_gradient
        yield get_gradient_edge(linear.weight), keep_weight_gradient


def _differentiate(loss: torch.Tensor, wanted: Sequence[_Wanted]) -> None:
    """Take all gradients in one backward pass; one that the loss does not reach stays missing."""
    if not wanted:
        return
    places = [place for place, _ in wanted]
    found = cast("Sequence[torch.Tensor | None]", torch.autograd.grad(loss, places, allow_unused=True))
    for (_, keep), gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            keep(gradient)
