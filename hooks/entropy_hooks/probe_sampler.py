"""What a sampled step asks of the probe: the exact audit, and in probe mode the frame itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from entropy_hooks.exact import audit
from entropy_hooks.frame import ObservedPass
from entropy_hooks.gather import Gathering
from entropy_hooks.probe import Probe
from entropy_hooks.tokens import PatchSampler
from entropy_hooks.weight_space import reduce_layers

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from entropy_hooks.faults import Faults
    from entropy_hooks.observer import Observer
    from entropy_hooks.target import Target
    from entropy_hooks.tokens import PatchSample
    from entropy_monitor.config import MonitorOptions

_Found = TypeVar("_Found")


class ProbeSampler:
    """Asks the probe with our observation hooks silent; whatever fails is counted."""

    def __init__(self, target: Target, observer: Observer, options: MonitorOptions, faults: Faults) -> None:
        self._observer, self._options, self._faults = observer, options, faults
        self._layers = target.layers
        self._probe = Probe(target, options.token_dim, faults)
        observer.on_inputs = self._probe.keep_inputs
        self._sample: PatchSample | None = None
        """The patches, drawn at the first look and kept: curves carry no noise from the choice of tokens."""
        self._sampler = PatchSampler(options.patches)

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
            with self._observer.guard.silenced():
                return question()
        except Exception as error:  # the model's own code has run, or memory was short: training goes on
            self._faults.count("probe_failed", error)
            return None

    def _observe(self) -> ObservedPass | None:
        gathering = Gathering(self._draw, self._faults, weights=True)
        capture = gathering.capture
        with self._probe.run(gathering.see) as run:
            if run is None or capture.sample is None:
                return None
            capture.token_ids = run.token_ids
            if self._options.gradients:
                gathering.differentiate([run.loss])
        observed = ObservedPass(capture, loss=run.loss.detach())
        if self._options.gradients and self._options.weight_alignment:
            observed.weight_space = reduce_layers(capture, frozenset(), capture.sample.num_batch_patches)
        capture.linears.clear()  # with copies of weights and their gradients, which must not wait for the writer
        return observed

    def _draw(self, num_sequences: int, length: int, device: torch.device) -> PatchSample | None:
        if self._sample is None:
            self._sample = self._sampler.draw(num_sequences, length, device)
        return None if self._sample is None else self._sample.again()
