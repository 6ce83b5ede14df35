"""Forward hooks that turn what a model's blocks put out into soft counts, on the spot."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from entropy_monitor.errors import EntropyMonitorError
from entropy_monitor.estimators import SoftEntropyAccumulator

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from torch import Tensor, nn


class Listener:
    """Feeds what the tapped modules put out into one accumulator each."""

    def __init__(self, num_bins: int, patch: int) -> None:
        self._num_bins, self._patch = num_bins, patch
        self._shape = torch.Size()
        self._labels: Mapping[str, Tensor] = {}
        self.found: dict[str, SoftEntropyAccumulator] = {}

    def expect(self, ids_BT: Tensor, labels: Mapping[str, Tensor]) -> None:
        """Say what the next forward pass is given.

        Args:
            ids_BT: its ids, ``[batch, tokens]``.
            labels: of its tokens in order, ``[n]`` each.
        """
        self._shape, self._labels = ids_BT.shape, labels

    @contextlib.contextmanager
    def attached(self, taps: Mapping[str, nn.Module]) -> Generator[None]:
        """Listen; afterwards the modules are as they were.

        Args:
            taps: modules by name.

        Yields:
            Nothing: modules are heard within.
        """
        handles = [
            module.register_forward_hook(
                lambda _module, _arguments, output, layer=layer: self._hear(layer, output)  # pyright: ignore[reportUnknownLambdaType]
            )
            for layer, module in taps.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hear(self, layer: str, output: Any) -> None:
        z_BTD = _activation(output)
        if z_BTD is None or z_BTD.ndim != 3 or z_BTD.shape[:2] != self._shape:
            found = type(output).__name__ if z_BTD is None else f"shape {tuple(z_BTD.shape)}"
            raise EntropyMonitorError(
                f"expected {layer} to put out [{', '.join(map(str, self._shape))}, features]; found {found}: "
                "choose the residual blocks with --layers"
            )
        if not bool(z_BTD.isfinite().all()):
            raise EntropyMonitorError(
                f"expected finite activations; {layer} puts out NaN or infinity: check the checkpoint, or load it in "
                "a wider precision"
            )
        if layer not in self.found:
            self.found[layer] = SoftEntropyAccumulator(z_BTD.shape[-1], patch=self._patch, num_bins=self._num_bins)
        self.found[layer].update(z_BTD.flatten(0, 1), self._labels)

    def accumulators(self, taps: Mapping[str, nn.Module], num_tokens: int) -> dict[str, SoftEntropyAccumulator]:
        """What was heard, checked to be every token once.

        Args:
            taps: the modules that should have been heard.
            num_tokens: tokens shown to the model.

        Returns:
            Layer to accumulator, in model order.

        Raises:
            EntropyMonitorError: a module ran more or less than once in a forward pass.
        """
        for layer in taps:
            heard = self.found.get(layer)
            seen = 0 if heard is None else heard.num_samples + heard.num_undetermined
            if seen != num_tokens:
                raise EntropyMonitorError(
                    f"expected {layer} to run once in a forward pass; it ran {seen / num_tokens:g} times: choose other "
                    "blocks with --layers"
                )
        return {layer: self.found[layer] for layer in taps}


def _activation(output: Any) -> Tensor | None:
    """Take the tensor, or the first of a tuple or of a Hugging Face output.

    Returns:
        The tensor, or None.
    """
    if isinstance(output, torch.Tensor):
        return output
    parts: Sequence[Any] = list(output.values()) if isinstance(output, dict) else output  # type: ignore[assignment]
    first = parts[0] if isinstance(parts, tuple | list) and parts else None
    return first if isinstance(first, torch.Tensor) else None
