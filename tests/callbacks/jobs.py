"""What the scripts of this folder share. Each runs as a process of its own: the frameworks warn a great deal.

A script defines jobs; ``main`` runs them all and prints a report of each, so that one import serves many tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from entropy_monitor.store import CommandRequest, issue_command, open_run, read_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from entropy_hooks import Monitor
    from entropy_monitor.types import Frame

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, TOKENS, ROWS = 61, 24, 48


def start(script: str, *arguments: object, prefix: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    """Start a script of this folder with our packages on its path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ENTROPY_MONITOR_")}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "hooks", Path(__file__).parent)))
    command = [sys.executable, *prefix, str(Path(__file__).with_name(script)), *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables},
    )


@contextlib.contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever a test did not wait for is killed in the end."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def reports(process: subprocess.Popen[str], *, code: int = 0) -> dict[str, Any]:
    """Each job's report, by its name (and rank)."""
    out, err = process.communicate(timeout=110)
    assert process.returncode == code, out + err
    lines = (line.partition("REPORT ")[2] for line in out.splitlines())
    return {name: report for line in lines if line for name, report in json.loads(line).items()}


def main(jobs: dict[str, Callable[[Path], dict[str, Any]]], folder: Path) -> None:
    """Run every job in a folder of its own; what it raises is its report."""
    torch.set_num_threads(1)
    for name, job in jobs.items():
        inside = folder / name
        inside.mkdir(parents=True)
        try:
            report = job(inside)
        except Exception:
            report = {"raised": traceback.format_exc()}
        print("REPORT " + json.dumps({name: report}), flush=True)


def numbers(seed: int = 5) -> list[torch.Tensor]:
    """Rows of token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (TOKENS,), generator=generator) for _ in range(ROWS)]


def digest(model: nn.Module) -> str:
    """Every bit of the parameters."""
    return hashed(b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters()))


def random_states() -> str:
    """Where the random generators of torch and Python stand."""
    return hashed(torch.get_rng_state().numpy().tobytes() + repr(random.getstate()).encode())


def hashed(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def num_hooks(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    """Hooks on modules and optimizers, and a wrapped `torch.autograd.backward`."""
    on_modules = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    on_optimizers = sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers)
    return on_modules + on_optimizers + int(torch.autograd.backward.__module__ != "torch.autograd")


def found(run: Path) -> dict[str, Any]:
    """What a run holds."""
    opened = open_run(run)
    frames = list(opened.frames())
    return {
        "steps": [frame.step for frame in frames],
        "attempts": [frame.attempt for frame in frames],
        "ranks": [frame.rank for frame in frames],
        "losses": [frame.scalars["loss"] for frame in frames],
        "layers": [layer for group in frames[0].groups for layer in group.layers],
        "complete": [is_complete(frame) for frame in frames],
        "started": [
            [record["options"]["start_step"], record["total_steps"], record["world_size"]]
            for record in opened.attempts()
        ],
        "state": read_status(opened).state,
        "acknowledged": [[ack.status, ack.step, ack.rank] for ack in opened.acknowledgements()],
    }


def is_complete(frame: Frame) -> bool:
    """Sampled tokens have activations and gradients; the last position of a sequence has no target, so no gradient."""
    tokens = 8 * frame.num_patches
    shares = [
        float((values[:, :tokens] != 0).any(axis=2).mean())
        for group in frame.groups
        for values in (group.activations, group.gradients)
    ]
    return min(shares) > 0.9


def settle(monitor: Monitor | None) -> None:
    """Wait for the writer, so that no frame is dropped on a busy machine."""
    if monitor is not None and monitor._session is not None:
        monitor._session.writer.flush(20.0)


def command_and_wait(run: Path, monitor: Monitor, weight: float) -> None:
    """Order a phase; the next optimizer step ends with it in force."""
    opened = open_run(run)
    request = CommandRequest(phase="compress", weight=weight, reason="a test", issued_by="test")
    issue_command(opened.objects, opened.run_id, request)
    session = monitor._session
    assert session is not None
    deadline = time.monotonic() + 20.0
    while not len(session._pulse.delivery._pending):
        assert time.monotonic() < deadline, "the command did not come"
        time.sleep(0.005)


def check_same(observed: dict[str, Any], plain: dict[str, Any]) -> None:
    """Two trainings, bit for bit; and nothing of ours is left behind."""
    for name in ("logged", "truth", "parameters", "random", "hooks"):
        assert observed[name] == plain[name], name


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
