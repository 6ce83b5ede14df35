"""A bounded sample of the patches of a stream that comes out the same in whatever order and portions it arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float, Int
    from torch import Tensor

NUM_ROWS = 16384
"""Tokens held at most, in whole patches: 6.5 MB of fp32 at 100 bins."""

_HASHED_FEATURES = 32
_ODD = (0x9E37_79B9_7F4A_7C15 - 2**64, 0xBF58_476D_1CE4_E5B9 - 2**64, 0x94D0_49BB_1331_11EB - 2**64)
"""Constants of the splitmix64 hash, as signed numbers."""


@dataclass(frozen=True, slots=True)
class Reservoir:
    """The patches of lowest priority, ordered by priority; R rows."""

    priority_R: Int[Tensor, " r"]
    """Hash of the row's patch."""
    p_RM: Float[Tensor, "r m"]
    labels: Mapping[str, Int[Tensor, " r"]]

    def lowest(self, patch: int) -> Reservoir:
        """Keep as many patches of lowest priority as are to be held.

        Returns:
            A new reservoir, ordered.
        """
        priority_R, order_R = self.priority_R.sort(stable=True)
        _, patch_R = torch.unique_consecutive(priority_R, return_inverse=True)
        kept = int((patch_R < NUM_ROWS // patch).sum())
        order_R = order_R[:kept]
        labels = {name: label_R[order_R] for name, label_R in self.labels.items()}
        return Reservoir(priority_R[:kept], self.p_RM[order_R], labels)

    def joined(self, other: Reservoir, patch: int) -> Reservoir:
        """Keep the patches of lowest priority of both.

        Returns:
            A new reservoir.
        """
        return Reservoir(
            torch.cat([self.priority_R, other.priority_R]),
            torch.cat([self.p_RM, other.p_RM]),
            {name: torch.cat([label_R, other.labels[name]]) for name, label_R in self.labels.items()},
        ).lowest(patch)

    def sum_patches(self, values_RF: Float[Tensor, "r f"]) -> Float[Tensor, "b f"]:
        """Sum over the rows of each patch.

        Returns:
            One row for each patch held.
        """
        _, patch_R = torch.unique_consecutive(self.priority_R, return_inverse=True)
        return values_RF.new_zeros(int(patch_R[-1]) + 1, values_RF.shape[1]).index_add_(0, patch_R, values_RF)


def patch_priorities(
    z_ND: Float[Tensor, "n d"], labels: Mapping[str, Int[Tensor, " n"]], patch: int
) -> Int[Tensor, " n"]:
    """Hash each patch by the bits of its activations and labels: a random number that depends on nothing else.

    Args:
        z_ND: activations as they came; up to 32 features, evenly spaced, are looked at.
        labels: every label set.
        patch: tokens in a patch; the last one may be shorter.

    Returns:
        The same number for all rows of a patch.
    """
    num_tokens, num_features = z_ND.shape
    step = -(-num_features // _HASHED_FEATURES)
    bits_NF = z_ND[:, ::step].float().contiguous().view(torch.int32).long()
    columns = [bits_NF, *(labels[name][:, None].long() for name in sorted(labels))]
    bits_NF = torch.cat([column.cpu() for column in columns], dim=1)
    row_N = _mix(_mix(bits_NF * _odd_numbers(bits_NF.shape[1])).sum(1))
    padded_BP = torch.nn.functional.pad(row_N, (0, -num_tokens % patch)).reshape(-1, patch)
    return _mix((padded_BP * _odd_numbers(patch)).sum(1)).repeat_interleave(patch)[:num_tokens]


def _odd_numbers(count: int) -> Tensor:
    return _mix(torch.arange(1, count + 1)) | 1


def _mix(values: Tensor) -> Tensor:
    """Scramble 64 bits, as splitmix64 does; products wrap around.

    Returns:
        int64, a permutation of all such numbers.
    """
    values = values * _ODD[0]
    values = (values ^ _shift_right(values, 30)) * _ODD[1]
    values = (values ^ _shift_right(values, 27)) * _ODD[2]
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    # ``>>`` of signed numbers draws the sign along, which would cancel it.
    return (values >> bits) & ((1 << (64 - bits)) - 1)
