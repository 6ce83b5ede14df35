"""The guides' code, each run as a process in an empty directory: the run has the frames that the guide promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.store import open_run, read_status

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "docs" / "guides"
FRAMES = {
    "huggingface": ("runs/gpt2", {1: [0, 10, 20, 30], 2: [20, 30]}),
    "lightning": ("runs/autoencoder", {1: [0, 10, 20], 2: [30, 40, 50]}),
    "accelerate": ("runs/lstm", {1: [0, 5, 10, 15]}),
    "plain_loop": ("runs/plain", {1: [0, 10, 20], 2: [30, 40, 50]}),
    "models": ("runs/cnn", {1: [0]}),
    "unusual_jobs": ("runs/generator", {1: [0, 5, 10, 15]}),
}
LAYERS = {
    "huggingface": [f"transformer.h.{index}" for index in range(4)],
    "lightning": [*(f"encoder.{index}" for index in range(3)), *(f"decoder.{index}" for index in range(3))],
    "accelerate": ["recurrent"],
    "plain_loop": [f"blocks.{index}" for index in range(4)],
    "models": ["0", "2"],
    "unusual_jobs": ["0", "1", "2"],
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def code_of(guide: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", (GUIDES / f"{guide}.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    return "\n".join(blocks)


def start(guide: str, directory: Path, *prefix: str) -> subprocess.Popen[str]:
    script = directory / "train.py"
    script.write_text(code_of(guide), encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ENTROPY_MONITOR_")}
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "hooks")))
    return subprocess.Popen(
        [sys.executable, *prefix, str(script)],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**clean, **offline, "PYTHONPATH": paths},
    )


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, subprocess.Popen[str]]]]:
    """All at once: most of their time is importing."""
    places = {guide: tmp_path_factory.mktemp(guide) for guide in FRAMES}
    started = {guide: (place, start(guide, place)) for guide, place in places.items()}
    on_two_ranks = tmp_path_factory.mktemp("two_ranks")
    started["plain_loop on two ranks"] = on_two_ranks, start("plain_loop", on_two_ranks, *TORCHRUN)
    yield started
    for _, process in started.values():
        if process.poll() is None:
            process.kill()
            process.communicate()


def check(guide: str, place: Path, output: str, ranks: tuple[int, ...]) -> None:
    name, attempts = FRAMES[guide]
    opened = open_run(place / name)
    frames = list(opened.frames())
    expected = [(attempt, step, rank) for attempt, steps in attempts.items() for step in steps for rank in ranks]
    assert sorted((frame.attempt, frame.step, frame.rank) for frame in frames) == sorted(expected)
    for frame in frames:
        assert sorted(layer for group in frame.groups for layer in group.layers) == sorted(LAYERS[guide])
        assert frame.scalars["loss"] > 0
    assert read_status(opened).state == "ended"
    assert "faults={}" in output or guide == "models", output


@pytest.mark.parametrize("guide", FRAMES)
def test_guide(guide: str, processes: dict[str, tuple[Path, subprocess.Popen[str]]]) -> None:
    place, process = processes[guide]
    output, _ = process.communicate(timeout=110)
    assert process.returncode == 0, output
    check(guide, place, output, (0,))
    assert "Traceback" not in output


def test_the_plain_loop_on_two_ranks(processes: dict[str, tuple[Path, subprocess.Popen[str]]]) -> None:
    place, process = processes["plain_loop on two ranks"]
    output, _ = process.communicate(timeout=110)
    assert process.returncode == 0, output
    check("plain_loop", place, output, (0, 1))


def test_every_guide_is_run() -> None:
    assert {path.stem for path in GUIDES.glob("*.md")} == set(FRAMES)
