"""A twin of a model: the same parameters, and everything else as it was at one moment.

To run the model itself once more would change what its ``forward`` keeps from call to call (a recurrent state, a cache,
a counter, a generator it draws from) and call the user's own hooks again. The twin is a deep copy: what becomes of
it is no concern of the training.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from entropy_hooks.copies import detached_copy
from entropy_hooks.hidden import all_modules
from entropy_hooks.rebound import rebind
from entropy_hooks.taps import takes_hooks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_THE_TRAINING = (Optimizer, LRScheduler, DataLoader, Dataset, logging.Logger)
"""What a module may hold that no forward pass changes, and that may be large."""
_COMPUTE_WEIGHTS = "torch.nn.utils."
"""Where torch's own hooks are defined that make a weight before each call: weight norm, spectral norm, pruning."""


@dataclass(frozen=True, slots=True)
class Twin:
    """A model that can be run without a trace, and the arguments of the call at whose beginning it was made."""

    model: nn.Module
    taps: dict[str, nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def make_twin(
    model: nn.Module,
    taps: dict[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    written: Collection[str],
) -> Twin:
    """Copy a model that is about to be called, and what it is called with.

    Args:
        model: the user's module, unwrapped.
        taps: layers of it, by name.
        args: of the call.
        kwargs: of the call.
        written: names of parameters that ``forward`` writes to, which the twin does not share.

    Returns:
        The twin, in which nothing is compiled and no hook of the user's is left.

    Raises:
        Exception: whatever an object in it raises that cannot be copied.
    """
    kept: dict[int, Any] = {id(entry): entry for name, entry in shared_parameters(model) if name not in written}
    modules = list(all_modules(model).values())
    for module in modules:
        # A bound method would be copied with the object that it belongs to: a logger, a whole trainer.
        kept.update((id(hook), hook) for hooks in _hook_dictionaries(module) for hook in hooks.values())
        kept.update((id(value), value) for value in vars(module).values() if isinstance(value, _OF_THE_TRAINING))
    for module in reversed(modules):  # innermost first
        if hasattr(module, "_orig_mod"):  # what `torch.compile` has wrapped
            kept[id(module)] = detached_copy(module._orig_mod, kept)
    twin, args, kwargs = detached_copy((model, args, kwargs), kept)
    twins = list(all_modules(twin).values())
    for module in filter(takes_hooks, twins):
        vars(module)["_compiled_call_impl"] = None
        for name in _HOOKS:
            hooks = vars(module)[name]
            vars(module)[name] = OrderedDict((key, hook) for key, hook in hooks.items() if computes_weights(hook))
    rebind(twins, kept)
    return Twin(twin, {name: kept[id(tap)] for name, tap in taps.items()}, args, kwargs)


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


def hooks_everywhere() -> bool:
    """Whether somebody has global module hooks, which would be called for the twin too.

    Returns:
        True or False.
    """
    return any(getattr(global_hooks, f"_global{name}", None) for name in _HOOKS)


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


def _hook_dictionaries(module: nn.Module) -> Iterator[dict[int, Any]]:
    for name, value in vars(module).items():
        if "hook" in name and isinstance(value, dict):
            yield value


def computes_weights(hook: Any) -> bool:
    """Whether a hook is torch's own and makes a weight before each call.

    Returns:
        True or False.
    """
    return str(getattr(hook, "__module__", "")).startswith(_COMPUTE_WEIGHTS)
