"""The watcher on one core: does it keep up with 12 layers x 512 tokens x 768 dimensions at 2 frames a second?

A process writes such frames at that rate, as hooks would; another, held to one core and with every instrument on,
measures them. Prints the lag from a frame's commit to its metrics row, then how the cost of a frame grows with layers,
tokens and dimensions.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from entropy_monitor import open_run
from entropy_monitor.store import (
    FrameData,
    FrameLayout,
    FrameWriter,
    GroupLayout,
    claim_attempt,
    create_run,
    read_status,
    write_heartbeat,
)
from entropy_monitor.types import Frame, LayerGroup

if TYPE_CHECKING:
    from entropy_monitor.watcher.measure import FrameMeasurements
    from entropy_monitor.watcher.soft import Assignments

VOCABULARY = 50257
DISTINCT = 8
"""Activations drawn before the clock starts, and written in turns; the text is new in each frame."""


def zipf_tokens(rng: np.random.Generator, num_tokens: int) -> np.ndarray:
    """Token ids around each position, ``[n, 6]``, with the frequencies of a language."""
    weights = 1 / np.arange(1, VOCABULARY + 1)
    stream = rng.choice(VOCABULARY, num_tokens + 5, p=weights / weights.sum()).astype(np.int32)
    return np.lib.stride_tricks.sliding_window_view(stream, 6).copy()


def draw(rng: np.random.Generator, num_layers: int, num_tokens: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token windows, and activations ``[L, n, d]`` with a decaying spectrum that depend on the token."""
    tokens = zipf_tokens(rng, num_tokens)
    scale = (np.arange(1, width + 1) ** -0.5).astype(np.float32)
    noise = rng.standard_normal((num_layers, num_tokens, width), dtype=np.float32)
    codes = np.random.default_rng(0).standard_normal((997, width), dtype=np.float32)
    return tokens, (noise + 0.5 * codes[tokens[:, 2] % 997]) * scale


def write_frames(path: Path, shape: tuple[int, int, int], rate_hz: float, count: int) -> None:
    """Be the trainer: `count` frames at `rate_hz`, activations and gradients."""
    num_layers, num_tokens, width = shape
    run = create_run(path)
    layers = tuple(f"h.{index}" for index in range(num_layers))
    attempt = claim_attempt(run.objects, {"world_size": 1, "layers": list(layers), "total_steps": count})
    writer = FrameWriter(run.objects, 0, attempt)
    group = GroupLayout(layers=layers, num_tokens=num_tokens, num_features=width, dtype="bfloat16")
    layout = FrameLayout(groups=(group,), gradients=True, token_window=6, alignment_layers=layers)
    rng = np.random.default_rng(1)
    contents = []
    for _ in range(DISTINCT):
        _, z = draw(rng, *shape)
        both = np.stack([z, rng.standard_normal(z.shape, dtype=np.float32)])
        contents.append((both.view(np.uint32) >> 16).astype(np.uint16))
    parts = rng.standard_normal((num_layers, 16, 3), dtype=np.float32) + 2
    info = np.tile(np.float32([1, num_tokens / 8, num_tokens, 0]), (num_layers, 1))
    beat = {"state": "running", "attempt": attempt, "rank": 0, "step": 0}
    write_heartbeat(run.objects, "r00000", beat)
    began = time.monotonic()
    for index in range(count):
        time.sleep(max(0.0, began + index / rate_hz - time.monotonic()))
        tokens, block = zipf_tokens(rng, num_tokens), contents[index % DISTINCT]
        writer.write(
            layout,
            FrameData(
                attempt=attempt,
                step=index,
                phase="memorize",
                wall_time_s=time.time(),
                num_patches=num_tokens // 8,
                num_tokens_seen=num_tokens * (index + 1),
                scalars={"loss": 3.0, "lr": 0.1, "grad_norm": 1.0, "weight": 0.0},
                groups=(block,),
                tokens=tokens,
                alignment=parts,
                alignment_info=info,
            ),
        )
        write_heartbeat(run.objects, "r00000", {**beat, "step": index})
    write_heartbeat(run.objects, "r00000", {**beat, "state": "ended", "step": count - 1})


