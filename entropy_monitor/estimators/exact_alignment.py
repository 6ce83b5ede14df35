"""Alignment of the loss and entropy gradients with respect to parameters, exactly, by one backward pass a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from entropy_monitor.estimators.gradients import patch_matrix_entropy_gradient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float
    from torch import Tensor


class ParameterAlignment(NamedTuple):
    """Cosines of one layer, 0-d float64 tensors; NaN where either gradient is zero."""

    together: Tensor
    """All parameters as one vector."""
    by_name: dict[str, Tensor]
    """Each parameter by itself."""


class EntropyRoot(NamedTuple):
    """Where the backward pass of one activation's entropy begins, kept apart from the activation itself."""

    edge: GradientEdge
    """The activation's place in the graph, which stays when the model overwrites its values later."""
    gradient: Tensor
    """Gradient of the patch entropy with respect to the activation, in its shape and type."""


def exact_alignment(
    loss: Float[Tensor, ""],
    activations: Mapping[str, Float[Tensor, "*batch n d"]],
    parameters: Mapping[str, Tensor],
    patch: int = 8,
) -> dict[str, ParameterAlignment]:
    """Cosine, in **weight space**, between ``d loss / d theta`` and ``d MBE_l / d theta`` for each layer l.

    MBE is the raw order-2 entropy, averaged over all whole patches of the batch. Its gradient enters the backward pass
    of the model as the vector of a vector-Jacobian product, in closed form: finite where autograd through the entropy
    is not, as on a patch of zeros. That vector is rounded to the type of the activation.

    Source: the parameter-gradient cosine of arXiv 2505.08727. No sampling, hence no standard error; one backward pass
    of the loss and one a layer. A layer's entropy does not depend on the parameters behind it: they count with their
    loss gradient in the norm of all parameters together, and are NaN by themselves.

    Args:
        loss: the 0-d loss.
        activations: layer to its activations ``[..., n, d]``, of the same graph as the loss and not overwritten since.
        parameters: name to parameter; those that the loss or the entropy does not reach have a gradient of zero.
        patch: tokens in a patch; an incomplete last patch is dropped.

    Returns:
        Layer to its cosines, detached; sums are in fp64. ``.grad`` is not touched and the graph is kept.

    Raises:
        ValueError: there is no parameter, one is frozen, the loss is not one number or has no graph, or an activation
            is no matrix of samples or shorter than a patch.

    >>> import torch
    >>> from entropy_monitor.estimators import patch_matrix_entropy
    >>> linear, x = torch.nn.Linear(3, 2), torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    >>> z = linear(x)
    >>> found = exact_alignment(-patch_matrix_entropy(z), {"linear": z}, dict(linear.named_parameters()))
    >>> round(float(found["linear"].together), 5)
    -1.0
    """
    roots = {layer: entropy_root(z, patch) for layer, z in activations.items()}
    return alignment_of_roots(loss, roots, parameters)


def entropy_root(z: Float[Tensor, "*batch n d"], patch: int = 8) -> EntropyRoot | None:
    """Take what `alignment_of_roots` needs of an activation, before the model may overwrite it.

    Args:
        z: consecutive tokens by features.
        patch: tokens in a patch.

    Returns:
        The root; None where the activation depends on no parameter.
    """
    if not z.requires_grad:
        return None
    gradient = patch_matrix_entropy_gradient(z, patch) / z.shape[:-2].numel()
    return EntropyRoot(get_gradient_edge(z), gradient.to(z.dtype))


def alignment_of_roots(
    loss: Float[Tensor, ""], roots: Mapping[str, EntropyRoot | None], parameters: Mapping[str, Tensor]
) -> dict[str, ParameterAlignment]:
    """Finish `exact_alignment`.

    Args:
        loss: the 0-d loss.
        roots: layer to its root; None gives NaN.
        parameters: name to parameter.

    Returns:
        Layer to its cosines.

    Raises:
        ValueError: there is no parameter, one is frozen, or the loss is not one number or has no graph.
    """
    _check(loss, parameters)
    tensors = tuple(parameters.values())
    loss_gradients = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    loss_squares_P = _products(loss_gradients, loss_gradients, loss)
    found: dict[str, ParameterAlignment] = {}
    for layer, root in roots.items():
        gradients: tuple[Tensor | None, ...] = (None,) * len(tensors)
        if root is not None:
            gradients = torch.autograd.grad([root.edge], tensors, [root.gradient], retain_graph=True, allow_unused=True)
        along_P = _products(loss_gradients, gradients, loss)
        squares_P = _products(gradients, gradients, loss)
        cosines_P = along_P / (loss_squares_P.sqrt() * squares_P.sqrt())
        together = along_P.sum() / (loss_squares_P.sum().sqrt() * squares_P.sum().sqrt())
        found[layer] = ParameterAlignment(together, dict(zip(parameters, cosines_P.unbind(), strict=True)))
    return found


def _check(loss: Tensor, parameters: Mapping[str, Tensor]) -> None:
    if not parameters:
        raise ValueError("parameters: expected at least one; found none: pass dict(model.named_parameters())")
    if frozen := [name for name, parameter in parameters.items() if not parameter.requires_grad]:
        raise ValueError(f"parameters: expected all to require gradients; found {frozen[0]} frozen: leave it out")
    if loss.numel() != 1:
        raise ValueError(f"loss: expected a single number, found shape {tuple(loss.shape)}: take its mean")
    if not loss.requires_grad:
        raise ValueError("loss: expected one with its graph, found it detached: pass what backward() is called on")


def _products(ones: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...], like: Tensor) -> Tensor:
    """Take the inner product of each pair of gradients; a missing one is zero.

    Returns:
        One fp64 number a pair, on the device of ``like``.
    """
    zero = torch.zeros((), dtype=torch.float64, device=like.device)
    return torch.stack(
        [
            zero
            if one is None or other is None
            else torch.dot(one.double().flatten(), other.double().flatten()).to(like.device)
            for one, other in zip(ones, others, strict=True)
        ]
    )
