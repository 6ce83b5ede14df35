"""Observing a compiled model: the step's own batch once more, eagerly, a few of its sequences.

The compiled graph is left alone, so that training stays bit-identical: hooks inside would change how it is fused, and
running whole steps eagerly changes the last bits of every step that follows. What the true backward pass gave to the
model's output is given to ours, so that the layers' gradients are those of the user's own loss, whatever it is.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from entropy_hooks.frame import ObservedPass
from entropy_hooks.gather import Gathering
from entropy_hooks.tokens import draw_patches
from entropy_hooks.undisturbed import AutocastState, as_in_training, is_sharded
from entropy_hooks.watch import Watch
from entropy_monitor.types import PATCH_LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from entropy_hooks.faults import Faults
    from entropy_hooks.target import Target
    from entropy_hooks.tokens import PatchSample
    from entropy_monitor.config import MonitorOptions

_MIN_SEQUENCES = 4
_MAX_OUTPUT_ENTRIES = 1 << 26
"""Entries of output gradients kept until the optimizer steps: 256 MB in float32."""
_COMPARED_ENTRIES = 4096
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative difference of outputs that fusion and summation order explain; 5 % for shorter types."""


@dataclass(slots=True)
class _Pass:
    """What is kept of one compiled forward and backward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: tuple[int, ...]
    """Of the tensors among them, to notice a loader that has filled them anew."""
    autocast: AutocastState
    rows: torch.Tensor | None = None
    """Sequences that are run again, on the CPU; None runs the whole batch."""
    batch: int = 0
    outputs: list[torch.Tensor | None] = field(default_factory=list["torch.Tensor | None"])
    """A few entries of each output that has a gradient."""
    gradients: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    """What the backward pass gave to each output, at `rows`."""


class Replay:
    """Keeps a pass on its way through the compiled model, and runs it again before the optimizer steps."""

    def __init__(self, target: Target, options: MonitorOptions, faults: Faults) -> None:
        self._target, self._options, self._faults = target, options, faults
        self._generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))
        self._pass: _Pass | None = None
        self._in_parts = True
        """Sequences of a batch are taken to be independent, until a replay of some of them came out otherwise."""

    def keep_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to run on these."""
        self._pass = None
        if is_sharded(self._target.model):
            self._faults.count(
                "not_observed",
                "compiled and sharded: each rank holds a part of the parameters, and cannot run the batch by itself",
            )
            return
        tensors = _tensors((args, kwargs))
        if tensors:
            autocast = AutocastState.now(tensors[0].device.type)
            self._pass = _Pass(args, kwargs, tuple(tensor._version for tensor in tensors), autocast)

    def keep_output(self, output: Any, accept: Callable[[], bool]) -> None:
        """The model has run.

        Args:
            output: what it returned.
            accept: tells, when a gradient comes, whether it is that of the step's own backward pass.
        """
        kept = self._pass
        if kept is None:
            return
        outputs = [leaf if leaf.requires_grad else None for leaf in _tensors(output)]
        kept.rows, kept.batch = self._draw_rows(kept, [leaf for leaf in outputs if leaf is not None])
        for index, leaf in enumerate(outputs):
            kept.outputs.append(None if leaf is None else _few(leaf, 0 if kept.rows is None else int(kept.rows[0])))
            if leaf is not None:
                leaf.register_hook(self._recorder(kept, index, accept))

    def observe(self) -> ObservedPass | None:
        """Run the kept pass again, and observe it.

        Returns:
            The pass, or None where there is none.
        """
        kept, self._pass = self._pass, None
        if kept is None or not kept.outputs:
            return None
        tensors = _tensors((kept.args, kept.kwargs))
        if tuple(tensor._version for tensor in tensors) != kept.versions:
            self._faults.count(
                "inputs_overwritten",
                "expected the batch to stay as it was until the optimizer steps; found it filled anew: give the model "
                "a copy, or observe='probe'",
            )
            return None
        model = self._target.model
        gathering = Gathering(self._draw_patches, self._faults, weights=False)
        with as_in_training(model, kept.autocast):
            args, kwargs = pytree.tree_map(functools.partial(_part, kept=kept), (kept.args, kept.kwargs))
            watch = Watch(model, self._target.taps, self._options.token_dim, gathering.see, self._faults)
            try:
                outputs = _tensors(model(*args, **kwargs))
            finally:
                watch.remove()
            if gathering.capture.sample is None:
                return None
            agrees = _agreement(outputs, kept.outputs)
            roots = [outputs[index] for index in kept.gradients]
            if self._options.gradients and roots:
                gathering.differentiate(roots, list(kept.gradients.values()))
        capture = gathering.capture
        capture.token_ids = watch.token_ids
        # Another dropout mask, or sequences that depend on one another: undetermined.
        capture.gradients.update({k: torch.where(agrees, g, torch.nan) for k, g in capture.gradients.items()})
        sample = gathering.capture.sample
        per_sequence = sample.sequence_length // PATCH_LENGTH
        return ObservedPass(
            capture,
            agrees=agrees,
            on_disagreement=self._disagreed,
            num_batch_patches=sample.num_batch_patches if kept.rows is None else kept.batch * per_sequence,
        )

    def _recorder(self, kept: _Pass, index: int, accept: Callable[[], bool]) -> Callable[[torch.Tensor], None]:
        def record(gradient: torch.Tensor) -> None:
            try:
                if kept is self._pass and accept():
                    kept.gradients[index] = _part(gradient.detach(), kept)
            except Exception as error:
                self._faults.count("hook_error", error)

        return record

    def _draw_rows(self, kept: _Pass, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, int]:
        first = next((tensor for tensor in _tensors((kept.args, kept.kwargs)) if tensor.dim()), None)
        batch = 0 if first is None else first.shape[0]
        if not self._in_parts or not outputs or any(not leaf.dim() or leaf.shape[0] != batch for leaf in outputs):
            return None, batch
        length = next((leaf.shape[1] for leaf in outputs if leaf.dim() > 2), PATCH_LENGTH)
        enough = -(-self._options.patches // max(1, length // PATCH_LENGTH))
        fit = _MAX_OUTPUT_ENTRIES // max(1, sum(leaf[0].numel() for leaf in outputs))
        wanted = max(1, min(max(_MIN_SEQUENCES, enough), fit))
        if wanted >= batch:
            return None, batch
        return torch.randperm(batch, generator=self._generator)[:wanted].sort().values, batch

    def _draw_patches(self, num_sequences: int, length: int, device: torch.device) -> PatchSample | None:
        return draw_patches(num_sequences, length, self._options.patches, self._generator, device)

    def _disagreed(self) -> None:
        """Called by the writer, once it is known."""
        self._in_parts = False
        self._faults.count(
            "replay_differs",
            "expected the same output when some of a compiled batch is run again eagerly; found another (dropout, "
            "batch norm?): gradients and alignment of that step are undetermined; from now on whole batches are run",
        )


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _part(leaf: Any, kept: _Pass) -> Any:
    """The rows that are run again, of a tensor that has a row a sequence.

    Returns:
        The rows; anything else as it is.
    """
    if kept.rows is None or not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[0] != kept.batch:
        return leaf
    rows = kept.rows
    if leaf.device.type == "cuda":
        rows = rows.pin_memory().to(leaf.device, non_blocking=True)  # from pageable memory the copy would wait
    return leaf.index_select(0, rows)


def _few(output: torch.Tensor, row: int) -> torch.Tensor:
    """A few entries of one row: all of them would be as large as the model's output.

    Returns:
        A copy, at most some thousand entries.
    """
    flat = (output.detach()[row] if output.dim() else output.detach()).reshape(-1)
    return flat[:: max(1, flat.numel() // _COMPARED_ENTRIES)].clone()


def _agreement(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Whether the replay computed what training computed, as far as fusion lets them agree.

    Returns:
        A 0-d boolean, on the device: to ask for it here would wait.
    """
    verdicts: list[torch.Tensor] = []
    for output, few in zip(found, expected, strict=True):
        if few is not None:
            tolerance = _TOLERANCE.get(few.dtype, 5e-2)
            difference = (_few(output, 0).float() - few.float()).norm()
            verdicts.append(difference <= tolerance * few.float().norm())
    return torch.stack(verdicts).all()
