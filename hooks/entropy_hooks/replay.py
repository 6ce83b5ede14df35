"""Observing a compiled model: the step's own batch once more, eagerly, a few of its sequences, in a twin of the model.

The compiled graph is left alone, so that training stays bit-identical: hooks inside would change how it is fused, and
running whole steps eagerly changes the last bits of every step that follows. What the true backward pass gave to the
model's output is given to the twin's, so that the layers' gradients are those of the user's own loss, whatever it is.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from entropy_hooks.agreement import agreement, few
from entropy_hooks.entries import Entries
from entropy_hooks.frame import ObservedPass
from entropy_hooks.gather import Gathering
from entropy_hooks.outputs import left_in, relations
from entropy_hooks.part import Parts, batch_of
from entropy_hooks.structures import tensors_in
from entropy_hooks.twin import Twin, Writes, hooks_everywhere, make_twin
from entropy_hooks.undisturbed import AutocastState, as_in_training, is_sharded
from entropy_hooks.untouched import ModelReachedError, untouched
from entropy_hooks.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from entropy_hooks.capture import Capture
    from entropy_hooks.faults import Faults
    from entropy_hooks.loss import LossReading
    from entropy_hooks.part import Part
    from entropy_hooks.target import Target
    from entropy_hooks.tokens import PatchSampler
    from entropy_monitor.config import MonitorOptions

_BEHIND_A_BREAK = (
    "expected a compiled model to return nothing from which it computes more both in that graph and behind it; found "
    "such an output (a graph break, or a view of it is returned too)"
)
_NO_GRADIENT = "expected a backward pass to reach what a compiled model has returned; found none (written to in place?)"
_ENTERS_ELSEWHERE = (
    "expected the loss to be computed from what a compiled model returns or leaves in attributes; found that it also "
    "uses what lies within (handed out by a hook, a gradient penalty?)"
)


@dataclass(slots=True, weakref_slot=True)
class Kept:
    """What is kept of one compiled pass, to run it again before the optimizer steps."""

    twin: Twin
    writes: Writes
    autocast: AutocastState
    part: Part | None = None
    """Sequences that are run again; None runs the whole batch."""
    spare: Twin | None = None
    """For the whole batch, until it is known that a part can be run."""
    comparable: bool = True
    """The outputs below are of what is run again."""
    outputs: list[torch.Tensor | None] = field(default_factory=list["torch.Tensor | None"])
    """A few entries of each output that has a gradient."""
    gradients: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    """What the backward pass gave to each output; of a part, at its rows."""
    behind: dict[int, frozenset[int]] = field(default_factory=dict[int, frozenset[int]])
    """For an output of which others were computed, these: its gradient holds what came by them."""
    entries: Entries = field(default_factory=Entries)
    unclear: str | None = None
    """Why the gradients of the layers cannot be told from those of the outputs."""
    left: dict[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])
    """What lay in attributes before the pass."""
    new: list[str] = field(default_factory=list[str])
    """Where the pass has left results in attributes: they are the last of its outputs."""
    loss: LossReading | None = None
    """Of its backward pass."""

    def begin_backward(self, roots: tuple[Any, ...], loss: LossReading | None) -> None:
        """Its backward pass has come.

        Args:
            roots: where that began.
            loss: what they say.
        """
        self.loss = loss
        if not self.entries.are_all_of(roots):
            self.unclear = _ENTERS_ELSEWHERE


class Replay:
    """Keeps passes on their way through the compiled model, and runs one again before the optimizer steps."""

    def __init__(self, target: Target, options: MonitorOptions, sampler: PatchSampler, faults: Faults) -> None:
        self._target, self._options, self._sampler, self._faults = target, options, sampler, faults
        self._written: set[str] | None = None
        """Parameters that the model's own code writes to; None until that has been looked into."""
        self._parts = Parts(sampler, options.token_dim)
        self._unfit: str | None = None
        """Why no pass of this model will be run again."""

    def keep_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kept | None:
        """The model is about to run on these.

        Returns:
            What has been kept; None where the pass cannot be observed.
        """
        model = self._target.model
        if self._unfit is not None:
            self._tell(self._unfit)
            return None
        if is_sharded(model):
            self._tell("a model that is compiled; found one that is also sharded, which no rank can run by itself")
            return None
        if hooks_everywhere():
            self._tell("no global module hooks beside a compiled model; found some, which a replay would call again")
            return None
        writes = Writes(model, thorough=self._written is None)
        try:
            twin = make_twin(model, self._target.taps, args, kwargs, self._written or ())
        except Exception as error:  # whatever the user's own classes do when they are copied
            self._tell(f"a compiled model that copy.deepcopy can copy; found {type(error).__name__}: {error}")
            return None
        tensors, _ = tensors_in((args, kwargs))
        device = next((tensor.device for tensor in (*tensors, *model.parameters())), torch.device("cpu"))
        return Kept(twin, writes, AutocastState.now(device.type), left=left_in(model))

    def keep_output(self, kept: Kept, output: Any, accept: Callable[[], bool]) -> None:
        """The model has run.

        Args:
            kept: of the beginning of this pass.
            output: what it returned.
            accept: tells, when a gradient comes, whether it is that of this pass's own backward pass.
        """
        kept.writes.look_again(self._target.model)
        leaves, _ = tensors_in(output)
        left = left_in(self._target.model)
        left = {name: tensor for name, tensor in left.items() if tensor is not kept.left.get(name)}
        kept.left, kept.new = {}, list(left)
        num_returned = len(leaves)
        leaves = [*leaves, *left.values()]
        # What has no history of its own (a parameter) would keep the hook for ever.
        present = {index: leaf for index, leaf in enumerate(leaves) if leaf.grad_fn is not None}
        returned = [leaf for index, leaf in present.items() if index < num_returned]
        part = kept.part = self._parts.draw(kept.twin, list(present.values()), returned)
        if part is not None and not self._parts.proven:
            twin = kept.twin
            kept.spare = make_twin(twin.model, twin.taps, twin.args, twin.kwargs, self._written or ())
        rows = None if part is None else part.rows
        kept.outputs = [few(leaf, rows) if index in present else None for index, leaf in enumerate(leaves)]
        kept.entries.close(present.values())
        numbers, related = list(present), relations(list(present.values()))
        kept.unclear = _BEHIND_A_BREAK if related.unclear else None
        for number, (index, leaf) in enumerate(present.items()):
            if related.behind[number]:
                kept.behind[index] = frozenset(numbers[other] for other in related.behind[number])
            if number not in related.repeated and leaf.grad_fn is not None:  # else its gradient is told already
                # Of the node, not of the tensor: it is called behind all hooks of the user's on that.
                leaf.grad_fn.register_prehook(self._recorder(kept, index, leaf.output_nr, accept))

    def observe(self, kept: Kept) -> ObservedPass | None:
        """Run a kept pass again, and observe it.

        Returns:
            The pass, or None where it cannot be observed.
        """
        if not any(entries is not None for entries in kept.outputs):
            self._tell("a compiled model that returns a tensor with a gradient; found none in its output")
            return None
        known, self._written = self._written or set[str](), self._written or set()
        if written := kept.writes.found() - known:
            self._written |= written
            self._tell(f"parameters that forward leaves alone; found {min(written)} written to: the next is observed")
            return None
        try:
            return self._again(kept)
        except ModelReachedError as error:
            self._unfit = f"a compiled model that a copy of it leaves alone; found that {error}"
            self._tell(self._unfit)
        except Exception as error:
            if kept.part is not None:
                return self._as_a_whole(kept, error)
            self._tell(f"a compiled model that also runs eagerly; found {type(error).__name__}: {error}")
        return None

    def _as_a_whole(self, kept: Kept, error: Exception) -> ObservedPass | None:
        """A part could not be run: its gradients do not tell those of the whole batch, but there is a spare twin."""
        self._parts.possible = False
        self._faults.count(
            "replay_differs",
            f"expected some sequences of a compiled batch to run by themselves; found {type(error).__name__}: {error}: "
            "gradients and alignment of that step are undetermined; from now on whole batches are run",
        )
        if kept.spare is None:
            return None
        return self.observe(replace(kept, twin=kept.spare, spare=None, part=None, gradients={}, comparable=False))

    def _again(self, kept: Kept) -> ObservedPass | None:
        gathering = Gathering(self._sampler.draw, self._faults, weights=False)
        capture = gathering.capture
        with untouched(self._target.model), as_in_training(kept.twin.model, kept.autocast):
            outputs = self._run(kept, gathering)
            if capture.sample is None:
                self._parts.possible = False  # the whole batch may hold a patch
                return None  # counted by who looked at the layers
            self._parts.learn(capture.sample, kept.part, batch_of(kept.twin))
            if not kept.comparable:
                return ObservedPass(capture)
            agrees = agreement(outputs, kept.outputs, None if kept.part is None else len(kept.part.rows))
            if self._options.gradients and len(outputs) == len(kept.outputs):
                self._differentiate(kept, outputs, gathering)
        return self._observed(kept, capture, agrees)

    def _run(self, kept: Kept, gathering: Gathering) -> list[torch.Tensor]:
        twin = kept.twin
        args, kwargs = twin.args, twin.kwargs
        if kept.part is not None:
            args, kwargs = kept.part.of((args, kwargs))
        watch = Watch(twin.model, twin.taps, self._options.token_dim, gathering.see, self._faults)
        try:
            outputs, _ = tensors_in(twin.model(*args, **kwargs))
        finally:
            watch.remove()
        gathering.capture.token_ids = watch.token_ids
        left = left_in(twin.model) if kept.new else {}
        return [*outputs, *(left.get(name, torch.empty(0)) for name in kept.new)]

    def _differentiate(self, kept: Kept, outputs: Sequence[torch.Tensor], gathering: Gathering) -> None:
        told = {index: gradient for index, gradient in kept.gradients.items() if outputs[index].grad_fn is not None}
        if unclear := kept.unclear or (None if told else _NO_GRADIENT) or _differs(kept.behind, told, outputs):
            self._faults.count("no_gradients", f"{unclear}: its layers' gradients are undetermined")
            return
        totals = [outputs[index] for index in told if index in kept.behind]
        gathering.differentiate([outputs[index] for index in told], list(told.values()), totals)

    def _observed(self, kept: Kept, capture: Capture, agrees: torch.Tensor) -> ObservedPass:
        sample = capture.sample
        assert sample is not None
        # Another dropout mask, or sequences that depend on one another: undetermined.
        capture.gradients.update({k: torch.where(agrees, g, torch.nan) for k, g in capture.gradients.items()})
        return ObservedPass(
            capture,
            agrees=agrees,
            on_disagreement=self._disagreed,
            num_batch_patches=sample.num_batch_patches if kept.part is None else kept.part.patches_of_batch(sample),
        )

    def _recorder(
        self, kept: Kept, index: int, at: int, accept: Callable[[], bool]
    ) -> Callable[[tuple[torch.Tensor | None, ...]], None]:
        reference = weakref.ref(kept)  # an output that the user collects holds no twin

        def record(gradients: tuple[torch.Tensor | None, ...]) -> None:
            try:
                kept, gradient = reference(), gradients[at]
                if kept is not None and gradient is not None and accept():
                    gradient = gradient.detach()
                    kept.gradients[index] = gradient if kept.part is None else kept.part.of(gradient)
            except Exception as error:
                self._faults.count("hook_error", error)

        return record

    def _tell(self, expected_and_found: str) -> None:
        self._faults.count("not_observed", f"expected {expected_and_found} (or give observe='probe')")

    def _disagreed(self) -> None:
        """Called by the writer, once it is known."""
        self._parts.possible = False
        self._faults.count(
            "replay_differs",
            "expected the same output when a compiled batch is run again eagerly; found another (dropout, sequences "
            "that depend on one another?): gradients and alignment of that step are undetermined; from now on whole "
            "batches are run",
        )


def _differs(behind: dict[int, frozenset[int]], told: Collection[int], outputs: Sequence[torch.Tensor]) -> str | None:
    """In the replay, which has no compiled graphs, all is seen of how outputs depend on one another.

    Args:
        behind: what training's graph showed of it.
        told: outputs whose gradients are known.
        outputs: of the replay.

    Returns:
        What was not seen where it had to be.
    """
    if not behind.keys() & told:
        return None
    numbers = list(told)
    again = relations([outputs[index] for index in numbers])
    for index, others in zip(numbers, again.behind, strict=True):
        if index in behind and not {numbers[other] for other in others} <= behind[index]:
            return _BEHIND_A_BREAK
    return None