def live(shape: tuple[int, int, int], rate_hz: float, count: int, path: Path) -> bool:
    """Run trainer and watcher side by side; prints the lags and returns whether p95 is below 1 s."""
    cores = sorted(os.sched_getaffinity(0))
    create_run(path)
    trainer = multiprocessing.get_context("spawn").Process(target=write_frames, args=(path, shape, rate_hz, count))
    command = [sys.executable, "-m", "entropy_monitor", "watch", str(path)]
    watcher = subprocess.Popen(command, preexec_fn=lambda: os.sched_setaffinity(0, {cores[-1]}))
    trainer.start()
    trainer.join()
    if trainer.exitcode:
        watcher.terminate()
    watcher.wait()
    status = read_status(open_run(path))
    metrics = open_run(path).metrics()
    wanted = ("mbe", "s1", "soft_entropy", "mi_input_1", "mi_output_3", "optimality", "alignment_weight")
    missing = [name for name in wanted if metrics[name].isnull().all()]
    lag = status.watcher_lag_s
    print(f"frames {count}, rows {metrics.sizes['step']}, commit to row: p50 {lag['p50']} s, p95 {lag['p95']} s")
    if missing:
        print(f"not measured: {', '.join(missing)}")
    return not missing and lag["p95"] is not None and lag["p95"] < 1.0


def growth(shapes: list[tuple[int, int, int]], rounds: int) -> None:
    """CPU time of one frame on one thread, window full, by shape."""
    from entropy_monitor.watcher.measure import measure_frames
    from entropy_monitor.watcher.window import MIN_TOKENS, InformationWindow

    torch.set_num_threads(1)
    print(f"\n{'layers':>6} {'tokens':>6} {'width':>5} {'one step':>10} {'window':>10} {'total':>10}  CPU s a frame")
    for num_layers, num_tokens, width in shapes:
        rng = np.random.default_rng(2)
        tokens, z = draw(rng, num_layers, num_tokens, width)
        layers = tuple(f"h.{index}" for index in range(num_layers))
        frame = Frame(
            run_id="bench",
            attempt=1,
            rank=0,
            seq=0,
            step=0,
            phase="memorize",
            wall_time_s=0.0,
            groups=(LayerGroup(layers, z, z),),
            token_windows=tokens,
            num_patches=num_tokens // 8,
        )
        window = InformationWindow()
        measured = measure_frames([frame])
        for step in range(-(-MIN_TOKENS // num_tokens)):
            window.advance([replace(frame, step=step)], _with_new_text(measured, rng, num_tokens))
        costs = []
        for step in range(rounds):
            begun = time.process_time()
            measured = measure_frames([frame])
            between = time.process_time()
            window.advance([replace(frame, step=1000 + step)], _with_new_text(measured, rng, num_tokens))
            costs.append((between - begun, time.process_time() - between))
        one, information = np.median(np.array(costs), axis=0)
        shape = f"{num_layers:6d} {num_tokens:6d} {width:5d}"
        print(f"{shape} {one:10.3f} {information:10.3f} {one + information:10.3f}", flush=True)


def _with_new_text(measured: FrameMeasurements, rng: np.random.Generator, num_tokens: int) -> list[Assignments]:
    """The same activations as if they belonged to a text not seen before: repeated text is not measured."""
    text = torch.from_numpy(zipf_tokens(rng, num_tokens)).long()
    return [assigned._replace(tokens_NW=text) for assigned in measured.assignments]


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench watcher", description=__doc__)
    parser.add_argument("--frames", type=int, default=160)
    parser.add_argument("--rate", type=float, default=2.0, help="frames a second")
    parser.add_argument("--shape", type=int, nargs=3, default=(12, 512, 768), metavar=("LAYERS", "TOKENS", "WIDTH"))
    parser.add_argument("--largest", action="store_true", help="also 100 x 2048 x 4096: minutes, and 12 GB")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        kept_up = live(tuple(given.shape), given.rate, given.frames, Path(temporary) / "run")
    shapes = [(4, 512, 128), (12, 512, 768), (24, 512, 768), (48, 512, 768), (12, 1024, 768), (12, 512, 2048)]
    growth(shapes, rounds=3)
    if given.largest:
        growth([(100, 2048, 4096)], rounds=1)
    return 0 if kept_up else 1


if __name__ == "__main__":
    sys.exit(main())
