"""Running the model once more, and leaving it as it was: the next training step must not be able to tell."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from entropy_hooks.eagerly import run_eagerly

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of each parameter (DTensor, FSDP): the model cannot run by itself.

    Returns:
        True or False.
    """
    return any(hasattr(parameter, "placements") for parameter in model.parameters()) or any(
        getattr(module, "_is_fsdp_managed_module", False) for module in model.modules()
    )


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Put the model in eval mode, on copies of its parameters and buffers, with gradients on and autocast off.

    Within, whatever the model's code does to the random state (of torch, Python and numpy), to parameters or to buffers
    is undone at the end, with or without an exception. Backward passes belong within too: checkpointed blocks run again
    in them. Not undone: Python attributes that ``forward`` counts in, a submodule that the probe function replaces, and
    generators of the user's own.

    Args:
        model: the user's module, unwrapped.
    """
    devices = _devices(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state_kept(model))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(device.type for device in devices)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN refuses the backward pass of a recurrent layer in eval mode.
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False
        stack.enter_context(run_eagerly())
        stack.enter_context(_eval_mode(model))
        stack.enter_context(_on_copies(list(_places(model))))
        yield


@dataclass(frozen=True, slots=True)
class AutocastState:
    """How autocast stood when the model ran."""

    kind: str
    """Type of the device."""
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, kind: str) -> AutocastState:
        """Read it off.

        Returns:
            The state.
        """
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))


@contextlib.contextmanager
def as_in_training(model: nn.Module, autocast: AutocastState) -> Generator[None]:
    """Let a twin of the model run as the model ran in training, eagerly; the random state is undone at the end.

    Args:
        model: the twin.
        autocast: the state in which the model ran.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state_kept(model))
        stack.enter_context(torch.enable_grad())
        # Without the cache: a weight that was cast here must not be met by the user's own passes.
        stack.enter_context(
            torch.autocast(autocast.kind, autocast.dtype, enabled=autocast.enabled, cache_enabled=False)
        )
        stack.enter_context(run_eagerly())
        yield


def _devices(model: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


@contextlib.contextmanager
def random_state_kept(model: nn.Module) -> Generator[None]:
    """At the end, the random state of torch, Python and numpy is as it was.

    Args:
        model: on whose devices.
    """
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device for device in _devices(model) if device.type == "cuda"]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Generator[None]:
    # The flags themselves: the user's own `train()` may do more, or refuse to.
    training = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in training:
            module.training = False
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextlib.contextmanager
def _on_copies(places: list[tuple[nn.Module, str, torch.Tensor]]) -> Generator[None]:
    """Exchange parameters and buffers for copies, tied ones for one copy.

    In eval mode too, a module may count in its buffers and ``nn.Embedding(max_norm=)`` rescales its rows; and a hook of
    the user's on a parameter must see training gradients alone. Frozen parameters, often very large, are not copied.
    """
    copies: dict[int, torch.Tensor] = {}
    try:
        for module, name, original in places:
            if id(original) not in copies:
                copies[id(original)] = _copy(original)
            setattr(module, name, copies[id(original)])
        yield
    finally:
        for module, name, original in places:
            setattr(module, name, original)


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        rescaled = getattr(module, "max_norm", None) is not None
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.requires_grad or rescaled:
                yield module, name, parameter
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            yield module, name, buffer


def _copy(original: torch.Tensor) -> torch.Tensor:
    copy = original.detach().clone()
    return nn.Parameter(copy, original.requires_grad) if isinstance(original, nn.Parameter) else copy
