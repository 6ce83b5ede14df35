"""A twin of a model: the same parameters, and everything else as it was at one moment.

To run the model itself once more would change what its ``forward`` keeps from call to call (a recurrent state, a cache,
a counter, a generator it draws from) and call the user's own hooks again. The twin is a deep copy: what becomes of
it is no concern of the training.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from entropy_hooks.compiled import compiled_original
from entropy_hooks.contained import Contained
from entropy_hooks.copies import copy_of_model, detached_copy
from entropy_hooks.hidden import all_modules
from entropy_hooks.rebound import rebind
from entropy_hooks.taps import takes_hooks
from entropy_hooks.undisturbed import random_state_kept
from entropy_hooks.user_hooks import every_hook, keep_computing
from entropy_hooks.writes import shared_parameters

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_OF_THE_TRAINING = (Optimizer, LRScheduler, DataLoader, Dataset, logging.Logger)
"""What a module may hold that no forward pass changes, and that may be large."""
_never_freed: list[Any] = []
"""Copies whose end would destroy what the originals hold."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Twin:
    """A model that can be run without a trace, and the arguments of the call at whose beginning it was made.

    It is emptied when nobody holds it any more: a cache that has its modules for keys must not keep what is in them.
    """

    model: nn.Module
    taps: dict[str, nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    contained: Contained
    """Within it, the twin may write to what is its own, and to nothing else."""


class EndsWithItselfError(TypeError):
    """An object has a ``__del__``, which would run once more at the end of a copy of it."""


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
    originals = set(map(id, modules))
    for module in modules:
        # A bound method would be copied with the object that it belongs to: a logger, a whole trainer.
        kept.update((id(hook), hook) for hook in every_hook(module))
        kept.update((id(value), value) for value in vars(module).values() if isinstance(value, _OF_THE_TRAINING))
    contained = Contained()
    with random_state_kept(model), contained.owning():  # whatever the user's own classes do when they are copied
        for module in reversed(modules):  # innermost first
            if (original := compiled_original(module)) is not None:
                kept[id(module)] = copy_of_model(original, kept)
        twin = copy_of_model(model, kept)
        args, kwargs = detached_copy((args, kwargs), kept)
        # A module whose `__deepcopy__` returns itself is the model's own, and is left alone.
        twins = [each for each in all_modules(twin).values() if id(each) not in originals]
        for module in filter(takes_hooks, twins):
            vars(module)["_compiled_call_impl"] = None
            keep_computing(module)
        rebind(twins, kept)
    copies = [copy for original, copy in kept.items() if id(copy) != original]
    _refuse_ends(copies)
    contained.own(*(copy for copy in copies if isinstance(copy, torch.Tensor)))
    made = Twin(twin, {name: kept[id(tap)] for name, tap in taps.items()}, args, kwargs, contained)
    weakref.finalize(made, _empty, [each for each in twins if takes_hooks(each)]).atexit = False
    return made


def _refuse_ends(copies: Iterable[Any]) -> None:
    with_ends = [copy for copy in copies if hasattr(type(copy), "__del__")]
    if with_ends:
        _never_freed.extend(with_ends)
        raise EndsWithItselfError(f"has a {type(with_ends[0]).__name__}, whose __del__ would run for the copy too")


def _empty(modules: list[nn.Module]) -> None:
    for module in modules:
        vars(module).clear()
        nn.Module.__init__(module)  # whoever meets it finds a module
