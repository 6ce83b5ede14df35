"""Which modules are observed."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from entropy_hooks.compiled import compiled_original
from entropy_monitor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, FSDP and `torch.compile`.

    Returns:
        The innermost module.
    """
    return wrappers(model)[-1]


def wrappers(model: nn.Module) -> list[nn.Module]:
    """A module and what it wraps.

    Returns:
        From the outermost to the user's own module.
    """
    chain = [model]
    while True:
        inner = compiled_original(model)
        if inner is None and type(model).__name__ in {
            "DistributedDataParallel",
            "DataParallel",
            "FullyShardedDataParallel",
        }:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return chain
        model = inner
        chain.append(model)


def find_taps(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """Choose the modules whose outputs are observed.

    Args:
        model: the unwrapped model.
        layers: names or globs; None takes the residual blocks (the longest `ModuleList` of one class), else recurrent
            modules, else the top-level children (of the sole child, where only one has parameters).

    Returns:
        Name to module, in model order; modules that `torch.jit.script` has made, which take no hooks, are left out.

    Raises:
        ConfigError: a name or glob matches nothing, or the model has no submodules that take hooks.
    """
    if layers is not None:
        return _matching(model, layers)
    blocks = _residual_blocks(model)
    if blocks:
        return blocks
    recurrent = {name: module for name, module in model.named_modules() if isinstance(module, nn.RNNBase)}
    taps: dict[str, nn.Module] = {**recurrent} or _children(model)
    if not taps:
        raise ConfigError(
            f"expected a model with submodules in Python to observe; found {type(model).__name__} without any: "
            "give its parent"
        )
    return taps


def _residual_blocks(model: nn.Module) -> dict[str, nn.Module]:
    longest: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        same_class = isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
        if same_class and takes_hooks(module[0]) and len(module) > max(1, len(longest)):  # type: ignore[arg-type,index]
            longest = {f"{name}.{index}": child for index, child in enumerate(module)}  # type: ignore[arg-type]
    return longest


def takes_hooks(module: nn.Module) -> bool:
    """Whether a module is in Python; one that `torch.jit` has made refuses hooks.

    Returns:
        True or False.
    """
    return not isinstance(module, torch.jit.ScriptModule)


def parts(model: nn.Module, taps: Collection[str]) -> list[nn.Module]:
    """Modules that a training loop may call in the model's place: its children, and tapped layers with all above them.

    Lightning calls ``training_step``, which may run ``self.encoder`` and ``self.decoder`` and never the module itself.

    Args:
        model: the unwrapped model.
        taps: names of the tapped layers.

    Returns:
        The modules, in model order; containers, which nobody calls, are left out.
    """
    names = set(dict(model.named_children()))
    for tap in taps:
        pieces = tap.split(".")
        names.update(".".join(pieces[:end]) for end in range(1, len(pieces) + 1))
    return [
        module
        for name, module in model.named_modules()
        if name in names and takes_hooks(module) and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]


def _children(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    children = {
        f"{prefix}{name}": child
        for name, child in model.named_children()
        if takes_hooks(child) and not _is_loss_or_metric(child)
    }
    trained = [name for name, child in children.items() if next(child.parameters(), None) is not None]
    if len(trained) == 1 and (inner := _children(children[trained[0]], f"{trained[0]}.")):
        return inner
    return children


def _is_loss_or_metric(module: nn.Module) -> bool:
    """A LightningModule keeps them beside its network; their output has no tokens.

    Returns:
        True or False.
    """
    packages = {".".join(kind.__module__.split(".")[:4]) for kind in type(module).__mro__}
    return "torch.nn.modules.loss" in packages or any(package.startswith("torchmetrics.") for package in packages)


def _matching(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name and takes_hooks(module)}
    chosen = {name for pattern in layers for name in modules if fnmatchcase(name, pattern)}
    missing = [pattern for pattern in layers if not any(fnmatchcase(name, pattern) for name in modules)]
    if missing or not chosen:
        raise ConfigError(
            f"expected layers among {_some(modules)}; found {', '.join(missing) or 'no name'}: "
            "correct the names or globs"
        )
    return {name: module for name, module in modules.items() if name in chosen}


def steered_layers(taps: Sequence[str], chosen: Sequence[str] | None) -> tuple[str, ...]:
    """The tapped layers that are steered: indices ``L//4 .. L-1-L//4`` unless chosen by name.

    Args:
        taps: names of the tapped layers, in model order.
        chosen: names or globs among them, or None.

    Returns:
        Their names.

    Raises:
        ConfigError: a name or glob matches nothing.
    """
    if chosen is None:
        quarter = len(taps) // 4
        return tuple(taps[quarter : len(taps) - quarter])
    names = tuple(name for name in taps if any(fnmatchcase(name, pattern) for pattern in chosen))
    missing = [pattern for pattern in chosen if not any(fnmatchcase(name, pattern) for name in taps)]
    if missing or not names:
        raise ConfigError(
            f"expected steer_layers among the tapped {_some(taps)}; found {', '.join(missing) or 'no name'}: "
            "correct the names or globs"
        )
    return names


def _some(names: Collection[str]) -> str:
    shown = list(names)[:12]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def first_tensor(output: Any) -> torch.Tensor | None:
    """The activation in a module's output: the tensor itself, or the first one of a tuple, list or mapping.

    Returns:
        The tensor, or None.
    """
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    return None


def first_embedding(model: nn.Module) -> nn.Embedding | None:
    """The module whose input is the token ids.

    Returns:
        The first `nn.Embedding`, or None.
    """
    return next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
