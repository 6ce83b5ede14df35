"""Forward and gradient hooks of one model: what is gathered in the observed pass, and where steering is added.

A layer's hook costs one flag test on a step that is neither sampled nor steered. No hook raises, synchronises a device
or touches the global random state.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import unserializable_hook

from entropy_hooks.capture import Capture, LinearSample
from entropy_hooks.eagerly import run_eagerly
from entropy_hooks.guard import Guard
from entropy_hooks.passes import Passes
from entropy_hooks.replay import Replay
from entropy_hooks.steering import Steering
from entropy_hooks.taps import first_embedding, first_tensor
from entropy_hooks.tokens import PatchSampler, axes_of, too_short
from entropy_hooks.weight_space import linear_sample, writes_features

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from entropy_hooks.faults import Faults
    from entropy_hooks.kept import Kept
    from entropy_hooks.meter import Meter
    from entropy_hooks.passes import Pass
    from entropy_hooks.target import Target
    from entropy_hooks.tokens import TokenAxes
    from entropy_monitor.config import MonitorOptions


class Observer:
    """Hooks on one model; `Session` tells it which steps to sample and whether to steer."""

    def __init__(self, target: Target, options: MonitorOptions, faults: Faults, meter: Meter) -> None:
        self._options, self._faults = options, faults
        self._sampler = PatchSampler(options.patches)
        self._steering = Steering(target.steered, options.loss_scale, faults)
        self.guard = Guard(faults, meter)
        self.sampling = False
        """This step is sampled."""
        self.capture: Capture | None = None
        """The newest observed pass of this step that had its backward pass, or is having it."""
        self.num_tokens = 0
        """Tokens of the forward passes since the last optimizer step; 0 without an embedding."""
        self.on_inputs: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None
        """Is called with the model's arguments at each training forward pass."""
        self.on_backward: Callable[[], None] | None = None
        """Is called when a backward pass of the model has ended."""
        self._eagerly = contextlib.ExitStack()
        """Holds while a compiled model is made to run eagerly, so that it can be steered."""
        self._hooked: set[str] = set()
        self._running: dict[str, dict[int, LinearSample]] = {}
        self._handles: list[RemovableHandle] = []
        self._linear_handles: dict[tuple[str, int], RemovableHandle] = {}
        """By layer and the id of the linear module."""
        self._has_tokens = first_embedding(target.model) is not None
        self.replay = Replay(target, options, self._sampler, self.guard.run, faults)
        self.kept: Kept | None = None
        """The newest kept pass of this step that had its backward pass, or is having it."""
        with contextlib.ExitStack() as undo:  # a module may refuse its hook
            undo.callback(self.guard.release)
            self.passes = Passes(target, self, self.guard, faults)
            undo.callback(self.passes.remove)
            self._micro = self.passes.micro_batches
            if not self.passes.compiled or options.steer:
                self._install(target)
            undo.pop_all()

    # ---- installation ------------------------------------------------------------------------------------------------

    def _install(self, target: Target) -> None:
        add = self._handles.append
        self.passes.open_parts()
        if (embedding := first_embedding(target.model)) is not None:
            see_tokens = self.guard(self._see_tokens, always=True).on(embedding)
            add(embedding.register_forward_pre_hook(see_tokens))
        for name, module in target.taps.items():
            add(module.register_forward_hook(self.guard(functools.partial(self._see_output, name)).on(module)))
            if self._options.gradients and self._options.weight_alignment and self._options.observe == "training":
                for inner in module.modules():
                    if writes_features(inner) is not None:
                        hook = self.guard(functools.partial(self._see_linear, name))
                        self._linear_handles[name, id(inner)] = inner.register_forward_hook(hook.on(inner))
        self.passes.close_parts()

    def remove(self) -> None:
        """Take every hook away; the model's dictionaries are as they were."""
        self.passes.remove()
        for handle in (*self._handles, *self._linear_handles.values()):
            handle.remove()
        self._handles.clear()
        self._linear_handles.clear()
        self.guard.release()
        self._eagerly.close()
        self.capture = self.kept = None

    # ---- steps and passes --------------------------------------------------------------------------------------------

    def begin_step(self, *, sampling: bool, weight: float) -> None:
        """An optimizer step begins.

        Args:
            sampling: its training pass is observed.
            weight: of the MBE that is added to its loss.
        """
        self.sampling, self._steering.weight = sampling, weight
        self.guard.transformed = False
        # A compiled model is observed by its replay; steered, it runs eagerly and its own hooks see it.
        self.guard.active = weight > 0 or (sampling and not self.passes.compiled)

    @property
    def weight(self) -> float:
        """Weight of the MBE in force; 0 while the phase is memorize."""
        return self._steering.weight

    @property
    def observed(self) -> Capture | None:
        """The pass that led to this step: the newest that had its backward pass, else the newest forward pass."""
        return self.capture or self._forward

    @property
    def _forward(self) -> Capture | None:
        current = self.passes.current
        return None if current is None or current.consumed else current.capture

    @property
    def to_replay(self) -> Kept | None:
        """The pass to run again: the newest that had its backward pass, else the newest forward pass."""
        current = self.passes.current
        return self.kept or (None if current is None or current.consumed else current.kept)

    @property
    def replays(self) -> bool:
        """The step under way is observed by running a part of it again."""
        return self.sampling and not self.guard.active

    def begin_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `passes.PassListener`."""
        if self.passes.compiled:
            self._enter_compiled(args, kwargs)
        if self.on_inputs is not None:  # last: it meets classes of the user's, and must not cost the frame
            self.on_inputs(args, kwargs)

    def _enter_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._eagerly.close()  # a pass that raised may have left it open
        if self.weight:
            self._eagerly.enter_context(run_eagerly())
        elif self._has_tokens:
            ids = first_tensor(args) if args else first_tensor(kwargs)
            if ids is not None and not ids.is_floating_point():
                self.num_tokens += ids.numel()
        if self.replays and self._micro.is_last() and self.passes.current is not None:
            self.passes.current.kept = self.replay.keep_inputs(args, kwargs)

    def end_forward(self, output: Any) -> None:
        """See `passes.PassListener`."""
        self._eagerly.close()
        seen = self.passes.current
        if self._micro.in_forward and seen is not None and (kept := seen.kept) is not None and output is not None:
            self.replay.keep_output(kept, output, lambda: self.passes.reach(seen) and seen.kept is self.kept)

    def begin_pass(self) -> None:
        """See `passes.PassListener`."""
        self._hooked.clear()
        self._running.clear()
        if self.sampling and self.guard.active and self._micro.is_last() and self.passes.current is not None:
            self.passes.current.capture = Capture()

    def begin_backward(self, seen: Pass) -> None:
        """See `passes.PassListener`."""
        if seen.capture is not None:
            self.capture = seen.capture
            self.capture.loss = self.passes.loss
        if seen.kept is not None:
            self.kept = seen.kept
            self.kept.begin_backward(self.passes.roots, self.passes.loss)

    def end_backward(self) -> None:
        """See `passes.PassListener`."""
        if self.on_backward is not None:
            self.on_backward()

    def end_step(self) -> None:
        """Forget the step that has ended."""
        if self.capture is not None and self.capture.linears:
            self._keep_only_last_linears(self.capture)
        self.capture = self.kept = None
        self.num_tokens = 0
        self.passes.end_step()

    def _keep_only_last_linears(self, capture: Capture) -> None:
        """After the first observed pass it is known which linear layer writes into each block: unhook the others."""
        last = {(name, id(linear.module)) for name, linear in capture.linears.items()}
        # A block that was skipped in this pass (layer dropout) has yet to show which of its layers it is.
        for key in [key for key in self._linear_handles if key[0] in capture.linears and key not in last]:
            self._linear_handles.pop(key).remove()

    # ---- observation -------------------------------------------------------------------------------------------------

    def _capturing(self) -> Capture | None:
        if self._micro.in_forward:
            self.passes.begin_if_consumed()
        return self._forward if self.sampling and self._micro.in_forward and self._micro.is_last() else None

    def _see_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._micro.in_forward and args and isinstance(args[0], torch.Tensor):
            self.num_tokens += args[0].numel()
            if (capture := self._capturing()) is not None and capture.token_ids is None:
                capture.token_ids = args[0].detach().clone()  # a loader may reuse its buffer before the step

    def _see_linear(self, layer: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        capture, seen = self._capturing(), self.passes.current
        if capture is None or seen is None or (linear := linear_sample(module, args, output)) is None:
            return
        self._running.setdefault(layer, {})[output.shape[-1]] = linear
        if output.requires_grad:  # hooked now: by the end of the block it may have been written into in place
            store = functools.partial(setattr, linear, "output_gradient")
            output.register_hook(self._recorder(seen, layer, lambda: capture.linears.get(layer) is linear, store))

    def _see_output(self, layer: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        z = first_tensor(output)
        recomputed = not self._micro.in_forward and self._micro.in_backward
        if z is None or not (self._micro.in_forward or recomputed):
            return
        axes = axes_of(module, z, self._options.token_dim)
        if axes is None or not z.is_floating_point() or hasattr(z, "placements"):
            if self.sampling:
                self._faults.count("no_tokens", f"{layer}: expected [B, T, d]; found {z.dtype} {list(z.shape)}")
            return
        if not recomputed:
            self._sample_activation(layer, z, axes)
        # Reentrant checkpointing runs the forward without gradients and hooks count only when it is run again; the
        # other kind has been hooked before, and its second run is not looked at.
        seen = self.passes.newest if recomputed else self.passes.current
        if seen is not None and z.requires_grad and not (recomputed and layer in self._hooked):
            self._hooked.add(layer)
            self._hook_gradient(layer, z, seen)
            self._steering.steer(layer, z, axes, functools.partial(self.passes.first_loss, seen))

    def _sample_activation(self, layer: str, z: torch.Tensor, axes: TokenAxes) -> None:
        capture = self._capturing()
        if capture is None or capture.too_short:
            return
        sequences = axes.sequences(z.detach())
        if capture.sample is None:
            num_sequences, length, _ = sequences.shape
            capture.sample = self._sampler.draw(num_sequences, length, z.device)
        if capture.sample is None:
            capture.too_short = True
            self._faults.count("batch_too_short", too_short(layer, *sequences.shape[:2]))
            return
        linear = self._running.pop(layer, {}).get(z.shape[-1])
        same_shape = linear is not None and linear.output_shape == z.shape
        capture.add(layer, axes, sequences, linear if same_shape else None, self._faults)

    def _hook_gradient(self, layer: str, z: torch.Tensor, seen: Pass) -> None:
        capture = seen.capture
        # A pass behind the captured one (the number of micro-batches has changed) must not overwrite its gradients.
        if not self._options.gradients or capture is None or not self._micro.is_last():
            return
        if (sampled := capture.activations.get(layer)) is None:
            return
        # A layer that runs twice is observed in its last run.
        store = functools.partial(capture.gradients.__setitem__, layer)
        z.register_hook(self._recorder(seen, layer, lambda: capture.activations.get(layer) is sampled, store))

    def _recorder(
        self, seen: Pass, layer: str, wanted: Callable[[], bool], store: Callable[[torch.Tensor], None]
    ) -> Callable[[torch.Tensor], None]:
        total: torch.Tensor | None = None

        def record(gradient: torch.Tensor) -> None:
            nonlocal total
            capture = seen.capture
            if not self.passes.reach(seen) or capture is None or capture is not self.capture:
                return  # `torch.autograd.grad`, or the graph of an older pass
            if capture.sample is not None and wanted():
                selected = capture.sample.select(capture.axes[layer].sequences(gradient.detach()))
                total = selected if total is None else total + selected  # a second backward pass adds to the first
                store(total)

        # Who saves this activation is not warned of our hook on it.
        return unserializable_hook(functools.partial(self.guard.run, record))
