"""Trainings by Lightning's Trainer, with and without the callback; see `jobs`."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
from jobs import TOKENS, VOCABULARY, command_and_wait, digest, found, main, num_hooks, numbers, random_states, settle
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from entropy_hooks.lightning import EntropyCallback

PACKAGES = {"lightning": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
WIDTH = 16


class Steps:
    """Training steps that keep their losses; mixed into the LightningModule of either package."""

    truth: list[float]
    automatic = True

    def keep(self, loss: torch.Tensor) -> torch.Tensor:
        self.truth.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("validation", self.loss(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Language(Steps):
    """Calls itself; beside the network it has a loss module."""

    def build(self):
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(3))
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(WIDTH, VOCABULARY))
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, ids):
        z = self.embed(ids)
        for block in self.blocks:
            z = z + block(z)
        return self.head(z)

    def loss(self, ids):
        return self.criterion(self(ids)[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))

    def training_step(self, batch, index):
        with torch.no_grad():
            self(batch[0][:1])  # a sample in between
        return self.keep(self.loss(batch[0]))


class Network(Language):
    """Calls itself, and so a network inside."""

    def build(self):
        blocks = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.net = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.Linear(WIDTH, VOCABULARY))
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, ids):
        return self.net(ids)

    def training_step(self, batch, index):
        return self.loss(batch[0])


class PastItself(Network):
    """Calls the network inside alone."""

    def loss(self, ids):
        return self.criterion(self.net(ids)[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))


class Autoencoder(Steps):
    """Calls its parts, never itself."""

    def build(self):
        self.encoder = nn.Sequential(nn.Linear(TOKENS, WIDTH), nn.Tanh())
        self.decoder = nn.Linear(WIDTH, TOKENS)
        self.criterion = nn.MSELoss()

    def loss(self, ids):
        x = ids.float() / VOCABULARY
        with torch.no_grad():
            self.encoder(x[:9])  # another number of rows, which no frame may take
        return self.criterion(self.decoder(self.encoder(x)), x)

    def training_step(self, batch, index):
        return self.keep(self.loss(batch[0]))


class Adversarial(Steps):
    """Two optimizers, and two backward passes in one training step."""

    automatic = False

    def build(self):
        self.generator = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, TOKENS))
        self.critic = nn.Sequential(nn.Linear(TOKENS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def training_step(self, batch, index):
        real = batch[0].float() / VOCABULARY
        of_generator, of_critic = self.optimizers()
        noise = torch.randn(len(real), WIDTH)
        with torch.no_grad():
            fake = self.generator(noise)
        losses = []
        critic_loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()
        losses.append(critic_loss.item())
        of_critic.zero_grad()
        self.manual_backward(critic_loss)
        of_critic.step()
        generator_loss = F.softplus(-self.critic(self.generator(noise))).mean()
        losses.append(generator_loss.item())
        of_generator.zero_grad()
        self.manual_backward(generator_loss)
        of_generator.step()
        self.truth.append(losses)

    def loss(self, ids):
        return self.critic(ids.float()).mean()

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (self.generator, self.critic)]


def make_model(steps: type[Steps], package: str = "lightning") -> Any:
    """The steps as a LightningModule of a package."""
    torch.manual_seed(0)
    model = type(steps.__name__, (steps, PACKAGES[package].LightningModule), {})()
    model.build()
    model.truth, model.automatic_optimization = [], steps.automatic
    return model


def watching(package: str, ours: EntropyCallback | None, *, command_at: int | None, fail_at: int | None) -> Any:
    """A callback beside ours: waits for the writer, orders a phase, raises, keeps what is logged."""

    class Watching(PACKAGES[package].Callback):
        def __init__(self) -> None:
            self.logged: list[dict[str, float]] = []
            self.steps = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.steps += 1
            settle(ours and ours.monitor)
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            if self.steps == command_at:
                command_and_wait(Path(ours.run), ours.monitor, weight=50.0)
            if self.steps == fail_at:
                raise RuntimeError("out of memory, say")

    return Watching()


def fit(
    folder: Path,
    ours: EntropyCallback | None,
    steps: type[Steps] = Language,
    *,
    package: str = "lightning",
    command_at: int | None = None,
    fail_at: int | None = None,
    resume: Path | None = None,
    model: Any = None,
    **options: Any,
) -> dict[str, Any]:
    model = make_model(steps, package) if model is None else model  # a compiled one has no truth value
    beside = watching(package, ours, command_at=command_at, fail_at=fail_at)
    loader = DataLoader(TensorDataset(torch.stack(numbers())), batch_size=8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_epochs": -1, "max_steps": 6, "val_check_interval": 1, "limit_val_batches": 1, **options}
    if "enable_checkpointing" not in options:
        options["enable_checkpointing"] = False
    callbacks = [*options.pop("callbacks", []), *([ours] if ours else []), beside]
    torch.manual_seed(1)
    trainer = PACKAGES[package].Trainer(default_root_dir=str(folder), callbacks=callbacks, **quiet, **options)
    trainer.fit(model, loader, loader, ckpt_path=resume and str(resume))
    return {
        "logged": beside.logged,
        "truth": model.truth,
        "parameters": digest(model),
        "random": random_states(),
        "hooks": num_hooks(model, *trainer.optimizers),
    }


def compare(folder: Path, steps: type[Steps] = Language, *, ours: dict[str, Any] | None = None, **options: Any) -> Any:
    callback = EntropyCallback(folder / "run", every=2, **(ours or {}))
    observed = fit(folder, callback, steps, **options)
    faults = dict(callback.monitor.stats().faults)
    plain = fit(folder, None, steps, **options)
    return {"observed": observed, "plain": plain, "run": found(folder / "run"), "faults": faults}


def resumed(folder: Path, steps: type[Steps], **ours: Any) -> dict[str, Any]:
    """A first training ends after three batches and leaves a checkpoint; a second one goes on."""
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="three", save_last=False, save_top_k=-1)
    each = 1 if steps.automatic else 2  # Lightning counts the steps of all optimizers
    first, second = (EntropyCallback(folder / "run", every=2, **ours) for _ in range(2))
    options = {"enable_checkpointing": True, "callbacks": [checkpoint]}
    fit(folder, first, steps, max_steps=3 * each, limit_train_batches=3, **options)
    saved = Path(checkpoint.best_model_path)
    rest = {"max_steps": 6 * each, "limit_train_batches": 3, "resume": saved}
    observed, plain = fit(folder, second, steps, **rest), fit(folder, None, steps, **rest)
    return {"observed": observed, "plain": plain, "run": found(folder / "run")}


def steered(folder: Path) -> dict[str, Any]:
    ours = EntropyCallback(folder / "run", every=2, steer=True)
    observed = fit(folder, ours, command_at=2)
    return {"observed": observed, "plain": fit(folder, None), "run": found(folder / "run")}


def failed(folder: Path) -> dict[str, Any]:
    ours = pickle.loads(pickle.dumps(EntropyCallback(folder / "run", every=2)))  # as to a spawned rank
    model = make_model(Language)
    try:
        fit(folder, ours, model=model, fail_at=3)
    except RuntimeError as error:
        message = str(error)
    ended = not ours.monitor.enabled
    again = fit(folder, ours, model=model)  # the same callback, once more
    return {
        "message": message,
        "ended": ended,
        "hooks": num_hooks(model),
        "run": found(folder / "run"),
        "again": again,
        "copy": copy.deepcopy(ours).monitor is None,
    }


def no_such_optimizer(folder: Path) -> dict[str, Any]:
    try:
        fit(folder, EntropyCallback(folder / "run", optimizer=1))
    except ValueError as error:
        return {"message": str(error), "created": (folder / "run").exists()}
    return {}


def compiled(folder: Path) -> dict[str, Any]:
    """The whole module, and as the message about it says."""
    model = torch.compile(make_model(Network), backend="eager")
    whole = EntropyCallback(folder / "whole", every=2)
    fit(folder, whole, model=model)
    remedies = {}
    for name, steps, compile_it in (
        ("wrapped", Network, lambda model: setattr(model, "net", torch.compile(model.net, backend="eager"))),
        ("in place", Network, lambda model: model.net.compile(backend="eager")),
        ("wrapped, past", PastItself, lambda model: setattr(model, "net", torch.compile(model.net, backend="eager"))),
        ("in place, past", PastItself, lambda model: model.net.compile(backend="eager")),
    ):
        ours, model = EntropyCallback(folder / name, every=2), make_model(steps)
        compile_it(model)
        fit(folder, ours, model=model)
        remedies[name] = {"run": found(folder / name), "faults": dict(ours.monitor.stats().faults)}
    return {"why": whole.monitor.why_disabled, "remedies": remedies}


JOBS = {
    "calls itself": lambda folder: compare(folder),
    "pytorch_lightning": lambda folder: compare(folder, package="pytorch_lightning"),
    "calls its parts": lambda folder: compare(folder, Autoencoder),
    "accumulation": lambda folder: compare(folder, Autoencoder, accumulate_grad_batches=3),
    "bf16": lambda folder: compare(folder, precision="bf16-mixed"),
    "generator": lambda folder: compare(folder, Adversarial, ours={"layers": "generator.*"}, max_steps=12),
    "critic": lambda folder: compare(folder, Adversarial, ours={"layers": "critic.*", "optimizer": 1}, max_steps=12),
    "resumed": lambda folder: resumed(folder, Language),
    "resumed by hand": lambda folder: resumed(folder, Adversarial, layers="generator.*"),
    "steered": steered,
    "failed": failed,
    "no such optimizer": no_such_optimizer,
    "compiled": compiled,  # last: from then on dynamo is at hand
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    main(JOBS, Path(sys.argv[1]))
