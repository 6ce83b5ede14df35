"""The pass that a sampled step's frame holds: looked at, or run again, while its gradients are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entropy_hooks.frame import ObservedPass
from entropy_hooks.optimizer_figures import gradient_norm
from entropy_hooks.probe_sampler import ProbeSampler
from entropy_hooks.weight_space import reduce_layers

if TYPE_CHECKING:
    import torch

    from entropy_hooks.faults import Faults
    from entropy_hooks.loss import LossReading
    from entropy_hooks.observer import Observer
    from entropy_hooks.target import Target
    from entropy_monitor.config import MonitorOptions


class Observation:
    """Of one step after another; `Session` tells it when the optimizer begins and ends."""

    def __init__(self, target: Target, observer: Observer, options: MonitorOptions, faults: Faults) -> None:
        self._target, self._observer, self._options, self._faults = target, observer, options, faults
        self.observed: ObservedPass | None = None
        self.exact: torch.Tensor | None = None
        """This step's exact alignment, if it is audited."""
        self._in_optimizer = False
        """An optimizer is stepping: a pass that runs now runs in a closure."""
        self._probe: ProbeSampler | None = None
        if options.exact_alignment_every or options.observe == "probe":
            self._probe = ProbeSampler(target, observer, options, faults)

    def begin_optimizer(self, step: int, *, sampled: bool) -> None:
        """The optimizer has not changed the parameters yet.

        Args:
            step: the optimizer step under way.
            sampled: it has a frame.
        """
        if sampled:
            if self._probe is not None:
                self._ask_probe(self._probe, step)
            if self._observer.replays:
                self._replay_training()
            else:
                self._observe_training()
        self._in_optimizer = True

    def after_backward(self, *, sampled: bool) -> None:
        """A closure's pass is run again at once: once the closure returns, the parameters are other ones."""
        if self._in_optimizer and sampled and self._observer.replays:
            self._replay_training()
            if self.observed is not None:
                self.observed.grad_norm = None  # the closure may go on to clip: left to the end of the step

    def end_optimizer(self) -> None:
        """The optimizer has stepped."""
        self._in_optimizer = False

    def complete(self) -> None:
        """Look at what only the end of the step could show."""
        capture = self._observer.capture
        # A closure runs its pass within the step: a newer one than was looked at before it.
        newer = capture is not None and self.observed is not None and capture is not self.observed.capture
        if not self._observer.replays and (self.observed is None or newer):
            self._observe_training()
        elif self.observed is not None and self.observed.grad_norm is None:
            self.observed.grad_norm = gradient_norm(self._target.optimizers)

    def forget(self) -> None:
        """The step is over."""
        self.observed = self.exact = None

    def _ask_probe(self, probe: ProbeSampler, step: int) -> None:
        every = self._options.exact_alignment_every
        if every and step % every == 0:
            self.exact = probe.audit()
        if self._options.observe == "probe":
            self.observed = probe.observe()
            if self.observed is not None and self._observer.passes.micro_batches.count:
                self.observed.grad_norm = gradient_norm(self._target.optimizers)

    def _observe_training(self) -> None:
        """The gradients are accumulated and unscaled.

        A closure runs the passes inside the optimizer's step; then they are looked at when the step has ended.
        """
        capture = self._observer.observed
        if not self._observer.sampling or capture is None or capture.sample is None or not capture.activations:
            return
        observed = self.observed = ObservedPass(capture)  # kept whatever part of it fails below
        if self._options.gradients and not capture.gradients:
            self._faults.count(
                "no_gradients", "the observed forward pass had no backward pass (an evaluation with grad?)"
            )
        if self._observer.weight:
            observed.contaminated = self._target.contaminated
        self._add_figures(observed, capture.loss)

    def _replay_training(self) -> None:
        kept, self._observer.kept = self._observer.to_replay, None
        if kept is None:
            return  # counted where it was met, or looked for when the step has ended
        with self._observer.guard.silenced():
            observed = self._observer.replay.observe(kept)
        self.observed = observed  # a closure may run several: the newest, or none
        if observed is not None:
            self._add_figures(observed, kept.loss)
            observed.capture.linears.clear()

    def _add_figures(self, observed: ObservedPass, loss: LossReading | None) -> None:
        """Add what is the same however the pass was observed."""
        if loss is not None:
            observed.loss, observed.gradient_scale = loss.loss, loss.scale
        observed.grad_norm = gradient_norm(self._target.optimizers)
        sample = observed.capture.sample
        if self._options.gradients and self._options.weight_alignment and sample is not None:
            batch_patches = observed.num_batch_patches or sample.num_batch_patches
            batch_patches *= max(1, self._observer.passes.micro_batches.count)
            observed.weight_space = reduce_layers(observed.capture, observed.contaminated, batch_patches)
