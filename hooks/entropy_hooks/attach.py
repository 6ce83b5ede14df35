"""`attach`: one line in any training script."""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from entropy_hooks.faults import Faults
from entropy_hooks.monitor import Monitor, live_monitors
from entropy_hooks.ranks import agree_on_attempt, rank_and_world_size
from entropy_hooks.record import attempt_record
from entropy_hooks.session import Session
from entropy_hooks.taps import find_taps, steered_layers, takes_hooks, unwrap
from entropy_hooks.target import Target
from entropy_monitor.config import hooks_disabled, load_config
from entropy_monitor.errors import ConfigError, EntropyMonitorError
from entropy_monitor.store import create_run, trim_vanished_ranks, write_heartbeat
from entropy_monitor.store.layout import rank_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from entropy_monitor.config import MonitorConfig, MonitorOptions
    from entropy_monitor.store import Run

logger = logging.getLogger("entropy_hooks")

_processes: set[int] = set()
"""Processes that have opened a store: TensorStore aborts a fork of one that uses it again."""


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    run: str | os.PathLike[str] | None = None,
    probe: Callable[[nn.Module], torch.Tensor] | None = None,
    **options: Any,
) -> Monitor:
    """Observe a training job, and let commands steer it if ``steer=True``.

    Training is bit-identical to a job without this line unless a compress command is applied. Whatever fails, here or
    later, is counted, logged once and never raised into training.

    Args:
        model: the model that trains, wrapped or not.
        optimizer: its optimizer, wrapped or not; each ``optimizer.step()`` is a step. Several are given in the order in
            which they step: a step is one round of them.
        run: directory of the run; else ``ENTROPY_MONITOR_RUN``, ``run`` in ``./monitor.toml``, or ``runs/TIME``.
        probe: for ``exact_alignment_every`` and ``observe="probe"``, a function that runs the model it is given on a
            fixed batch and returns the 0-d loss. Else the first training batch is the probe, with the loss that the
            model returns or the cross-entropy of each next token. The model's own code and hooks see these runs: what
            they count in Python attributes is not undone.
        **options: fields of `entropy_monitor.config.MonitorOptions`.

    Returns:
        The monitor, also when this model is observed already; disabled when the run cannot be written or the hooks
        cannot be placed, and then everything is as it was.

    Raises:
        ConfigError: an option is wrong (a ValueError, as an unknown layer gives); nothing has been created.
    """
    prepared = prepare(model, optimizer, run=run, probe=probe, **options)
    return prepared if isinstance(prepared, Monitor) else prepared.install()


@dataclass(frozen=True, slots=True)
class Prepared:
    """An attempt that has been claimed, and what it will observe; no hook is installed yet."""

    opened: Run
    place: tuple[int, int]
    """Attempt and rank."""
    target: Target
    options: MonitorOptions
    faults: Faults

    def install(self, start_step: int | None = None) -> Monitor:
        """Install the hooks; on the training thread, between two optimizer steps.

        Args:
            start_step: the number of the optimizer step that begins now; that of the options when None.

        Returns:
            The monitor, also when somebody else has attached to this model since; disabled when it could not be done,
            and then model, optimizers and process are as they were.
        """
        if (existing := observed_by(self.target.model)) is not None:
            return existing
        options = self.options if start_step is None else replace(self.options, start_step=start_step)
        monitor = Monitor(options, self.faults, self.opened.objects.url)
        monitor.model_name, monitor.layers = type(self.target.model).__name__, self.target.layers
        try:
            monitor.begin(Session(self.opened, self.place, self.target, options, monitor.phase_control, self.faults))
        except Exception as error:
            failed = _not_attached(options, self.faults, error)
            self._say_goodbye(options.start_step)
            return failed
        return monitor

    def _say_goodbye(self, step: int) -> None:
        """The run's readers shall not wait for an attempt that has ended before its first step."""
        attempt, rank = self.place
        fields = {"state": "ended", "pid": os.getpid(), "host": socket.gethostname(), "attempt": attempt, "rank": rank}
        try:
            faults = self.faults.snapshot()
            write_heartbeat(self.opened.objects, rank_name(rank), {**fields, "step": step, "faults": faults})
        except Exception as error:
            self.faults.count("heartbeat_failed", error)


def observed_by(model: nn.Module) -> Monitor | None:
    """Who observes a model.

    Returns:
        The monitor, or None.
    """
    inner = unwrap(model)
    return next((monitor for monitor in live_monitors() if monitor.observes(inner)), None)


