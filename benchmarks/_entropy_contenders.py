"""Ways to measure the matrix-based entropy of one sample: ours, repitl's, the naive one, and the bare Gram product."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from entropy_monitor.estimators import matrix_entropy, patch_entropies

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PATCH = 8


@dataclass(frozen=True)
class Case:
    """A sample of tokens; with `patches`, the entropy of each patch of 8 is taken."""

    num_tokens: int
    num_features: int
    patches: bool = False

    @property
    def name(self) -> str:
        if self.patches:
            return f"{self.num_tokens // PATCH} patches of {PATCH} x {self.num_features}"
        return f"{self.num_tokens} x {self.num_features}"


CASES = (Case(512, 768), Case(2048, 1024), Case(4096, 768), Case(16384 * PATCH, 768, patches=True))


def unit_rows_of_power_law(case: Case) -> torch.Tensor:
    """Draw tokens of a spectrum that decays, and give each norm 1: repitl's order 2 is right for such rows only.

    Returns:
        ``[num_tokens, num_features]``, fp32.
    """
    z_ND = torch.randn(case.num_tokens, case.num_features, generator=torch.Generator().manual_seed(0))
    z_ND *= torch.arange(1, case.num_features + 1) ** -0.25
    return z_ND.div_(torch.linalg.vector_norm(z_ND, dim=-1, keepdim=True))


def own_gram(z_ND: torch.Tensor) -> torch.Tensor:
    """The product that S2 cannot do without, on the smaller side."""
    return z_ND @ z_ND.mT if z_ND.shape[-2] <= z_ND.shape[-1] else z_ND.mT @ z_ND


def naive_entropy(z_ND: torch.Tensor, order: int) -> torch.Tensor:
    """The definition as one would write it: eigenvalues of the n x n density matrix."""
    gram_NN = z_ND @ z_ND.mT
    eigenvalues_N = torch.linalg.eigvalsh(gram_NN / gram_NN.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None])
    positive_N = eigenvalues_N.clamp(min=1e-12)
    return -(positive_N * positive_N.log()).sum(-1) if order == 1 else -positive_N.square().sum(-1).log()


def exact_entropies(z_ND: torch.Tensor, case: Case) -> dict[str, torch.Tensor]:
    """S1 and S2 of the same numbers in fp64, for the errors."""
    if case.patches:
        z_ND = z_ND.double().unflatten(0, (-1, PATCH))
        gram_NN = z_ND @ z_ND.mT
        trace = gram_NN.diagonal(dim1=-2, dim2=-1).sum(-1)
        return {"S2": 2 * trace.log() - gram_NN.square().sum((-2, -1)).log()}
    eigenvalues_S = torch.linalg.eigvalsh(own_gram(z_ND.double()))
    density_S = (eigenvalues_S / eigenvalues_S.sum()).clamp(min=1e-16)
    return {"S1": -(density_S * density_S.log()).sum(), "S2": -density_S.square().sum().log()}


def load_repitl(checkout: Path):
    """repitl is no package on PyPI: its functions come from a checkout of uk-cliplab/representation-itl."""
    source = checkout / "src"
    if not (source / "repitl" / "matrix_itl.py").is_file():
        raise FileNotFoundError(
            f"expected src/repitl/matrix_itl.py under {checkout}; found none: "
            "git clone https://github.com/uk-cliplab/representation-itl and give its folder with --repitl"
        )
    sys.path.insert(0, str(source))
    from repitl import matrix_itl

    return matrix_itl


def contenders(case: Case, repitl: Path | None) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What is timed for a case; the first word of a name says which entropy comes out, "GEMM" that none does."""
    if case.patches:
        return {
            "GEMM of the Gram matrices": lambda z_ND: own_gram(z_ND.unflatten(0, (-1, PATCH))),
            "S2 ours": patch_entropies,
            "S2 ours, row-normalised": lambda z_ND: patch_entropies(z_ND, normalize=True),
            "S2 naive eigvalsh": lambda z_ND: naive_entropy(z_ND.unflatten(0, (-1, PATCH)), 2),
        }
    found = {
        "GEMM of the Gram matrix": own_gram,
        "S2 ours": matrix_entropy,
        "S2 ours, row-normalised": lambda z_ND: matrix_entropy(z_ND, normalize=True),
        "S1 ours": lambda z_ND: matrix_entropy(z_ND, 1),
        "S1 naive eigvalsh": lambda z_ND: naive_entropy(z_ND, 1),
    }
    if repitl:
        theirs = load_repitl(repitl)
        found["S2 repitl"] = lambda z_ND: theirs.matrixAlphaEntropy(z_ND @ z_ND.mT, 2)
        # A trace of 1, as its documentation asks for: it divides by the sum of the eigenvalues either way.
        found["S1 repitl"] = lambda z_ND: theirs.matrixAlphaEntropy(z_ND @ z_ND.mT / len(z_ND), 1)
    return found


def prepare_contender(case: Case, name: str, repitl: Path | None):
    """One contender with its input, ready to be weighed."""
    function = contenders(case, repitl)[name]
    function(unit_rows_of_power_law(Case(16, 4, case.patches)))
    z_ND = unit_rows_of_power_law(case)
    return lambda: function(z_ND)
