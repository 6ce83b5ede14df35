"""Errors of the whole-sample entropies against populations whose entropy is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from entropy_monitor.estimators import matrix_entropy, sample_entropies


@dataclass(frozen=True)
class Accuracy:
    """What many draws of one population say about an estimator of S2, in nats."""

    population: float
    plug_in_error: float
    unbiased_error: float
    unbiased_error_noise: float
    """Standard error of the mean over the draws."""
    error_ratio: float
    """Stated standard error over the standard deviation of the draws."""


def spectra(num_features: int) -> dict[str, torch.Tensor]:
    """Standard deviations of the features; the square of each is an eigenvalue of the second-moment matrix."""
    return {
        "white": torch.ones(num_features, dtype=torch.float64),
        "power law, eigenvalues 1/i": torch.arange(1, num_features + 1, dtype=torch.float64) ** -0.5,
    }


def accuracy(deviation_D: torch.Tensor, num_tokens: int, num_draws: int) -> Accuracy:
    """Draw samples of independent Gaussian tokens and compare."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues_D = deviation_D.square()
    population = (2 * eigenvalues_D.sum().log() - eigenvalues_D.square().sum().log()).item()
    plug_in, unbiased, std_error = torch.tensor(
        [_draw(deviation_D, num_tokens, generator) for _ in range(num_draws)], dtype=torch.float64
    ).T
    return Accuracy(
        population=population,
        plug_in_error=plug_in.mean().item() - population,
        unbiased_error=unbiased.mean().item() - population,
        unbiased_error_noise=unbiased.std().item() / math.sqrt(num_draws),
        error_ratio=(std_error.square().mean().sqrt() / unbiased.std()).item(),
    )


def _draw(deviation_D: torch.Tensor, num_tokens: int, generator: torch.Generator) -> tuple[float, float, float]:
    z_ND = torch.randn(num_tokens, len(deviation_D), generator=generator) * deviation_D.float()
    found = sample_entropies(z_ND, block=1)
    return matrix_entropy(z_ND).item(), found.s2.item(), found.s2_std_error.item()
