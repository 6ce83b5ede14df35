"""Every metric a run may hold: its name, unit, what its sample size counts, its source and its meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_MBE = "arXiv 2505.08727"
_SOFT = "arXiv 2604.07569"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure per layer and step; its standard error stands beside it as ``{name}_se``."""

    name: str
    unit: Literal["nats", "dimensions", "cosine", "ratio"]
    samples: Literal["tokens", "patches", "window_tokens", "probes"]
    """What ``num_samples`` counts: sampled tokens or patches of the step, tokens of the sliding window that ends with
    it, or probe batches, one for each rank."""
    source: str
    description: str


def _information(about: Literal["input", "output"], length: int) -> Metric:
    position = "ending at" if about == "input" else "starting after"
    words = "token" if length == 1 else f"{length} tokens"
    return Metric(
        name=f"mi_{about}_{length}",
        unit="nats",
        samples="window_tokens",
        source=_SOFT,
        description=f"Mutual information between activations and the {words} {position} the position, by soft entropy, "
        "over a sliding window of steps, with back-off to shorter contexts, corrected for the finite sample.",
    )


RUN_PREFIX = "run_"
"""Before the name of a metric: its mean over the layers."""
METRICS: tuple[Metric, ...] = (
    Metric(
        name="mbe",
        unit="nats",
        samples="patches",
        source=_MBE,
        description="Order-2 matrix-based entropy of raw activations in patches of 8 consecutive tokens, mean over "
        "patches; at most ln 8. One large norm lowers it: read it beside mbe_normalized.",
    ),
    Metric(
        name="mbe_normalized",
        unit="nats",
        samples="patches",
        source=_MBE,
        description="The same of activations scaled to norm 1 token by token: the primary figure, from which the "
        "regime is judged.",
    ),
    Metric(
        name="mbe_centered",
        unit="nats",
        samples="patches",
        source=_MBE,
        description="The same of raw activations less their mean over all sampled tokens of the step, which a shared "
        "offset does not lower.",
    ),
    Metric(
        name="s1",
        unit="nats",
        samples="tokens",
        source=_MBE,
        description="Von Neumann (order-1) entropy of all sampled tokens, scaled to norm 1 each; plug-in, so low by "
        "the bias of a finite sample.",
    ),
    Metric(
        name="s2",
        unit="nats",
        samples="tokens",
        source=_MBE,
        description="Order-2 entropy of the population behind the sampled tokens, scaled to norm 1 each; from pairs of "
        "different patches (U-statistics), so free of the bias of a finite sample.",
    ),
    Metric(
        name="effective_rank",
        unit="dimensions",
        samples="tokens",
        source="Roy and Vetterli 2007",
        description="exp(s1): how many equally used dimensions have this entropy; low by the bias of s1.",
    ),
    Metric(
        name="soft_entropy",
        unit="nats",
        samples="tokens",
        source=_SOFT,
        description="Entropy of activation directions, softly assigned to 100 fixed random reference directions; at "
        "most ln 100 but for noise, corrected to second order for the finite sample.",
    ),
    *(_information(about, length) for about in ("input", "output") for length in (1, 2, 3)),
    Metric(
        name="optimality",
        unit="ratio",
        samples="window_tokens",
        source=_SOFT,
        description="Information about the next token over information about the current one: mi_output_1 over "
        "mi_input_1.",
    ),
    Metric(
        name="alignment_activation",
        unit="cosine",
        samples="patches",
        source="after " + _MBE,
        description="Cosine between the gradients of cross-entropy and of raw mbe with respect to activations. A "
        "different quantity from alignment_weight: never read one for the other.",
    ),
    Metric(
        name="alignment_weight",
        unit="cosine",
        samples="patches",
        source=_MBE,
        description="Cosine between the gradients of cross-entropy and of raw mbe with respect to the weights of the "
        "last linear layer that writes these activations; undetermined where there is none or it could not be checked.",
    ),
    Metric(
        name="alignment_exact",
        unit="cosine",
        samples="probes",
        source=_MBE,
        description="The quantity that alignment_weight estimates, by backpropagation on the probe batch: an audit, "
        "made every exact_alignment_every steps. It has no standard error: only the choice of the batch is random.",
    ),
    Metric(
        name="alignment_exact_all",
        unit="cosine",
        samples="probes",
        source=_MBE,
        description="The same with respect to all parameters of the model.",
    ),
)
"""All metrics, in the order of the dataset that readers get."""
