"""One attachment, from `attach` to `detach`: what happens at each optimizer-step boundary."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_hooks.frame import FrameAssembler, ObservedPass, StepRecord
from entropy_hooks.host import Ring
from entropy_hooks.meter import Meter
from entropy_hooks.observer import Observer
from entropy_hooks.optimizer_figures import gradient_norm, learning_rate
from entropy_hooks.probe_sampler import ProbeSampler
from entropy_hooks.pulse import Pulse
from entropy_hooks.scalars import ScalarsBatch
from entropy_hooks.weight_space import reduce_layers
from entropy_hooks.writer import Writer
from entropy_monitor.types import PHASES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from entropy_hooks.faults import Faults
    from entropy_hooks.host import Slot
    from entropy_hooks.phase import PhaseControl
    from entropy_monitor.config import MonitorOptions
    from entropy_monitor.store import Run


@dataclass(frozen=True, slots=True)
class Target:
    """What is observed and steered."""

    model: nn.Module
    """The user's module, unwrapped."""
    optimizer: Optimizer
    taps: Mapping[str, nn.Module]
    steered: tuple[str, ...]
    probe: Callable[[nn.Module], torch.Tensor] | None
    """The user's function that runs the model on a fixed batch and returns its loss."""

    @property
    def contaminated(self) -> frozenset[str]:
        """Layers at or before the last steered one: while steering, their loss gradient holds injected terms."""
        names = tuple(self.taps)
        return frozenset(names[: 1 + max(names.index(name) for name in self.steered)])


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
        self._ring = Ring()
        self._scalars = ScalarsBatch(self._ring)
        self._assembler = FrameAssembler(options, tuple(target.taps), self._ring, faults)
        self._sampled = False
        """The step under way is sampled."""
        self._observed: ObservedPass | None = None
        self._exact: torch.Tensor | None = None
        """This step's exact alignment, if it is audited."""
        self.writer = Writer(run.objects, self._rank, self.attempt, options.keep, self._ring, faults)
        self._pulse = Pulse(run, self._rank, steer=options.steer, fields=self._heartbeat, faults=faults)
        self._observer = Observer(target.model, target.taps, target.steered, options, faults, self.meter)
        self._probe: ProbeSampler | None = None
        if options.exact_alignment_every or options.observe == "probe":
            self._probe = ProbeSampler(target, self._observer, options, faults)
        self._handles: list[RemovableHandle] = [
            target.optimizer.register_step_pre_hook(self._guard(self._before_step)),
            target.optimizer.register_step_post_hook(self._guard(self._after_step)),
        ]

    def start(self) -> None:
        """Start the threads, and sample the first step if it is due."""
        self._begin_step()
        self.writer.start()
        self._pulse.start()

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
        for handle in self._handles:
            handle.remove()
        self._observer.remove()

    def _guard(self, hook: Callable[[], None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            with self.meter:
                try:
                    hook()
                except Exception as error:
                    self._faults.count("hook_error", error)

        return guarded

    # ---- the step boundary -------------------------------------------------------------------------------------------

    def _before_step(self) -> None:
        """The optimizer has not changed the parameters yet."""
        if self._sampled:
            if self._probe is not None:
                self._ask_probe(self._probe)
            self._observe_training()

    def _ask_probe(self, probe: ProbeSampler) -> None:
        every = self._options.exact_alignment_every
        if every and self.step % every == 0:
            self._exact = probe.audit()
        if self._options.observe == "probe":
            self._observed = probe.observe()
            if self._observed is not None and self._observer.passes.count:
                self._observed.grad_norm = gradient_norm(self._target.optimizer)

    def _observe_training(self) -> None:
        """The gradients are accumulated and unscaled.

        A closure runs the passes inside the optimizer's step; then they are looked at when the step has ended.
        """
        capture = self._observer.capture
        if not self._observer.sampling or capture is None or capture.sample is None or not capture.activations:
            return
        observed = self._observed = ObservedPass(capture)  # kept whatever part of it fails below
        if self._options.gradients and not capture.gradients:
            self._faults.count(
                "no_gradients", "the observed forward pass had no backward pass (an evaluation with grad?)"
            )
        if self._observer.weight:
            observed.contaminated = self._target.contaminated
        if (loss := capture.loss) is not None:
            observed.loss, observed.gradient_scale = loss.loss, loss.scale
        observed.grad_norm = gradient_norm(self._target.optimizer)
        if self._options.gradients and self._options.weight_alignment:
            batch_patches = capture.sample.num_batch_patches * max(1, self._observer.passes.count)
            observed.weight_space = reduce_layers(capture, observed.contaminated, batch_patches)

    def _after_step(self) -> None:
        """One optimizer step is done: record it, then apply what was commanded, then begin the next."""
        try:
            self._record_step()
        finally:  # whatever could not be recorded, the steps go on being counted
            self._observed = self._exact = None
            self._observer.end_step()
            self.step += 1
            self._last_step_at = time.time()
            self.meter.step()
            self._phase.apply_pending(self._pulse, self.step)
            self._begin_step()

    def _record_step(self) -> None:
        capture = self._observer.capture
        # A closure runs its pass within the step: a newer one than was looked at before it.
        if self._observed is None or (capture is not None and capture is not self._observed.capture):
            self._observe_training()
        elif self._observed.grad_norm is None:
            self._observed.grad_norm = gradient_norm(self._target.optimizer)
        now = time.time()
        lr = learning_rate(self._target.optimizer)
        loss = self._observer.loss
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
        self._sampled = self.step % self._options.every == 0
        self._observer.sampling = self._sampled and self._options.observe == "training"
        self._observer.weight = self._phase.weight_in_force

    def _send_frame(self, now: float, lr: float) -> None:
        self._send_scalars()  # first: the controller relies on every step up to a frame's being there
        if self._observed is None:
            if self._options.observe == "probe":
                return  # why there is no probe has been counted where it was met
            capture = self._observer.capture
            if capture is None or not capture.too_short:  # so has a short batch
                self._faults.count("not_observed", "no tapped layer ran in this step (compiled, or not this model)")
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
            "every": self._options.every,
            "last_step_at": self._last_step_at,
            "frames_committed": self.writer.committed,
            "frames_dropped": self.writer.dropped,
            "faults": self._faults.snapshot(),
            "overhead_percent": self.meter.overhead_percent,
        }


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
