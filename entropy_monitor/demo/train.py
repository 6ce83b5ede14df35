"""The demo's trainer: an ordinary training script that has one line of ours, `attach`."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

from entropy_hooks import attach
from entropy_monitor.demo.model import ByteGPT, GPTOptions
from entropy_monitor.demo.text import draw_batch, load_bytes
from entropy_monitor.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What the demo trains, and for how long."""

    steps: int = 600
    batch: int = 8
    learning_rate: float = 1e-3
    seed: int = 0
    num_threads: int = 1
    """Threads of torch; one leaves a core to the watcher on a small machine."""
    every: int = 2
    """Every second step is sampled, so that a short run shows its phases."""
    model: GPTOptions = field(default_factory=GPTOptions)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"expected at least 1 step; found {self.steps}")
        if self.batch < 1:
            raise ConfigError(f"expected a batch of at least 1; found {self.batch}")


def train(run: Path | None, options: TrainOptions, *, text: list[Path], steer: bool) -> list[float]:
    """Train the byte-level GPT.

    Args:
        run: run directory, or None to train without the monitor.
        options: sizes and seed.
        text: files; the standard library's sources when empty.
        steer: whether commands may switch the phase.

    Returns:
        The loss of each step, in nats a byte.
    """
    torch.set_num_threads(options.num_threads)
    data = load_bytes(text, context=options.model.context)
    torch.manual_seed(options.seed)
    batches = torch.Generator().manual_seed(options.seed)
    model = ByteGPT(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    monitor = None
    if run is not None:
        monitor = attach(model, optimizer, run=run, every=options.every, steer=steer, total_steps=options.steps)
    losses: list[float] = []
    for _ in range(options.steps):
        inputs, targets = draw_batch(data, options.batch, options.model.context, batches)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if monitor is not None:
        monitor.detach()
    return losses


def main(arguments: list[str] | None = None) -> int:
    """``python -m entropy_monitor.demo.train``.

    Returns:
        The exit code.
    """
    defaults = TrainOptions()
    parser = argparse.ArgumentParser(prog="python -m entropy_monitor.demo.train", description=__doc__)
    parser.add_argument("--run", type=Path, help="run directory; without it nothing is observed")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--every", type=int, default=defaults.every)
    parser.add_argument("--steer", action="store_true", help="let commands switch the phase")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a text file; may be repeated")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        options = TrainOptions(steps=given.steps, seed=given.seed, every=given.every)
        train(given.run, options, text=given.text, steer=given.steer)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
