"""Observing a compiled model: the step's own batch once more, eagerly, a few of its sequences, in a twin of the model.

The compiled graph is left alone, so that training stays bit-identical: hooks inside would change how it is fused, and
running whole steps eagerly changes the last bits of every step that follows. What the true backward pass gave to the
model's output is given to the twin's, so that the layers' gradients are those of the user's own loss, whatever it is.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from entropy_hooks.agreement import agreement, few
from entropy_hooks.contained import ReachedOutError
from entropy_hooks.fitness import Fitness
from entropy_hooks.frame import ObservedPass
from entropy_hooks.kept import Kept
from entropy_hooks.outputs import left_in, relations
from entropy_hooks.part import Parts, batch_of
from entropy_hooks.rerun import BEHIND_A_BREAK, Rerun
from entropy_hooks.structures import tensors_in
from entropy_hooks.surroundings import Surroundings
from entropy_hooks.twin import EndsWithItselfError, make_twin
from entropy_hooks.undisturbed import AutocastState, as_in_training
from entropy_hooks.untouched import untouched
from entropy_hooks.user_hooks import user_hooked
from entropy_hooks.writes import Writes

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import nn

    from entropy_hooks.capture import Capture
    from entropy_hooks.faults import Faults
    from entropy_hooks.target import Target
    from entropy_hooks.tokens import PatchSampler
    from entropy_hooks.twin import Twin
    from entropy_monitor.config import MonitorOptions

_USER_HOOKED = "expected a compiled model without hooks of the user's, which may change gradients; found one on {}"
_SLOW_S = 0.25
_SLOW_COPIES = 3
"""In a row."""


class Replay:
    """Keeps passes on their way through the compiled model, and runs one again before the optimizer steps."""

    def __init__(
        self,
        target: Target,
        options: MonitorOptions,
        sampler: PatchSampler,
        run_guarded: Callable[..., None],
        faults: Faults,
    ) -> None:
        self._target, self._options, self._sampler, self._faults = target, options, sampler, faults
        self._run_guarded = run_guarded
        self._fitness = Fitness(faults)
        self._parts = Parts(sampler, options.token_dim)
        self._surroundings: Surroundings | None = None
        self._num_slow = 0

    def keep_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kept | None:
        """The model is about to run on these.

        Returns:
            What has been kept; None where the pass cannot be observed.
        """
        model = self._target.model
        if not self._fitness.allows(model):
            return None
        if self._surroundings is None:
            self._surroundings = Surroundings(model)
        look = self._surroundings.look()
        if (name := self._surroundings.way_to_model(look)) is not None:
            self._fitness.give_up(f"a compiled model that keeps itself nowhere else; found it in {name!r} (a global?)")
            return None
        writes = Writes(model, thorough=self._fitness.thorough)
        try:
            twin = self._make_twin(model, self._target.taps, args, kwargs)
        except EndsWithItselfError as error:
            self._fitness.give_up(f"a compiled model that copy.deepcopy copies without a trace; found that it {error}")
            return None
        except Exception as error:  # whatever the user's own classes do when they are copied
            self._fitness.tell(f"a compiled model that copy.deepcopy can copy; found {type(error).__name__}: {error}")
            return None
        tensors, _ = tensors_in((args, kwargs))
        device = next((tensor.device for tensor in (*tensors, *model.parameters())), torch.device("cpu"))
        kept = Kept(twin, writes, look, AutocastState.now(device.type), left_in(model))
        if (where := user_hooked(model)) is not None:
            kept.told.unclear = _USER_HOOKED.format(where)
        return kept

    def _make_twin(
        self, model: nn.Module, taps: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Twin:
        before = time.thread_time()
        twin = make_twin(model, taps, args, kwargs, self._fitness.written)
        took = time.thread_time() - before
        self._num_slow = self._num_slow + 1 if took > _SLOW_S else 0
        if self._num_slow >= _SLOW_COPIES:  # one alone may have met the garbage collector
            self._faults.count(
                "slow_copy",
                f"expected a compiled model that is copied in {_SLOW_S} s; found {took:.1f} s (a large attribute that "
                "is no parameter?): keep it outside the model, give a larger every, or observe='probe'",
            )
        return twin

    def keep_output(self, kept: Kept, output: Any, accept: Callable[[], bool]) -> None:
        """The model has run.

        Args:
            kept: of the beginning of this pass.
            output: what it returned.
            accept: tells, when a gradient comes, whether it is that of this pass's own backward pass.
        """
        if (name := self._changed(kept)) is not None:
            self._fitness.give_up(f"a compiled model that changes nothing outside; found {name!r} changed (a global?)")
            kept.fits = False
            return
        kept.look = []  # what it holds must not outlive the pass
        kept.writes.look_again(self._target.model)
        leaves, _ = tensors_in(output)
        left = left_in(self._target.model)
        left = {name: tensor for name, tensor in left.items() if tensor is not kept.left.get(name)}
        told, kept.left = kept.told, {}
        told.new = list(left)
        num_returned = len(leaves)
        leaves = [*leaves, *left.values()]
        # What has no history of its own (a parameter) would keep the hook for ever.
        present = {index: leaf for index, leaf in enumerate(leaves) if leaf.grad_fn is not None}
        returned = [leaf for index, leaf in present.items() if index < num_returned]
        part = kept.part = self._parts.draw(kept.twin, list(present.values()), returned)
        if part is not None and not self._parts.proven:
            twin = kept.twin
            kept.spare = self._make_twin(twin.model, twin.taps, twin.args, twin.kwargs)
        rows = None if part is None else part.rows
        told.outputs = [few(leaf, rows) if index in present else None for index, leaf in enumerate(leaves)]
        told.entries.close(present.values())
        numbers, related = list(present), relations(list(present.values()))
        told.unclear = told.unclear or (BEHIND_A_BREAK if related.unclear else None)
        for number, (index, leaf) in enumerate(present.items()):
            if related.behind[number]:
                told.behind[index] = frozenset(numbers[other] for other in related.behind[number])
            if number not in related.repeated and leaf.grad_fn is not None:  # else its gradient is told already
                # Of the node, not of the tensor: it is called behind all hooks of the user's on that.
                leaf.grad_fn.register_prehook(self._recorder(kept, index, leaf.output_nr, accept))

    def _recorder(
        self, kept: Kept, index: int, at: int, accept: Callable[[], bool]
    ) -> Callable[[tuple[torch.Tensor | None, ...]], None]:
        reference = weakref.ref(kept)  # an output that the user collects holds no twin

        def record(gradients: tuple[torch.Tensor | None, ...]) -> None:
            kept, gradient = reference(), gradients[at]
            if kept is not None and gradient is not None and accept():
                gradient = gradient.detach()
                kept.told.add_gradient(index, gradient if kept.part is None else kept.part.of(gradient))

        return lambda gradients: self._run_guarded(record, gradients)

    def observe(self, kept: Kept) -> ObservedPass | None:
        """Run a kept pass again, and observe it.

        Returns:
            The pass, or None where it cannot be observed.
        """
        fitness = self._fitness
        if not kept.fits:
            return None  # it has been told why
        if not any(entries is not None for entries in kept.told.outputs):
            fitness.tell("a compiled model that returns a tensor with a gradient; found none in its output")
            return None
        if fitness.learn(kept.writes):
            return None
        try:
            return self._again(kept)
        except ReachedOutError as error:
            fitness.reached_out(self._target.model, error)
        except Exception as error:
            if kept.part is not None:
                return self._as_a_whole(kept, error)
            fitness.tell(f"a compiled model that also runs eagerly; found {type(error).__name__}: {error}")
        return None

    def _as_a_whole(self, kept: Kept, error: Exception) -> ObservedPass | None:
        """A part could not be run: its gradients do not tell those of the whole batch, but there is a spare twin."""
        self._parts.possible = False
        self._faults.count(
            "replay_differs",
            f"expected some sequences of a compiled batch to run by themselves; found {type(error).__name__}: {error}: "
            "gradients and alignment of that step are undetermined; from now on whole batches are run",
        )
        return (
            None
            if kept.spare is None
            else self.observe(replace(kept, twin=kept.spare, spare=None, part=None, comparable=False))
        )

    def _again(self, kept: Kept) -> ObservedPass | None:
        twin, rerun = kept.twin, Rerun(kept, self._sampler, self._faults)
        with (
            untouched(self._target.model),
            self._unchanged(),
            as_in_training(twin.model, kept.autocast),
            twin.contained,
        ):
            rerun.forward(self._options.token_dim)
            if (sample := rerun.capture.sample) is None:
                self._parts.possible = False  # the whole batch may hold a patch
                return None  # counted by who looked at the layers
            self._parts.learn(sample, kept.part, batch_of(twin))
            if not kept.comparable:
                return ObservedPass(rerun.capture)
            agrees = agreement(rerun.outputs, kept.told.outputs, None if kept.part is None else len(kept.part.rows))
            if self._options.gradients:
                rerun.backward()
        return self._observed(kept, rerun.capture, agrees)

    @contextlib.contextmanager
    def _unchanged(self) -> Generator[None]:
        """Around a replay: does it change what the training's own pass has not?"""
        assert self._surroundings is not None
        look = self._surroundings.look()
        yield
        if (name := self._surroundings.changed_since(look)) is not None:
            raise ReachedOutError(f"changes {name!r}, which lies outside it (or another thread has)")

    def _changed(self, kept: Kept) -> str | None:
        return None if self._surroundings is None else self._surroundings.changed_since(kept.look)

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

    def _disagreed(self) -> None:
        """Called by the writer, once it is known."""
        self._parts.possible = False
        self._faults.count(
            "replay_differs",
            "expected the same output when a compiled batch is run again eagerly; found another (dropout, sequences "
            "that depend on one another?): gradients and alignment of that step are undetermined; from now on whole "
            "batches are run",
        )
