"""The closed loop as a user sees it: `demo`, Ctrl-C, and a command that compresses the representation."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.store import create_run, open_run

from .processes import entropy_monitor, processes_naming, start, wait_until

if TYPE_CHECKING:
    from pathlib import Path


def test_demo(tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = entropy_monitor("demo", "--steps", "30", "--no-dashboard", "--run", run)
    assert found.returncode == 0, found.stderr
    summary = {line.split()[0]: line for line in found.stdout.splitlines() if line.strip()}
    committed = re.search(r"frames +(\d+) committed, (\d+) dropped", found.stdout)
    assert committed
    assert int(committed[1]) == 15
    assert int(committed[2]) == 0
    lag = re.search(r"p95 ([\d.]+) s from commit", found.stdout)
    assert lag
    assert float(lag[1]) < 10
    assert "memorize at step 0" in summary["phases"]
    entropies = re.findall(r"MBE (before|after) +([\d.]+) ± ([\d.]+) nats", found.stdout)
    assert [name for name, *_ in entropies] == ["before", "after"]
    assert all(0 < float(value) < 2.08 for _, value, _ in entropies)
    assert "faults" not in summary
    assert processes_naming(run) == []
    metrics = open_run(run).metrics()
    assert metrics["step"].values.tolist() == list(range(0, 30, 2))
    assert bool(metrics["mbe_normalized"].notnull().all())
    assert open_run(run).scalars()["step"].values.tolist() == list(range(30))


def test_interrupted_demo_ends_all_its_children(tmp_path: Path) -> None:
    run = tmp_path / "run"
    demo = start("-m", "entropy_monitor", "demo", "--steps", "100000", "--no-dashboard", "--run", run)
    try:
        wait_until(lambda: (run / "store.zarr" / "metrics").exists(), "the first metrics")
        assert len(processes_naming(run)) >= 3
    finally:
        demo.send_signal(signal.SIGINT)
        _, err = demo.communicate(timeout=60)
    assert demo.returncode == 0, err
    assert err == ""
    assert processes_naming(run) == []


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Two demo trainers of one seed, side by side; a waiting `phase` tells one to compress as soon as it lives."""
    directory = tmp_path_factory.mktemp("twins")
    runs = {name: directory / name for name in ("commanded", "alone")}
    create_run(runs["commanded"])
    options = ["--steps", "60", "--seed", "3", "--every", "5", "--steer"]
    order = ["compress", "--reason", "closed loop", "--weight", "0.5", "--wait-s", "100"]
    processes = {"phase": start("-m", "entropy_monitor", "phase", runs["commanded"], *order)}
    for name, run in runs.items():
        processes[name] = start("-m", "entropy_monitor.demo.train", "--run", run, *options)
    said: dict[str, str] = {}
    try:
        for name, process in processes.items():
            said[name], err = process.communicate(timeout=110)
            assert process.returncode == 0, err
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
                process.communicate()
    assert entropy_monitor("watch", *runs.values(), "--once", "--control", "off").returncode == 0
    return {name: (run, said["phase"]) for name, run in runs.items()}


def test_a_compress_command_lowers_the_entropy(trainers: dict[str, tuple[Path, str]]) -> None:
    commanded, alone = (open_run(trainers[name][0]) for name in ("commanded", "alone"))
    applied = re.search(r"applied at step (\d+)", trainers["commanded"][1])
    assert applied
    first_step = int(applied[1])
    assert 0 < first_step < 30
    losses = [run.scalars()["loss"].values for run in (commanded, alone)]
    assert (losses[0][: first_step + 1] == losses[1][: first_step + 1]).all(), "alike until the command"
    assert losses[0][first_step + 1] != losses[1][first_step + 1]
    phases = commanded.scalars()["phase"].values.tolist()
    assert phases.index("compress") == first_step
    last = [run.metrics()["mbe_normalized"].isel(step=-1).values for run in (commanded, alone)]
    assert all(len(values) == 4 for values in last)
    # The middle half of the four blocks is steered; there the entropy must have fallen.
    assert (last[0][1:3] < last[1][1:3] - 0.1).all(), last
    assert last[0].mean() < last[1].mean()
