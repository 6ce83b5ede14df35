"""The hooks on a GPU: bit-identical training, no synchronisation, true frames.

Run on a machine with a CUDA device: ``python3 run.py bench gpu``. Prints one table; exits 1 when a promise is broken.
What they cost there: ``python3 run.py bench overhead --device cuda``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
from torch.nn import functional as F

from entropy_hooks import attach
from entropy_monitor import open_run
from entropy_monitor.demo.model import ByteGPT, GPTOptions
from entropy_monitor.store import CommandRequest, issue_command

SMALL = GPTOptions(num_layers=4, width=128, num_heads=4, context=128, dropout=0.1)


@contextlib.contextmanager
def refusing_synchronisation():
    """Make every operation that waits for the device raise."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train_small(steps: int, run: Path | None, *, refuse_sync: bool = False, **options: object):
    """Train a small model; returns losses, parameters and the monitor's last counts."""
    torch.manual_seed(0)
    model = ByteGPT(SMALL).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = [torch.randint(0, 256, (8, SMALL.context + 1)).cuda() for _ in range(8)]
    monitor = attach(model, optimizer, run=run, **options) if run else None
    losses = []
    for step in range(steps):
        batch = data[step % len(data)]
        with refusing_synchronisation() if refuse_sync and step else contextlib.nullcontext():
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
        if options.get("steer") and step == steps // 2 and run:
            opened = open_run(run)
            request = CommandRequest(phase="compress", weight=0.3, reason="benchmark", issued_by="benchmark")
            issue_command(opened.objects, opened.run_id, request)
            time.sleep(0.2)
    if monitor:
        monitor.detach()
    parameters = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return torch.stack(losses).cpu(), parameters.cpu(), monitor.stats() if monitor else None


def check_promises(directory: Path) -> list[tuple[str, str, bool]]:
    """Bit-identical, never synchronising, steering; each with what was found."""
    torch.use_deterministic_algorithms(True)
    plain = train_small(200, None)
    observed = train_small(200, directory / "observed", every=1)
    same = torch.equal(plain[0], observed[0]) and torch.equal(plain[1], observed[1])
    torch.use_deterministic_algorithms(False)
    quiet = train_small(60, directory / "quiet", refuse_sync=True, every=2)
    steered = train_small(60, directory / "steered", refuse_sync=True, every=2, steer=True)
    run = open_run(directory / "steered")
    mbe = {frame.step: frame.phase for frame in run.frames(arrays=False)}
    frame = next(open_run(directory / "observed").frames())
    return [
        ("200 steps bit-identical, every=1", str(same), same),
        ("frames committed, every=1", f"{observed[2].frames_committed} of 200", observed[2].frames_committed > 0),
        ("frames dropped, every=1", str(observed[2].frames_dropped), True),
        ("faults while synchronisation is refused", str(dict(quiet[2].faults)), not quiet[2].faults),
        ("frames committed there", str(quiet[2].frames_committed), quiet[2].frames_committed == 30),
        ("faults while steering, synchronisation refused", str(dict(steered[2].faults)), not steered[2].faults),
        ("phases in the steered frames", str(sorted(set(mbe.values()))), set(mbe.values()) == {"memorize", "compress"}),
        ("frame finite", str(frame.activations.shape), bool(np.isfinite(frame.activations).all())),
        ("loss stored = loss trained", "", abs(frame.scalars["loss"] - float(observed[0][frame.step])) < 1e-6),
        ("weight-space status of the layers", str(frame.alignment.info[:, 3].tolist()), True),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    if not torch.cuda.is_available():
        print("expected a CUDA device; found none: run this benchmark on a machine with one", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        checks = check_promises(Path(name))
        for label, found, kept in checks:
            print(f"| {label} | {found} | {'kept' if kept else 'BROKEN'} |", flush=True)
    return 0 if all(kept for *_, kept in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
