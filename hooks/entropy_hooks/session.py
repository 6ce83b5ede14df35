"""One attachment, from `attach` to `detach`: what happens at each optimizer-step boundary."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from entropy_hooks.budget import Cadence
from entropy_hooks.cost import Overhead, StepCosts, host_clocks, overhead
from entropy_hooks.frame import FrameAssembler, ObservedPass, StepRecord
from entropy_hooks.host import Ring
from entropy_hooks.meter import Meter
from entropy_hooks.observer import Observer
from entropy_hooks.optimizer_figures import gradient_norm, learning_rate
from entropy_hooks.placed import remove_lost
from entropy_hooks.probe_sampler import ProbeSampler
from entropy_hooks.pulse import Pulse
from entropy_hooks.ranks import rank_and_world_size
from entropy_hooks.scalars import ScalarsBatch
from entropy_hooks.shared_notes import share_notes
from entropy_hooks.step_boundary import StepBoundary
from entropy_hooks.unobserved import count_reason
from entropy_hooks.weight_space import reduce_layers
from entropy_hooks.writer import Writer
from entropy_monitor.types import PHASES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from entropy_hooks.cost import Clock
    from entropy_hooks.faults import Faults
    from entropy_hooks.host import Slot
    from entropy_hooks.loss import LossReading
    from entropy_hooks.phase import PhaseControl
    from entropy_hooks.target import Target
    from entropy_monitor.config import MonitorOptions
    from entropy_monitor.store import Run


class Session:
    """Hooks, writer and pulse of one monitor."""

    def __init__(
        self,
        run: Run,
        place: tuple[int, int],
        target: Target,
        options: MonitorOptions,
        phase: PhaseControl,
        faults: Faults,
    ) -> None:
        self.attempt, self._rank = place
        self._target, self._options, self._phase, self._faults = target, options, phase, faults
        self.step = options.start_step
        """The optimizer step under way."""
        self._num_tokens_seen = 0
        self._last_step_at: float | None = None
        self._ended = False
        self.meter = Meter()
        device = next((parameter.device for parameter in target.model.parameters()), torch.device("cpu"))
        self._costs = StepCosts(host_clocks(self.meter), device)
        notes = f"entropy_monitor/{run.objects.url}/{self.attempt}/cadence"
        self.cadence = Cadence(options.every, options.max_overhead, self._costs, lambda: share_notes(notes), faults)
        self._ring = Ring()
        self._scalars = ScalarsBatch(self._ring)
        self._assembler = FrameAssembler(options, target.layers, self._ring, faults)
        self._sampled = False
        """The step under way is sampled."""
        self._in_optimizer = False
        """An optimizer is stepping: a pass that runs now runs in a closure."""
        self._observed: ObservedPass | None = None
        self._exact: torch.Tensor | None = None
        """This step's exact alignment, if it is audited."""
        self.writer = Writer(run.objects, self._rank, self.attempt, options.keep, self._ring, faults)
        ranks = (self.attempt, self._rank, rank_and_world_size()[1])
        self._pulse = Pulse(
            run, ranks, steer=options.steer, fields=self._heartbeat, is_over=lambda: target.is_gone, faults=faults
        )
        self._observer = Observer(target, options, faults, self.meter)
        self._probe: ProbeSampler | None = None
        if options.exact_alignment_every or options.observe == "probe":
            self._probe = ProbeSampler(target, self._observer, options, faults)
        run_guarded = self._observer.guard.run
        before, after = (functools.partial(run_guarded, act) for act in (self._before_step, self._after_step))
        with contextlib.ExitStack() as undo:  # an optimizer may refuse its hooks
            undo.callback(self._observer.remove)
            undo.callback(remove_lost, target.optimizers, target.model)
            self._boundary = StepBoundary(target, before, after)
            undo.pop_all()
        self._observer.passes.on_forward = self._boundary.begin_forward
        self._observer.on_backward = self._after_backward

    def overhead(self, clock: Clock | None = None) -> Overhead:
        """What observing costs, see `cost.overhead`."""
        return overhead(self._costs, self.meter, self.cadence.every, clock)

    def start(self, when_over: Callable[[], None]) -> None:
        """Start the threads, and sample the first step if it is due.

        Args:
            when_over: is called once, on a thread of ours, when nobody can train the model any more.
        """
        self._begin_step()
        self.writer.start()
        self._pulse.start(when_over)

    def observes(self, model: nn.Module) -> bool:
        """Whether it is this one.

        Args:
            model: unwrapped.

        Returns:
            True or False.
        """
        return self._target.is_model(model)

    def close(self, timeout_s: float) -> None:
        """Remove the hooks, write what is queued, say goodbye.

        Args:
            timeout_s: how long the disk may take; what is left then is counted as dropped.
        """
        self.remove_hooks()
        self._send_scalars()
        self.writer.stop(timeout_s)
        self._ended = True
        self._pulse.stop(timeout_s)

    def remove_hooks(self) -> None:
        """Leave model, optimizer and autograd as they were."""
        self._boundary.remove()
        self._observer.remove()

    # ---- the step boundary -------------------------------------------------------------------------------------------

    def _before_step(self) -> None:
        """The optimizer has not changed the parameters yet."""
        if self._sampled:
            if self._probe is not None:
                self._ask_probe(self._probe)
            if self._observer.replays:
                self._replay_training()
            else:
                self._observe_training()
        self._in_optimizer = True

    def _after_backward(self) -> None:
        """A closure's pass is run again at once: once the closure returns, the parameters are other ones."""
        if self._in_optimizer and self._sampled and self._observer.replays:
            self._replay_training()
            if self._observed is not None:
                self._observed.grad_norm = None  # the closure may go on to clip: left to the end of the step

    def _ask_probe(self, probe: ProbeSampler) -> None:
        every = self._options.exact_alignment_every
        if every and self.step % every == 0:
            self._exact = probe.audit()
        if self._options.observe == "probe":
            self._observed = probe.observe()
            if self._observed is not None and self._observer.passes.micro_batches.count:
                self._observed.grad_norm = gradient_norm(self._target.optimizers)

    def _observe_training(self) -> None:
        """The gradients are accumulated and unscaled.

        A closure runs the passes inside the optimizer's step; then they are looked at when the step has ended.
        """
        capture = self._observer.observed
        if not self._observer.sampling or capture is None or capture.sample is None or not capture.activations:
            return
        observed = self._observed = ObservedPass(capture)  # kept whatever part of it fails below
        if self._options.gradients and not capture.gradients:
            self._faults.count(
                "no_gradients", "the observed forward pass had no backward pass (an evaluation with grad?)"
            )
        if self._observer.weight:
            observed.contaminated = self._target.contaminated
        self._complete(observed, capture.loss)

    def _replay_training(self) -> None:
        kept, self._observer.kept = self._observer.to_replay, None
        if kept is None:
            return  # counted where it was met, or looked for when the step has ended
        with self._observer.guard.silenced():
            observed = self._observer.replay.observe(kept)
        if observed is not None:
            self._observed = observed
            self._complete(observed, kept.loss)
            observed.capture.linears.clear()

    def _complete(self, observed: ObservedPass, loss: LossReading | None) -> None:
        """Add what is the same however the pass was observed."""
        if loss is not None:
            observed.loss, observed.gradient_scale = loss.loss, loss.scale
        observed.grad_norm = gradient_norm(self._target.optimizers)
        sample = observed.capture.sample
        if self._options.gradients and self._options.weight_alignment and sample is not None:
            batch_patches = observed.num_batch_patches or sample.num_batch_patches
            batch_patches *= max(1, self._observer.passes.micro_batches.count)
            observed.weight_space = reduce_layers(observed.capture, observed.contaminated, batch_patches)

    def _after_step(self) -> None:
        """One optimizer step is done: record it, then apply what was commanded, then begin the next."""
        self._in_optimizer = False
        try:
            self._record_step()
        finally:  # whatever could not be recorded, the steps go on being counted
            self._observed = self._exact = None
            self._observer.end_step()
            was_sampled, self.step = self._sampled, self.step + 1
            self._last_step_at = time.time()
            try:
                if was_sampled:
                    self.cadence.after_sampled(self.step - 1)
                self._phase.apply_pending(self._pulse, self.step)
            except Exception as error:  # the process group is gone, ...: the next boundary tries again
                self._faults.count("notes_unreadable", error)
            self._begin_step()
            self.meter.step()
            self._costs.step(sampled=was_sampled)

    def _record_step(self) -> None:
        capture = self._observer.capture
        # A closure runs its pass within the step: a newer one than was looked at before it.
        newer = capture is not None and self._observed is not None and capture is not self._observed.capture
        if not self._observer.replays and (self._observed is None or newer):
            self._observe_training()
        elif self._observed is not None and self._observed.grad_norm is None:
            self._observed.grad_norm = gradient_norm(self._target.optimizers)
        now = time.time()
        lr = learning_rate(self._target.optimizers[0])
        loss = self._observer.passes.loss
        self._num_tokens_seen += self._observer.num_tokens
        grad_norm = self._observed.grad_norm if self._observed is not None else None
        self._scalars.add(
            {
                "step": self.step,
                "lr": lr,
                "num_tokens_seen": self._num_tokens_seen,
                "phase": PHASES.index(self._phase.phase),
                "weight": self._phase.weight_in_force,
                "wall_time_s": now,
            },
            loss.loss if loss is not None else None,
            grad_norm,
        )
        if self._sampled:
            self._send_frame(now, lr)
        elif self._scalars.due:
            self._send_scalars()

    def _begin_step(self) -> None:
        self._sampled = self.cadence.is_sampled(self.step)
        sampling = self._sampled and self._options.observe == "training"
        self._observer.begin_step(sampling=sampling, weight=self._phase.weight_in_force)

    def _send_frame(self, now: float, lr: float) -> None:
        self._send_scalars()  # first: the controller relies on every step up to a frame's being there
        if self._observed is None:
            if self._options.observe == "probe":
                return  # why there is no probe has been counted where it was met
            count_reason(self._observer, self._faults)
            return
        slot = self._ring.acquire()
        if slot is None:
            self.writer.drop()
            self._faults.count("ring_full", "the store is slower than the samples: frames are dropped")
            return
        record = StepRecord(
            attempt=self.attempt,
            step=self.step,
            phase=self._phase.phase,
            weight=self._phase.weight_in_force,
            wall_time_s=now,
            num_tokens_seen=self._num_tokens_seen,
            lr=lr,
        )
        self._observed.exact_alignment = self._exact
        self._submit_frame(self._observed, record, slot)

    def _submit_frame(self, observed: ObservedPass, record: StepRecord, slot: Slot) -> None:
        try:
            job = self._assembler.assemble(observed, record, slot)
        except Exception:
            self._ring.release(slot)
            self.writer.drop()
            raise  # counted by the hook's guard
        self.writer.submit(job)

    def _send_scalars(self) -> None:
        if (job := self._scalars.take_job()) is not None:
            self.writer.submit(job)

    # ---- the heartbeat -----------------------------------------------------------------------------------------------

    def _heartbeat(self) -> dict[str, Any]:
        return {
            "state": "ended" if self._ended else "running",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "boot_id": _boot_id(),
            "attempt": self.attempt,
            "rank": self._rank,
            "step": self.step,
            "phase": self._phase.phase,
            "weight": self._phase.weight,
            "steer": self._options.steer,
            "every": self.cadence.every,
            "last_step_at": self._last_step_at,
            "frames_committed": self.writer.committed,
            "frames_dropped": self.writer.dropped,
            "faults": self._faults.snapshot(),
            **self._overhead(),
        }

    def _overhead(self) -> dict[str, Any]:
        stated, real = self.overhead(), self.overhead("wall")
        return {
            "overhead_percent": stated.percent,
            "overhead_error_percent": stated.error_percent,
            "overhead_samples": stated.num_pairs,
            "overhead_source": stated.source,
            "overhead_wall_percent": real.percent if real.num_pairs else None,
            "overhead_wall_error_percent": real.error_percent,
        }


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