def prepare(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    run: str | os.PathLike[str] | None = None,
    probe: Callable[[nn.Module], torch.Tensor] | None = None,
    **options: Any,
) -> Prepared | Monitor:
    """All of `attach` that touches neither model nor optimizer, and may take its time: any thread may do it.

    Args:
        model: as in `attach`.
        optimizer: as in `attach`.
        run: as in `attach`.
        probe: as in `attach`.
        **options: as in `attach`.

    Returns:
        What `Prepared.install` needs; or a monitor when there is nothing to install: the model is observed already, or
        hooks are switched off, or the run cannot be written, or something fails.

    Raises:
        ConfigError: an option is wrong; nothing has been created.
    """
    config = load_config(run=run, hooks=options)
    optimizers = _checked(model, optimizer, probe, config.hooks)
    faults = Faults()
    try:
        return _prepare(model, optimizers, probe, config, faults)
    except ConfigError:
        raise
    except Exception as error:  # the user's model and optimizers run code of their own when they are looked at
        return _not_attached(config.hooks, faults, error)


def _checked(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    probe: Callable[[nn.Module], torch.Tensor] | None,
    options: MonitorOptions,
) -> tuple[Optimizer, ...]:
    """Refuse arguments that cannot be meant.

    Returns:
        The optimizers.

    Raises:
        ConfigError: which one, and why.
    """
    _check(model, nn.Module, "model")
    if not takes_hooks(scripted := unwrap(model)):
        raise ConfigError(
            f"expected a model in Python; found {type(scripted).__name__}, which takes no hooks: "
            "train and attach to the model that was given to torch.jit"
        )
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else _several(optimizer)
    if not optimizers:
        raise ConfigError("expected an optimizer; found an empty sequence: give those that train this model")
    if len(set(map(id, optimizers))) < len(optimizers):
        raise ConfigError("expected each optimizer once; found one of them twice: leave the second one out")
    for entry in optimizers:
        _check(entry, Optimizer, "optimizer")
    if probe is not None and not callable(probe):
        raise ConfigError(f"expected probe to be a function of the model; found {type(probe).__name__}: give one")
    if probe is not None and not options.exact_alignment_every and options.observe == "training":
        raise ConfigError(
            "expected exact_alignment_every or observe='probe' beside probe; found neither: set one, or leave probe out"
        )
    return optimizers


def _prepare(
    model: nn.Module,
    optimizers: tuple[Optimizer, ...],
    probe: Callable[[nn.Module], torch.Tensor] | None,
    config: MonitorConfig,
    faults: Faults,
) -> Prepared | Monitor:
    inner = unwrap(model)
    if (existing := observed_by(inner)) is not None:
        _tell_ignored(existing, config)
        return existing
    taps = find_taps(inner, config.hooks.layers)
    steered = steered_layers(tuple(taps), config.hooks.steer_layers)
    target = Target(inner, model, optimizers, taps, steered, probe)
    if hooks_disabled():
        return Monitor(config.hooks, faults)
    if _processes and os.getpid() not in _processes:
        faults.count(
            "store_unavailable", "this process is a fork of an observed one: start it with spawn to observe it"
        )
        return Monitor(config.hooks, faults)
    rank, world_size = rank_and_world_size()
    if config.run is None and world_size > 1:
        raise ConfigError("expected a run directory that all ranks share; found none: give attach(run=...)")
    _processes.add(os.getpid())
    try:
        opened = create_run(config.run or time.strftime("runs/%Y%m%d-%H%M%S"))
        attempt = agree_on_attempt(opened.objects, rank, lambda: attempt_record(target, config.hooks, world_size))
        if rank == 0:
            trim_vanished_ranks(opened.objects, world_size, config.hooks.keep)
    except (EntropyMonitorError, OSError, RuntimeError) as error:  # RuntimeError: the process group's store is gone
        faults.count("store_unavailable", error)
        return Monitor(config.hooks, faults)
    return Prepared(opened, (attempt, rank), target, config.hooks, faults)


def _not_attached(options: MonitorOptions, faults: Faults, error: Exception) -> Monitor:
    """Whatever it was, it is no reason to stop a training.

    Returns:
        A monitor that observes nothing and says why.
    """
    logger.debug("attach", exc_info=error)
    faults.count(
        "attach_failed",
        f"expected to place hooks and start threads; found {type(error).__name__}: {error}: mend what this names (a "
        "class must take hooks as torch's own does: call super().__init__(), hand keyword arguments on)",
    )
    return Monitor(options, faults)


def _tell_ignored(existing: Monitor, config: MonitorConfig) -> None:
    """A second attach changes nothing, which who asks for something else should know."""
    asked = replace(config.hooks, start_step=existing.options.start_step)
    elsewhere = config.run is not None and str(Path(config.run).resolve()) != existing.run_url
    if asked != existing.options or elsewhere:
        logger.warning(
            "expected a model that is not observed; found one that is, in %s: detach() first, nothing is changed",
            existing.run_url,
        )


def _several(optimizers: object) -> tuple[Any, ...]:
    return tuple(optimizers) if isinstance(optimizers, list | tuple) else (optimizers,)


def _check(value: object, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(
            f"expected {name} to be a torch {kind.__name__}; found {type(value).__name__}: "
            "call attach(model, optimizer, ...)"
        )
