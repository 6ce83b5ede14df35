"""Estimators of matrix-based entropy and gradient alignment: pure tensor functions, in nats.

Every function takes a torch tensor on any device or a numpy array, with any leading batch dimensions, and computes in
the input's precision but at least fp32 (bf16, fp16 and integers are converted), autocast or not. Non-finite entries
give NaN for the matrix that holds them, and for no other. Nothing is clamped: rounding may leave an entropy of zero at
-1e-7.
"""

from __future__ import annotations

from entropy_monitor.estimators.alignment import Alignment, gradient_alignment
from entropy_monitor.estimators.calibration import reference_points, soft_temperature
from entropy_monitor.estimators.exact_alignment import ParameterAlignment, exact_alignment
from entropy_monitor.estimators.gradients import matrix_entropy_gradient, patch_matrix_entropy_gradient
from entropy_monitor.estimators.information import MutualInformation, mutual_information, shuffled_information
from entropy_monitor.estimators.information_accumulator import SoftEntropyAccumulator
from entropy_monitor.estimators.information_plane import InformationPlane, information_plane
from entropy_monitor.estimators.layer_estimates import LayerEstimates, layer_estimates
from entropy_monitor.estimators.matrix_entropy import (
    effective_rank,
    matrix_entropy,
    patch_entropies,
    patch_matrix_entropy,
)
from entropy_monitor.estimators.ngrams import backoff_labels
from entropy_monitor.estimators.optimality import (
    InformationBound,
    Optimality,
    information_bottleneck_bound,
    optimality,
)
from entropy_monitor.estimators.sample_entropies import SampleEntropies, matrix_entropy_unbiased, sample_entropies
from entropy_monitor.estimators.soft_entropy import (
    SoftEntropy,
    entropy_of_assignments,
    soft_assign,
    soft_entropy,
    soft_entropy_estimate,
)
from entropy_monitor.estimators.spectrum import spectrum
from entropy_monitor.estimators.standard_error import matrix_entropy_standard_error, patch_standard_error
from entropy_monitor.estimators.weight_alignment import (
    gradient_alignment_from_parts,
    projected_weight_alignment_parts,
    weight_alignment_parts,
)

__all__ = [
    "Alignment",
    "InformationBound",
    "InformationPlane",
    "LayerEstimates",
    "MutualInformation",
    "Optimality",
    "ParameterAlignment",
    "SampleEntropies",
    "SoftEntropy",
    "SoftEntropyAccumulator",
    "backoff_labels",
    "effective_rank",
    "entropy_of_assignments",
    "exact_alignment",
    "gradient_alignment",
    "gradient_alignment_from_parts",
    "information_bottleneck_bound",
    "information_plane",
    "layer_estimates",
    "matrix_entropy",
    "matrix_entropy_gradient",
    "matrix_entropy_standard_error",
    "matrix_entropy_unbiased",
    "mutual_information",
    "optimality",
    "patch_entropies",
    "patch_matrix_entropy",
    "patch_matrix_entropy_gradient",
    "patch_standard_error",
    "projected_weight_alignment_parts",
    "reference_points",
    "sample_entropies",
    "shuffled_information",
    "soft_assign",
    "soft_entropy",
    "soft_entropy_estimate",
    "soft_temperature",
    "spectrum",
    "weight_alignment_parts",
]
