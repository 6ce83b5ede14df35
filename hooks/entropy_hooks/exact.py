"""The exact audit: alignment of the full parameter gradients on the probe, by autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from entropy_monitor.estimators.exact_alignment import EntropyRoot, alignment_of_roots, entropy_root
from entropy_monitor.types import PATCH_LENGTH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from entropy_hooks.probe import Probe
    from entropy_hooks.watch import LayerRun


def audit(probe: Probe, layers: Sequence[str]) -> torch.Tensor | None:
    """Compute the alignment of every tapped layer on the probe batch, one backward pass each.

    Args:
        probe: the probe.
        layers: names of the tapped layers.

    Returns:
        Cosines ``[L, 2]``, float32, on the device: over the weight of the last linear layer that makes the layer's
        output, and over all parameters that are trained; NaN where there is none. None where the probe has no
        loss, or no layer with an entropy that depends on a parameter.
    """
    roots: dict[str, EntropyRoot | None] = {}
    weights: dict[str, torch.Tensor] = {}

    def see(run: LayerRun) -> None:
        roots[run.layer] = entropy_root(run.axes.sequences(run.z), PATCH_LENGTH)
        if run.linear is not None:
            weights[run.layer] = run.linear.weight

    with probe.run(see) as run:
        if run is None:
            return None
        parameters = {name: entry for name, entry in probe.model.named_parameters() if entry.requires_grad}
        names = {id(parameter): name for name, parameter in parameters.items()}
        found = alignment_of_roots(run.loss, roots, parameters)
        # Behind it: reentrant checkpointing leaves no roots either, and is refused there with torch's own words.
        if all(root is None for root in roots.values()):
            return None
        cosines_L2 = torch.full((len(layers), 2), float("nan"), device=run.loss.device)
        for row_2, layer in zip(cosines_L2, layers, strict=True):
            if layer in found:
                row_2[1] = found[layer].together
                if (name := names.get(id(weights.get(layer)))) is not None:
                    row_2[0] = found[layer].by_name[name]
        return cosines_L2
