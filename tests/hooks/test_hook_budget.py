"""The overhead budget: what is measured, when the sampling is stretched, and that all ranks stretch alike."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_hooks.budget import Cadence
from entropy_hooks.cost import StepCosts, overhead
from entropy_hooks.faults import Faults
from entropy_hooks.meter import Meter
from entropy_monitor.errors import ConfigError
from entropy_monitor.store import open_run, read_status

from .scripts import finish, free_port, start
from .training import Job, assert_same_training, frames, observe, wait_until

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


class Played:
    """A job whose clocks are made up: every step takes `length`, a sampled one `added` more."""

    def __init__(self, length: float, added: float, *, noise: float = 0.0, every: int = 10, **budget: Any) -> None:
        self.length, self.added, self.noise = length, added, noise
        self._random = random.Random(0)
        self._now = [0.0, 0.0, 0.0]
        self.costs = StepCosts(lambda: (self._now[0], self._now[1], self._now[2]), CPU)
        self.faults = Faults()
        self.cadence = Cadence(every, budget.pop("max_overhead", None), self.costs, lambda: None, self.faults)
        self.sampled: list[int] = []

    def run(self, steps: int) -> Played:
        for step in range(steps):
            sampled = self.cadence.is_sampled(step)
            length = self.length * (1 + self._random.gauss(0, self.noise))
            self._now[0] += self.added if sampled else 0.0
            self._now[1] += length + (self.added if sampled else 0.0)
            self._now[2] += length + (self.added if sampled else 0.0)
            if sampled:
                self.sampled.append(step)
                self.cadence.after_sampled(step)
            self.costs.step(sampled=sampled)
        return self


def test_the_figure_is_what_a_sampled_step_adds_over_the_steps_between() -> None:
    played = Played(0.1, 0.02).run(400)
    stated = overhead(played.costs, Meter(), 10)
    assert stated.percent == pytest.approx(2.0, abs=1e-6)
    assert stated.error_percent == pytest.approx(0.0, abs=1e-6)
    assert stated.num_pairs == 37, "40 sampled: the first two warm up, the last is step 390"
    assert "bypassed" in stated.source


@settings(deadline=None, max_examples=25)
@given(noise=st.floats(0.01, 0.1), added=st.floats(0.0, 0.05), seed=st.integers(0, 2**20))
def test_the_error_covers_what_noise_does(noise: float, added: float, seed: int) -> None:
    played = Played(0.1, added, noise=noise)
    played._random.seed(seed)
    played.run(700)
    cost = played.costs.cost("cpu")
    assert cost is not None
    # Paired differences of normal noise: a sampled step's, and that of the median of nine.
    assert abs(cost.seconds - added) < 6 * cost.std_error_s
    assert 0.5 < cost.std_error_s / (0.1 * noise * 1.2533 * (1 + 0.17) ** 0.5 / 64**0.5) < 2.0


def test_outliers_and_drift_are_not_ours() -> None:
    played = Played(0.1, 0.001, noise=0.01)
    for part in range(20):
        played.length = 0.1 * 1.05**part
        played.run(35)
        played._now = [now + 30.0 for now in played._now]  # an evaluation
    cost = played.costs.cost("wall")
    assert cost is not None
    assert abs(cost.seconds - 0.001) < 0.002


def test_without_a_budget_every_is_obeyed() -> None:
    played = Played(0.1, 0.5, every=3).run(90)
    assert played.sampled == list(range(0, 90, 3))


@pytest.mark.parametrize("every", [1, 4, 10])
@pytest.mark.parametrize("budget", [0.005, 0.01, 0.05])
def test_every_grows_by_whole_factors_until_the_budget_is_kept(every: int, budget: float) -> None:
    played = Played(0.1, 0.02, noise=0.02, every=every, max_overhead=budget).run(4000)
    grown = played.cadence.every
    assert grown % every == 0
    assert 0.02 / (0.1 * grown) <= budget * 1.1
    assert grown <= 3 * max(every, 0.02 / (0.1 * budget)), "and no further"


def test_a_job_within_its_budget_is_sampled_as_asked() -> None:
    """Noise alone must not stretch it, however often it is looked at."""
    for seed in range(20):
        played = Played(0.1, 0.0005, noise=0.05, max_overhead=0.01)
        played._random.seed(seed)
        assert played.run(5000).cadence.every == 10


def test_a_budget_that_cannot_be_kept_does_not_end_the_sampling() -> None:
    played = Played(0.1, 0.02, every=1, max_overhead=1e-9).run(20_000)
    assert played.cadence.every <= 1000
    assert played.sampled[-1] > 19_000
    assert played.faults.snapshot()["budget_not_kept"] >= 1


def test_with_every_step_sampled_one_in_eight_is_bypassed_to_compare_with() -> None:
    played = Played(0.1, 0.0, every=1, max_overhead=0.5).run(80)
    assert [step for step in range(80) if step not in played.sampled] == list(range(7, 80, 8))


@pytest.mark.parametrize("given_budget", [0.0, -0.01, 1.5, float("nan"), "much"])
def test_wrong_budgets(run: Path, given_budget: Any) -> None:
    job = Job()
    with pytest.raises(ConfigError, match="max_overhead"):
        observe(job, run=run, max_overhead=given_budget)
    assert not run.exists()


def test_a_real_job_is_stretched_shown_and_trains_as_before(run: Path) -> None:
    steps = 150
    plain = Job().run(steps)
    job = Job()
    with observe(job, run=run, every=1, max_overhead=0.01) as monitor:
        job.run(steps)
        stats = monitor.stats()
        wait_until(lambda: read_status(open_run(run)).every == stats.every, "the heartbeat")
    assert_same_training(job, plain)
    assert stats.every > 1, "the hooks of a model this small cost more than 1 %"
    assert stats.faults == {}
    assert stats.overhead_percent is not None
    sampled = [frame.step for frame in frames(run)]
    assert sampled[:3] == [0, 1, 2]
    assert len(sampled) < steps / 2
    assert stats.overhead_error_percent is not None
    assert stats.overhead_percent - 3 * stats.overhead_error_percent < 1.0
    assert stats.overhead_samples > 2
    beat = json.loads((run / "heartbeat" / "r00000.json").read_text(encoding="utf-8"))
    assert {"overhead_error_percent", "overhead_samples", "overhead_source", "overhead_wall_percent"} <= set(beat)


RANKS = """
import time
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
job = Job(lambda: tiny_gpt(dropout=0.0))
job.model = DistributedDataParallel(job.model)
with observe(job, run=sys.argv[1], every=2, max_overhead=0.01) as monitor:
    for _ in range(120):
        job.step()
        time.sleep(0.002 * rank)  # the ranks' clocks say different things
    report(every=monitor.stats().every, faults=monitor.stats().faults)
dist.destroy_process_group()
"""


def test_all_ranks_stretch_at_the_same_step(run: Path) -> None:
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start(RANKS, run, RANK=str(rank), **variables) for rank in (0, 1)]
    reports = [finish(process)[0] for process in processes]
    assert reports[0] == reports[1]
    assert reports[0]["faults"] == {}
    assert reports[0]["every"] > 2
    steps = [[frame.step for frame in frames(run) if frame.rank == rank] for rank in (0, 1)]
    assert steps[0] == steps[1]
