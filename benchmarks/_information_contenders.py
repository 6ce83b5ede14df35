"""Mutual information of labels and activations: ours against the soft-entropy package, on a set-up of known truth.

50,000 Zipf labels, activations ``strength * mean of the label + noise``; most labels are seen once or twice, which
makes the plug-in value useless and the correction decisive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from entropy_monitor.estimators import (
    SoftEntropyAccumulator,
    mutual_information,
    reference_points,
    soft_assign,
    soft_entropy,
    soft_temperature,
)

NUM_BINS = 100
NUM_LABELS = 50_000
STRENGTHS = (0.0, 0.15, 0.3, 1.0)


@dataclass(frozen=True)
class Zipf:
    """The population that tokens are drawn from."""

    num_features: int = 256
    strength: float = 0.3

    def means(self) -> torch.Tensor:
        return torch.randn(NUM_LABELS, self.num_features, generator=torch.Generator().manual_seed(1))

    def labels(self, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
        weights = 1 / torch.arange(1, NUM_LABELS + 1.0)
        return torch.multinomial(weights, num_tokens, replacement=True, generator=generator)

    def tokens(self, labels_N: torch.Tensor, means_UD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self.strength * means_UD[labels_N] + torch.randn(len(labels_N), self.num_features, generator=generator)

    def sample(self, num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels_N = self.labels(num_tokens, generator)
        return self.tokens(labels_N, self.means(), generator), labels_N


def true_information(population: Zipf, seed: int = 2) -> tuple[float, float]:
    """Information in nats by samples that are large where the estimator's are small, and its standard error.

    ``H(Z | x)`` of 900 drawn labels from 200 tokens each, ``H(Z)`` from 98,304 tokens, each corrected to second order.
    """
    generator, means_UD = torch.Generator().manual_seed(seed), population.means()
    conditional = torch.tensor(
        [
            _entropy_to_second_order(population, label.repeat(200), means_UD, generator)
            for label in population.labels(900, generator)
        ]
    )
    whole = _entropy_to_second_order(population, population.labels(98_304, generator), means_UD, generator)
    return whole - conditional.mean().item(), conditional.std().item() / math.sqrt(len(conditional))


def _entropy_to_second_order(population: Zipf, labels_N, means_UD, generator) -> float:
    p_NM = soft_assign(population.tokens(labels_N, means_UD, generator), num_bins=NUM_BINS).double()
    share_M = p_NM.mean(0)
    return (-(share_M * share_M.log()).sum() + (p_NM.var(0) / share_M).sum() / (2 * len(p_NM))).item()


def theirs_available() -> bool:
    """Whether the package is installed, with what it needs but does not ask for."""
    try:
        import soft_entropy  # noqa: F401
    except ImportError:
        return False
    return True


def their_accumulator(num_features: int):
    from soft_entropy import SoftEntropyAccumulator as Theirs

    return Theirs(num_features, n_bins=NUM_BINS, backend="torch")


def their_information(z_ND: torch.Tensor, labels_N: torch.Tensor) -> float:
    accumulator = their_accumulator(z_ND.shape[1])
    accumulator.update(z_ND, labels_N)
    return accumulator.mutual_information()["labels"]


def our_streamed_information(z_ND: torch.Tensor, labels_N: torch.Tensor) -> float:
    accumulator = SoftEntropyAccumulator(z_ND.shape[1], num_bins=NUM_BINS)
    for first in range(0, len(z_ND), 4096):
        accumulator.update(z_ND[first : first + 4096], {"label": labels_N[first : first + 4096]})
    return float(accumulator.mutual_information("label"))


def contenders():
    """What is timed; every one is given ``z`` and labels."""
    found = {
        "GEMM with the reference points": lambda z_ND, labels_N: z_ND @ torch.zeros(NUM_BINS, z_ND.shape[1]).mT,
        "ours, plug-in": lambda z_ND, labels_N: mutual_information(z_ND, labels_N, correction="none"),
        "ours, rarefied": mutual_information,
        "ours, streamed, rarefied": our_streamed_information,
    }
    if theirs_available():
        found["soft-entropy accumulator"] = their_information
    return found


def prepare_contender(population: Zipf, num_tokens: int, name: str):
    """One contender with its input, ready to be weighed."""
    function = contenders()[name]
    function(*Zipf(8).sample(64, seed=0))
    z_ND, labels_N = population.sample(num_tokens, seed=0)
    return lambda: function(z_ND, labels_N)


def distance_to_theirs(population: Zipf, num_tokens: int) -> dict[str, float]:
    """Largest difference from the package, given its reference points and temperature, over ``log m`` as it reports."""
    theirs = their_accumulator(population.num_features)
    z_ND, labels_N = population.sample(num_tokens, seed=3)
    theirs.update(z_ND, labels_N)
    same = {"reference_points": theirs.w, "temperature": float(theirs.temp), "normalize": True}
    information = mutual_information(z_ND, labels_N, correction="none", **same)
    return {
        "soft entropy": abs(float(soft_entropy(z_ND, **same)) - theirs.entropy()),
        "plug-in information": abs(float(information) - theirs.mutual_information()["labels"]),
        "temperature": abs(soft_temperature(population.num_features, NUM_BINS) / float(theirs.temp) - 1),
        "reference points drawn alike": float(torch.equal(reference_points(population.num_features), theirs.w)),
    }
