"""Writes what a trainer's hooks would write, step by step, without training anything."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from entropy_monitor.store import (
    FrameData,
    FrameLayout,
    FrameReader,
    FrameWriter,
    GroupLayout,
    Run,
    ScalarsWriter,
    claim_attempt,
    create_run,
    write_heartbeat,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NUM_TOKENS, NUM_FEATURES = 32, 6


def frame_layout(
    layers: Sequence[str] = ("a", "b"),
    *,
    dtype: str = "float32",
    gradients: bool = True,
    token_window: int = 3,
    aligned: Sequence[str] = ("b",),
    num_tokens: int = NUM_TOKENS,
    num_features: int = NUM_FEATURES,
) -> FrameLayout:
    """A layout of one group of layers."""
    group = GroupLayout(layers=tuple(layers), num_tokens=num_tokens, num_features=num_features, dtype=dtype)
    return FrameLayout(groups=(group,), gradients=gradients, token_window=token_window, alignment_layers=tuple(aligned))


def frame_data(layout: FrameLayout, step: int, *, attempt: int = 1, seed: int = 0, **changes: Any) -> FrameData:
    """Random contents of that layout, the same for the same step, attempt and seed."""
    rng = np.random.default_rng((seed, attempt, step))
    groups = tuple(_block(rng, group, layout) for group in layout.groups)
    first, aligned = layout.groups[0], len(layout.alignment_layers)
    fields = {
        "attempt": attempt,
        "step": step,
        "phase": "memorize",
        "wall_time_s": time.time(),
        "num_patches": first.num_tokens // 8,
        "num_tokens_seen": 100 * (step + 1),
        "scalars": {"loss": 3.0 - 0.01 * step, "lr": 0.1, "grad_norm": 1.0, "weight": 0.0},
        "groups": groups,
        "tokens": rng.integers(0, 99, (first.num_tokens, layout.token_window), dtype=np.int32)
        if layout.token_window
        else None,
        "alignment": rng.standard_normal((aligned, 16, 3)).astype(np.float32) if aligned else None,
        "alignment_info": np.tile(np.float32([1, 4, 16, 1]), (aligned, 1)) if aligned else None,
        "exact_alignment": rng.uniform(-1, 1, (len(layout.exact_layers), 2)).astype(np.float32)
        if layout.exact_layers
        else None,
    }
    return FrameData(**{**fields, **changes})


def _block(rng: np.random.Generator, group: GroupLayout, layout: FrameLayout) -> np.ndarray:
    values = rng.standard_normal((1 + layout.gradients, len(group.layers), group.num_tokens, group.num_features))
    if group.dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(group.dtype)


def decoded(block: np.ndarray, dtype: str) -> np.ndarray:
    """What a stored block means, in float32."""
    return (block.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else block.astype(np.float32)


class SyntheticTrainer:
    """One attempt of all its ranks."""

    def __init__(
        self,
        path: Path,
        *,
        world_size: int = 1,
        layers: Sequence[str] = ("a", "b"),
        total_steps: int | None = None,
        launch: str | None = None,
    ) -> None:
        self.run: Run = create_run(path)
        self.world_size, self.layout = world_size, frame_layout(layers, token_window=6)
        record = {"world_size": world_size, "layers": list(layers), "total_steps": total_steps, "launch_id": launch}
        self.attempt = claim_attempt(self.run.objects, record)
        ranks = range(world_size)
        self._frames = [FrameWriter(self.run.objects, rank, self.attempt) for rank in ranks]
        self._scalars = [ScalarsWriter(self.run.objects, rank, self.attempt) for rank in ranks]
        self._next_step = [0] * world_size
        self.losses: dict[int, float] = {}
        """Loss by step, where it is not the usual one."""
        self.shared = 0.0
        """How much all tokens have in common: the higher, the lower the entropy."""
        self.phase = "memorize"
        for rank in ranks:
            self.beat(rank)

    def beat(self, rank: int = 0, **fields: Any) -> None:
        """Write a rank's heartbeat."""
        ours = {"state": "running", "attempt": self.attempt, "rank": rank, "step": self._next_step[rank]}
        write_heartbeat(self.run.objects, f"r{rank:05d}", {**ours, **fields})

    def loss(self, step: int, rank: int = 0) -> float:
        """The loss of one step."""
        return self.losses.get(step, 3.0 * 0.99**step + 0.01 * rank)

    def record_scalars(self, step: int, rank: int = 0) -> None:
        """Write the scalars of every step up to `step`."""
        for earlier in range(self._next_step[rank], step + 1):
            self._scalars[rank].append({"step": earlier, "loss": self.loss(earlier, rank), "phase": 0, "weight": 0})
        self._next_step[rank] = step + 1
        self._scalars[rank].flush()

    def commit(self, step: int, rank: int = 0, **changes: Any) -> int:
        """Write one rank's scalars up to `step`, then its frame; returns the frame's `seq`."""
        self.record_scalars(step, rank)
        return self.commit_frame(step, rank, **changes)

    def commit_frame(self, step: int, rank: int = 0, **changes: Any) -> int:
        """Write one rank's frame alone."""
        data = frame_data(self.layout, step, attempt=self.attempt, seed=rank)
        data.groups[0][0] += self.shared
        scalars = {"loss": self.loss(step, rank), "lr": 0.1, "grad_norm": 1.0, "weight": 0.0}
        fields = {"scalars": scalars, "phase": self.phase, **changes}
        own = {name: getattr(data, name) for name in data.__slots__}
        return self._frames[rank].write(self.layout, FrameData(**{**own, **fields}))

    def commit_all(self, steps: Sequence[int]) -> None:
        """Commit these steps on every rank."""
        for step in steps:
            for rank in range(self.world_size):
                self.commit(step, rank)

    def end(self, *ranks: int) -> None:
        """Say goodbye: all ranks, or these."""
        for rank in ranks or range(self.world_size):
            self.beat(rank, state="ended")

    def frame_path(self, seq: int, rank: int, name: str) -> Path:
        """The file of one frame's `name`: ``g0``, ``tokens``, ``alignment``, ``alignment_info`` or ``commit``."""
        return frame_file(self.run, seq, rank, name)

    def reader(self, rank: int = 0) -> FrameReader:
        """A reader of one rank's frames."""
        return FrameReader(self.run.objects, self.run.run_id, rank)


def frame_file(run: Run, seq: int, rank: int, name: str) -> Path:
    """The file that holds one frame's chunk of the array `name`."""
    assert run.objects.path is not None
    segment, slot = divmod(seq, 64)
    array = run.objects.path / "store.zarr" / "frames" / f"r{rank:05d}" / f"s{segment:06d}" / name
    (found,) = array.glob(f"c.{slot}.*") if name != "commit" else [array / f"c.{slot}.0"]
    return found


def flip_byte(path: Path, index: int) -> None:
    """Damage one byte of a file."""
    content = bytearray(path.read_bytes())
    content[index] ^= 0x40
    path.write_bytes(bytes(content))
