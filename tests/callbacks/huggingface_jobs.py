"""Trainings by the Hugging Face Trainer, with and without the callback; see `jobs`."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from jobs import (
    TOKENS,
    VOCABULARY,
    command_and_wait,
    digest,
    found,
    main,
    num_hooks,
    numbers,
    random_states,
    settle,
)
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from entropy_hooks.huggingface import EntropyCallback


class Watching(TrainerCallback):
    """Beside ours: keeps every training pass's mean cross-entropy, evaluates by generating, waits for the writer."""

    def __init__(self, ours: EntropyCallback | None) -> None:
        self.ours, self.truth = ours, []

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        def see(module, args, inputs, output):
            if module.training and torch.is_grad_enabled():
                logits, labels = output.logits.detach()[:, :-1].float(), inputs["labels"][:, 1:]
                self.truth.append(F.cross_entropy(logits.reshape(-1, VOCABULARY), labels.reshape(-1)).item())

        self.handle = model.register_forward_hook(see, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()

    def on_step_end(self, args, state, control, *, model, **kwargs):
        with torch.no_grad():  # as a sample for people to read
            model.generate(torch.zeros(1, 4, dtype=torch.long), max_new_tokens=2, do_sample=False, pad_token_id=0)
        settle(self.ours and self.ours.monitor)


class Steering(TrainerCallback):
    def __init__(self, ours: EntropyCallback) -> None:
        self.ours = ours

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            command_and_wait(Path(self.ours.run), self.ours.monitor, weight=5.0)


class Failing(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        settle(next(one.monitor for one in OURS if one.monitor.enabled))
        if state.global_step == 3:
            raise RuntimeError("out of memory, say")


OURS: list[EntropyCallback] = []


def make_model() -> GPT2LMHeadModel:
    set_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": TOKENS, "n_embd": 16, "n_layer": 3, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def make_trainer(folder: Path, callbacks: list[TrainerCallback], model: Any = None, **options: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in numbers()]
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "full_determinism": False, **quiet, **options}
    arguments = TrainingArguments(str(folder / "out"), **options)
    return Trainer(model or make_model(), arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=callbacks)


def train(
    folder: Path, ours: EntropyCallback | None, *more: TrainerCallback, resume: Any = None, **options: Any
) -> dict:
    watching = Watching(ours)
    trainer = make_trainer(folder, [*([ours] if ours else []), watching, *more], **options)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "logged": [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry],
        "truth": watching.truth,
        "parameters": digest(trainer.model),
        "random": random_states(),
        "hooks": num_hooks(trainer.model, trainer.optimizer.optimizer),
        "history": trainer.state.log_history,
    }


def compare(folder: Path, **options: Any) -> dict[str, Any]:
    ours = EntropyCallback(folder / "run", every=2)
    observed, plain = train(folder / "observed", ours, **options), train(folder / "plain", None, **options)
    return {
        "observed": observed,
        "plain": plain,
        "run": found(folder / "run"),
        "faults": dict(ours.monitor.stats().faults),
    }


def resumed(folder: Path) -> dict[str, Any]:
    ours = EntropyCallback(folder / "run", every=2)
    options = {"save_strategy": "steps", "save_steps": 3}
    plain = train(folder / "plain", None, **options)
    whole = train(folder / "observed", ours, **options)
    again = train(folder / "observed", ours, resume=str(folder / "observed" / "out" / "checkpoint-3"), **options)
    return {"plain": plain, "whole": whole, "again": again, "run": found(folder / "run")}


def steered(folder: Path) -> dict[str, Any]:
    ours = EntropyCallback(folder / "run", every=2, steer=True)
    observed = train(folder / "observed", ours, Steering(ours))
    return {"observed": observed, "plain": train(folder / "plain", None), "run": found(folder / "run")}


def copied(folder: Path) -> dict[str, Any]:
    """Before, while and after: what Ray, Optuna and spawned processes do to a Trainer's callbacks."""
    copies = []

    class Copying(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            copies.extend([copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))])

    ours = pickle.loads(pickle.dumps(EntropyCallback(folder / "run", every=2)))
    train(folder / "observed", ours, Copying(), max_steps=1)
    copies.append(copy.deepcopy(ours))
    expected = {**vars(ours), "monitor": None}
    return {"monitors": [one.monitor is None for one in copies], "same": [vars(one) == expected for one in copies]}


def raised(folder: Path) -> dict[str, Any]:
    """The Trainer tells nobody of an exception: the next training of the model puts things in order."""
    model, first, second = (
        make_model(),
        EntropyCallback(folder / "first", every=2),
        EntropyCallback(folder / "second", every=2),
    )
    OURS[:] = [first]
    try:
        make_trainer(folder / "a", [first, Failing()], model).train()
    except RuntimeError as error:
        message = str(error)
    left = first.monitor.enabled
    train(folder / "b", second, model=model)
    return {
        "message": message,
        "left": left,
        "then": first.monitor.enabled,
        "hooks": num_hooks(model),
        "first": found(folder / "first"),
        "second": found(folder / "second"),
        "faults": dict(second.monitor.stats().faults),
    }


def raised_at_last(folder: Path) -> None:
    """Ends the process."""
    OURS[:] = [EntropyCallback(folder / "run", every=2)]
    make_trainer(folder, [*OURS, Failing()]).train()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    main(
        {
            "plain": lambda inside: compare(inside, eval_strategy="steps", eval_steps=2),
            "accumulation": lambda inside: compare(inside, gradient_accumulation_steps=3),
            "bf16": lambda inside: compare(inside, bf16=True),
            "checkpointing": lambda inside: compare(
                inside, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
            ),
            "checkpointing, reentrant": lambda inside: compare(
                inside, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
            ),
            "resumed": resumed,
            "steered": steered,
            "copied": copied,
            "raised": raised,
        },
        folder,
    )
    raised_at_last(folder / "last")
