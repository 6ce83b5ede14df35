"""Lightning, as ``lightning`` or ``pytorch_lightning``: ``Trainer(callbacks=[EntropyCallback("runs/gpt2")])``."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

from entropy_hooks.callback import TrainingCallback
from entropy_hooks.compiled import only_compiled_part
from entropy_monitor.errors import ConfigError

if TYPE_CHECKING:
    import os

    from lightning.pytorch import Callback as LightningCallback
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

__all__ = ["EntropyCallback"]


def _callback_classes() -> tuple[type, ...]:
    """The class of each package that is installed: a Trainer of one refuses a callback of the other.

    Returns:
        One class or two.

    Raises:
        ModuleNotFoundError: neither package is installed.
    """
    found: list[type] = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(package).Callback)
        except ModuleNotFoundError as error:
            if error.name not in {"lightning", package}:
                raise
    if not found:
        raise ModuleNotFoundError(
            "expected lightning or pytorch_lightning for entropy_hooks.lightning; found neither: pip install lightning",
            name="lightning",
        )
    return tuple(found)


if not TYPE_CHECKING:
    LightningCallback = type("LightningCallback", _callback_classes(), {})


class EntropyCallback(TrainingCallback, LightningCallback):
    """Observes each ``fit`` of a Lightning Trainer, on every rank; ``EntropyCallback(run, **options)``.

    ``options`` are those of `entropy_hooks.attach`. Steps are optimizer steps, in automatic optimization Lightning's
    ``global_step``: a training resumed by ``ckpt_path`` is a new attempt of the same run that goes on at the restored
    step. With ``steer=True`` the Trainer's loggers have ``entropy/phase`` and ``entropy/weight``. An exception in
    training, or Ctrl-C, detaches.
    """

    def __init__(self, run: str | os.PathLike[str] | None = None, *, optimizer: int = 0, **options: Any) -> None:
        """Check the options.

        Args:
            run: directory of the run, as for `entropy_hooks.attach`.
            optimizer: which one counts the steps, as an index of what ``configure_optimizers`` returns. A frame holds
                the last backward pass before this one's step.
            **options: as for `entropy_hooks.attach`.
        """
        super().__init__(run, **options)
        self.optimizer = optimizer
        self._restored_step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the optimizers are there, and a checkpoint has been loaded.

        Raises:
            ConfigError: there is no such optimizer.
        """
        optimizers = trainer.optimizers
        if not 0 <= self.optimizer < len(optimizers):
            raise ConfigError(
                f"expected optimizer to be an index below {len(optimizers)}; found {self.optimizer}: "
                "it counts what configure_optimizers returns"
            )
        start_step, planned = trainer.global_step, trainer.estimated_stepping_batches
        restored, self._restored_step = self._restored_step, None
        if not pl_module.automatic_optimization:  # then both count the steps of all optimizers
            start_step = start_step // len(optimizers) if restored is None else restored
            if trainer.max_steps > 0:
                planned = min(planned, trainer.max_steps // len(optimizers))
        total_steps = int(planned) if math.isfinite(planned) and planned > 0 else None
        self.begin(
            self._what_runs(pl_module), optimizers[self.optimizer], start_step=start_step, total_steps=total_steps
        )
        if getattr(pl_module, "_compiler_ctx", None) is not None and self.monitor is not None and self.monitor.enabled:
            self.monitor.fault(
                "not_observed",
                "expected a LightningModule not compiled itself; found torch.compile(module), of which Lightning "
                "calls the compiled training_step alone: compile the network inside instead, self.net = "
                "torch.compile(self.net) or self.net.compile()",
            )

    def _what_runs(self, pl_module: LightningModule) -> nn.Module:
        """A compiled network is called past the LightningModule, which only holds it.

        Returns:
            What to attach to; the LightningModule itself where the layers are named from there.
        """
        network = None if "layers" in self.options else only_compiled_part(pl_module)
        return pl_module if network is None else network

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Add the phase to the loggers' metrics."""
        if metrics := self.phase_metrics():
            pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write every frame and detach."""
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write every frame and detach, also at Ctrl-C."""
        self.end()

    def state_dict(self) -> dict[str, Any]:
        """The step, which a checkpoint of a training with several optimizers does not know.

        Returns:
            The optimizer steps done; nothing before the first training.
        """
        return {} if self.monitor is None else {"step": self.monitor.stats().step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the checkpoint's step."""
        self._restored_step = state_dict["step"]
