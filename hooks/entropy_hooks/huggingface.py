"""Hugging Face: ``Trainer(..., callbacks=[EntropyCallback("runs/gpt2")])``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from entropy_hooks.callback import TrainingCallback

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "expected transformers for entropy_hooks.huggingface; found none: pip install 'transformers[torch]'",
        name="transformers",
    ) from None

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["EntropyCallback"]


class EntropyCallback(TrainingCallback, TrainerCallback):
    """Observes each training of a `transformers.Trainer`, on every rank; ``EntropyCallback(run, **options)``.

    ``options`` are those of `entropy_hooks.attach`. Steps are the Trainer's ``global_step``: a training resumed from a
    checkpoint is a new attempt of the same run that goes on at the restored step. With ``steer=True`` the Trainer's log
    has ``entropy/phase`` and ``entropy/weight``.

    The Trainer tells its callbacks of no exception: see `TrainingCallback`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach: the optimizer is there, and a checkpoint has been loaded."""
        model: nn.Module = kwargs["model"]
        optimizer: Optimizer = kwargs["optimizer"]
        self.begin(model, optimizer, start_step=state.global_step, total_steps=state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the phase to what is printed and to the state's history, which holds a copy of it."""
        metrics = self.phase_metrics()
        if metrics and state.log_history:
            state.log_history[-1].update(metrics)
            kwargs["logs"].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write every frame and detach."""
        self.end()
