"""Why a sampled step has no frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entropy_hooks.faults import Faults
    from entropy_hooks.observer import Observer


def count_reason(observer: Observer, faults: Faults) -> None:
    """Count why nothing was observed in the step that has ended, unless that was counted where it was met."""
    capture, passes = observer.observed, observer.passes
    micro_batches = passes.micro_batches
    if micro_batches.ended_early:
        faults.count(
            "fewer_micro_batches",
            f"expected {micro_batches.expected} backward passes before the optimizer's step; found "
            f"{micro_batches.count}, an epoch's end?: this step has no frame, the next ones are watched closely",
        )
    elif observer.replays and passes.current is None:
        faults.count(
            "not_observed",
            "expected a compiled model to run before the optimizer steps, or in its closure; found no pass "
            "(compiled inside a larger function?): compile the model itself, or give observe='probe'",
        )
    elif observer.replays or (capture is not None and capture.too_short):
        return
    elif observer.guard.transformed:
        faults.count(
            "transformed", "expected an eager pass; found the model inside torch.func (grad, vmap, ...): not observed"
        )
    # Compiled since the step began: it is observed from the next one on.
    elif not (passes.entry.compiled and not observer.weight) and not passes.entry.look_again():
        faults.count("not_observed", "no tapped layer ran in this step (compiled, or not this model)")
