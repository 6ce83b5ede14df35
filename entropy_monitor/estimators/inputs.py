"""What every estimator does to its input first: convert, check, scale.

Shape suffixes used in this package: N tokens, D features, B patches, P tokens of a patch, S the smaller of N and D,
G jackknife groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

Array: TypeAlias = Tensor | NDArray[Any]
"""What callers may pass: a tensor on any device, or a numpy array."""


def as_tensor(values: Array, name: str) -> Tensor:
    """Take a tensor as it is, and convert a numpy array or nested lists of numbers.

    Args:
        values: the numbers.
        name: the argument's name, for the message.

    Returns:
        A view of the input where that is possible.

    Raises:
        ValueError: lists of unequal lengths, or something else than numbers that torch knows.
    """
    if isinstance(values, Tensor):
        return values
    found = type(values).__name__
    try:
        array = np.asarray(values)
        found = f"{found} of {array.dtype}"
        # Foreign byte orders, read-only and reversed arrays are copied: torch refuses or warns about them.
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        return torch.as_tensor(np.require(native, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: expected an array of numbers, found {found}: pass rows of equal length in a torch type"
        ) from error


def as_samples(z: Array, name: str = "z") -> Float[Tensor, "*batch n d"]:
    """Convert a matrix of samples to a tensor of at least fp32.

    Args:
        z: tokens by features, behind any batch dimensions.
        name: the argument's name, for the message.

    Returns:
        fp64 for fp64, else fp32; a view of the input where that is possible.

    Raises:
        ValueError: no numbers, fewer than two dimensions, an empty one, or complex numbers.
    """
    tensor = as_tensor(z, name)
    if tensor.ndim < 2 or 0 in tensor.shape or tensor.is_complex():
        raise ValueError(
            f"{name}: expected real numbers of shape [..., tokens, features], none of them 0; "
            f"found {tuple(tensor.shape)} of {tensor.dtype}: pass one row per token"
        )
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def full_precision(tensor: Tensor) -> torch.autocast:
    """Switch autocast off around our products, which it would otherwise compute in bf16.

    Returns:
        A context manager.
    """
    return torch.autocast(tensor.device.type, enabled=False)


def check_patch(patch: int) -> None:
    """Refuse a patch without tokens.

    Raises:
        ValueError: it is below 1.
    """
    if patch < 1:
        raise ValueError(f"patch: expected at least 1 token, found {patch}: 8 are usual, 1 if all are independent")


def split_patches(z_ND: Float[Tensor, "*batch n d"], patch: int) -> Float[Tensor, "*batch b p d"]:
    """Cut consecutive tokens into patches; an incomplete last one is dropped.

    Returns:
        A view of shape ``[..., n // patch, patch, d]``.

    Raises:
        ValueError: ``patch`` is below 1, or there are fewer tokens than one patch.
    """
    num_tokens = z_ND.shape[-2]
    if not 1 <= patch <= num_tokens:
        raise ValueError(
            f"patch: expected 1 to {num_tokens}, the number of tokens in z {tuple(z_ND.shape)}; found {patch}: "
            "pass more tokens or a shorter patch"
        )
    num_patches = num_tokens // patch
    whole_ND = z_ND[..., : num_patches * patch, :]
    return whole_ND.reshape(*whole_ND.shape[:-2], num_patches, patch, whole_ND.shape[-1])


def largest_entry(z: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Give the scale to divide by: the largest absolute entry, 1 where all are zero.

    The RMS would do as well, but its squares overflow and underflow where this does not. It is detached: every quantity
    divided by it is scale-free, so that the scale's own gradient vanishes.

    Returns:
        The scale, dimensions kept.
    """
    # Two reductions read memory twice; abs() would write a copy of z, at seven times the cost.
    z = z.detach()
    peak = torch.maximum(z.amax(dim, keepdim=True), -z.amin(dim, keepdim=True))
    return torch.where(peak == 0, 1.0, peak)


def unit_rows(z_ND: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n d"]:
    """Divide each row by its norm; a row of zeros has no direction and stays zero.

    Returns:
        Rows of norm 1 (or 0).
    """
    z_ND = z_ND / largest_entry(z_ND, dim=(-1,))
    square_N1 = z_ND.square().sum(-1, keepdim=True)
    return z_ND / torch.where(square_N1 == 0, 1.0, square_N1).sqrt()


def prepare(z_ND: Float[Tensor, "*batch n d"], normalize: bool, center: bool) -> Float[Tensor, "*batch n d"]:
    """Centre, then normalise, as asked, then scale each matrix to entries of at most 1.

    Returns:
        The matrix whose Gram matrix neither overflows nor underflows.
    """
    if center:
        z_ND = z_ND - z_ND.mean(-2, keepdim=True)
    return unit_rows(z_ND) if normalize else z_ND / largest_entry(z_ND, dim=(-2, -1))


def small_gram(z_ND: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch s s"]:
    """Form the Gram matrix on the smaller side, which has the same non-zero spectrum.

    Returns:
        ``z z^T`` where tokens are no more than features, else ``z^T z``.
    """
    return z_ND @ z_ND.mT if z_ND.shape[-2] <= z_ND.shape[-1] else z_ND.mT @ z_ND


def trace(gram_SS: Float[Tensor, "*batch s s"]) -> Float[Tensor, "*batch"]:
    """Give the trace of each matrix.

    Returns:
        Shape ``[...]``.
    """
    return gram_SS.diagonal(dim1=-2, dim2=-1).sum(-1)
