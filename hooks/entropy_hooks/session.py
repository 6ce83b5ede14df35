"""One attachment, from `attach` to `detach`: what happens at each optimizer-step boundary."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any

import torch

from entropy_hooks import backward
from entropy_hooks.budget import Cadence
from entropy_hooks.cost import Overhead, StepCosts, host_clocks, overhead
from entropy_hooks.ending import Ending
from entropy_hooks.frame import FrameAssembler, StepRecord
from entropy_hooks.heartbeat import overhead_fields, process_fields
from entropy_hooks.host import Ring
from entropy_hooks.meter import Meter
from entropy_hooks.observation import Observation
from entropy_hooks.observer import Observer
from entropy_hooks.optimizer_figures import learning_rate
from entropy_hooks.placed import remove_lost
from entropy_hooks.pulse import Pulse
from entropy_hooks.ranks import rank_and_world_size
from entropy_hooks.scalars import ScalarsBatch
from entropy_hooks.shared_notes import share_notes
from entropy_hooks.step_boundary import StepBoundary
from entropy_hooks.unobserved import count_reason
from entropy_hooks.unstepped import Unstepped
from entropy_hooks.writer import Writer
from entropy_monitor.types import PHASES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from entropy_hooks.cost import Clock
    from entropy_hooks.faults import Faults
    from entropy_hooks.frame import ObservedPass
    from entropy_hooks.host import Slot
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
        self.writer = Writer(run.objects, self._rank, self.attempt, options.keep, self._ring, faults)
        ranks = (self.attempt, self._rank, rank_and_world_size()[1])
        self._ending = Ending(target, faults)
        self._pulse = Pulse(
            run, ranks, steer=options.steer, fields=self._heartbeat, is_over=self._ending.is_over, faults=faults
        )
        self._observer = Observer(target, options, faults, self.meter)
        self._observation = Observation(target, self._observer, options, faults)
        self._unstepped = Unstepped(target, faults)
        run_guarded = self._observer.guard.run
        before, after = (functools.partial(run_guarded, act) for act in (self._before_step, self._after_step))
        with contextlib.ExitStack() as undo:  # an optimizer may refuse its hooks
            undo.callback(self._observer.remove)
            undo.callback(remove_lost, target.optimizers, target.model)
            self._boundary = StepBoundary(target, before, after)
            undo.pop_all()
        self._observer.passes.on_forward = self._boundary.begin_forward
        self._observer.on_backward = self._after_backward
        backward.listen(self._ending)

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

    @property
    def is_over(self) -> bool:
        """Its optimizers are gone: whoever trains the model now does so with others."""
        return self._target.is_gone

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
        backward.unlisten(self._ending)
        self._boundary.remove()
        self._observer.remove()

    # ---- the step boundary -------------------------------------------------------------------------------------------

    def _before_step(self) -> None:
        """The optimizer has not changed the parameters yet."""
        self._observation.begin_optimizer(self.step, sampled=self._sampled)

    def _after_backward(self) -> None:
        """A backward pass of the model has ended."""
        self._observation.after_backward(sampled=self._sampled)
        self._unstepped.after_backward(self._observer.passes.micro_batches.count)

    def _after_step(self) -> None:
        """One optimizer step is done: record it, then apply what was commanded, then begin the next."""
        self._observation.end_optimizer()
        try:
            self._record_step()
        finally:  # whatever could not be recorded, the steps go on being counted
            self._observation.forget()
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
        self._observation.complete()
        now = time.time()
        lr = learning_rate(self._target.optimizers[0])
        loss = self._observer.passes.loss
        self._num_tokens_seen += self._observer.num_tokens
        observed = self._observation.observed
        grad_norm = observed.grad_norm if observed is not None else None
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
        observed = self._observation.observed
        if observed is None:
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
        observed.exact_alignment = self._observation.exact
        self._submit_frame(observed, record, slot)

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
            **process_fields(),
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
            **overhead_fields(self.overhead(), self.overhead("wall")),
        }
