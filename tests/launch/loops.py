"""Training loops in this process, and the dictionaries that hooks stand in."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from net import Net, batch, loss_of
from torch.nn.modules import module as global_module_hooks
from torch.optim import optimizer as global_optimizer_hooks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["Loop", "Net", "batch", "hook_dictionaries", "loss_of", "until"]


def hook_dictionaries(*owners: object) -> dict[str, dict[Any, Any]]:
    """Every dictionary of hooks: torch's global ones, those of optimizers, those of each module of a model."""
    found: dict[str, dict[Any, Any]] = {}
    parts: list[tuple[str, object]] = [("module", global_module_hooks), ("optimizer", global_optimizer_hooks)]
    for number, owner in enumerate(owners):
        modules = dict(owner.named_modules()) if isinstance(owner, torch.nn.Module) else {"": owner}
        parts += [(f"{number}.{name}", part) for name, part in modules.items()]
    for name, part in parts:
        for attribute, value in vars(part).items():
            if "hook" in attribute and isinstance(value, dict):
                found[f"{name}.{attribute}"] = dict(value)
    assert len(found) > 10
    return {**found, "backward": {0: torch.autograd.backward}}


def until(condition: Callable[[], Any], what: str, deadline_s: float = 20.0) -> Any:
    deadline = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {deadline_s} s in vain for {what}"
        time.sleep(0.002)
    return value


class Loop:
    """A model that trains on a thread of its own, until it is stopped; counts its steps."""

    def __init__(self, model: nn.Module | None = None, *, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW):
        torch.manual_seed(0)
        self.model = Net() if model is None else model
        self.optimizer = optimizer(self.model.parameters(), lr=1e-3)
        self.losses: list[float] = []
        self.pause_s = 0.001
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._thread = threading.Thread(target=self._work, name="training")

    @property
    def steps(self) -> int:
        return len(self.losses)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = loss_of(self.model, batch())
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def idle(self, *, idle: bool = True) -> None:
        """Evaluate, save, wait for data: whatever makes no steps."""
        (self._idle.set if idle else self._idle.clear)()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                if not self._idle.is_set():
                    self.step()
                time.sleep(self.pause_s)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Loop:
        self._thread.start()
        until(lambda: self.steps or self.error, "the first step")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert self.error is None, self.error
