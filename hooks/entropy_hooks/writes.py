"""Which parameters a model's own code writes to: a twin shares all others with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from entropy_hooks.hidden import all_modules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


def shared_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that ``forward`` can be expected to leave alone.

    Yields:
        Each by its name, a tied one once; not those that an embedding with ``max_norm`` rescales as it looks them up.
    """
    modules = all_modules(model)
    left_out = {id(module.weight) for module in modules.values() if getattr(module, "max_norm", None) is not None}
    for path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in left_out:
                left_out.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter


class Writes:
    """Notices a ``forward`` that writes to parameters: a teacher's moving average, a clamped weight."""

    def __init__(self, model: nn.Module, *, thorough: bool) -> None:
        """Look, before the model runs.

        Args:
            model: the user's module, unwrapped.
            thorough: look at the values too, as ``parameter.data.mul_()`` leaves no other trace.
        """
        self._thorough = thorough
        self._before = self._look(model)
        self._after = self._before

    def look_again(self, model: nn.Module) -> None:
        """The model has run."""
        self._after = self._look(model)

    def found(self) -> set[str]:
        """Ask what was written to; a thorough look waits for the device.

        Returns:
            Names of parameters.
        """
        return {
            name
            for name, (where, total) in self._before.items()
            if (after := self._after.get(name)) is None
            or after[0] != where
            or (total is not None and after[1] is not None and not torch.equal(after[1], total))
        }

    def _look(self, model: nn.Module) -> dict[str, tuple[tuple[int, int], torch.Tensor | None]]:
        return {
            name: ((parameter.data_ptr(), parameter._version), self._total(parameter))
            for name, parameter in shared_parameters(model)
        }

    def _total(self, parameter: nn.Parameter) -> torch.Tensor | None:
        if not self._thorough or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            return None
        return parameter.detach().sum(dtype=torch.float64).nan_to_num()
