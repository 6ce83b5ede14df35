"""Promise 2 where hooks cannot be placed: `attach` says so and returns, and everything is as it was."""

from __future__ import annotations

import copyreg
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.jit import _builtins, _recursive

from entropy_hooks import attach
from entropy_monitor.errors import ConfigError
from entropy_monitor.store import open_run, read_status

from .test_hook_copies import entries, saved
from .training import Job, assert_same_training, frames, observe, tiny_gpt

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

DICTIONARIES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
)


class Wrapped(torch.optim.Optimizer):
    """Steps another one, and has never called torch's constructor."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        self.base = torch.optim.AdamW(params, lr=lr)
        self.param_groups, self.state, self.defaults = self.base.param_groups, self.base.state, self.base.defaults

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)


class Bare(torch.optim.Optimizer):
    """Has never called torch's constructor, and steps by itself."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        self.param_groups, self.state, self.defaults = [{"params": list(params), "lr": lr}], {}, {"lr": lr}  # type: ignore[assignment]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad * self.param_groups[0]["lr"])


class TakesOneArgument(nn.Linear):
    """Registers hooks as torch once did."""

    def register_forward_hook(self, hook: Callable[..., Any]) -> Any:  # type: ignore[override]
        return super().register_forward_hook(hook)


def own_registration() -> nn.Module:
    return nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 8), TakesOneArgument(8, 256))


def compiled_and_own_registration() -> nn.Module:
    model = own_registration()
    model.compile(backend="eager")
    return model


def hooks_of(thing: object) -> list[list[tuple[int, Any]]]:
    return [list(vars(thing).get(name, {}).items()) for name in DICTIONARIES]


def surroundings(job: Job, *others: object) -> list[Any]:
    """All that attach changes when it succeeds."""
    return [
        [hooks_of(thing) for thing in (*job.model.modules(), job.optimizer, *others)],
        job.model._compiled_call_impl,
        torch.autograd.backward,
        dict(copyreg.dispatch_table),
        _recursive.create_script_module,
        dict(_builtins._get_builtin_table()),
        threading.enumerate(),
    ]


@pytest.fixture
def no_new_threads() -> Generator[None]:
    """The system gives no memory for the stack of another thread."""
    before = threading.stack_size(1 << 46)
    yield
    threading.stack_size(before)


def seeded_run(job: Job) -> Job:
    """Three steps; dropout and the first pass of lazy modules draw alike in each."""
    torch.manual_seed(1)
    return job.run(3)


def check(job: Job, truth: Job, run: Path, named: str) -> None:
    before = surroundings(job)
    monitor = observe(job, run=run, every=1, steer=True)
    assert surroundings(job) == before
    assert not monitor.enabled
    assert monitor.stats().faults == {"attach_failed": 1}
    for part in ("expected", "found", named):
        assert part in monitor.why_disabled
    assert len(monitor.why_disabled.splitlines()) == 1
    assert_same_training(seeded_run(job), seeded_run(truth))
    monitor.detach()


@pytest.mark.parametrize(
    ("make_model", "make_optimizer", "named"),
    [
        (own_registration, torch.optim.AdamW, "register_forward_hook"),
        (compiled_and_own_registration, torch.optim.AdamW, "register_forward_hook"),
    ],
)
def test_what_takes_no_hooks_trains_as_before(
    run: Path, make_model: Callable[[], nn.Module], make_optimizer: Any, named: str
) -> None:
    job, truth = (Job(make_model, make_optimizer=make_optimizer) for _ in range(2))
    check(job, truth, run, named)
    status = read_status(open_run(run))
    assert (status.state, status.attempt, status.missing_ranks) == ("ended", 1, [])
    assert status.faults == {"attach_failed": 1}


def test_an_optimizer_inside_one_that_takes_no_hooks_is_observed(run: Path) -> None:
    job, truth = (Job(make_optimizer=Wrapped) for _ in range(2))
    monitor = observe(job, run=run, every=1)
    assert_same_training(seeded_run(job), seeded_run(truth))
    monitor.detach()
    assert monitor.stats().faults == {}
    assert [frame.step for frame in frames(run)] == [0, 1, 2]


def test_an_optimizer_that_takes_no_hooks_is_a_wrong_option(run: Path) -> None:
    job = Job(make_optimizer=Bare)
    before = surroundings(job)
    for optimizers in (job.optimizer, [torch.optim.SGD(job.model.parameters(), lr=0.1), job.optimizer]):
        with pytest.raises(ConfigError, match="found Bare, which never calls"):
            attach(job.model, optimizers, run=run)
    assert surroundings(job) == before
    assert not run.exists()


@pytest.mark.usefixtures("no_new_threads")
def test_threads_that_do_not_start(run: Path) -> None:
    check(Job(), Job(), run, "can't start new thread")
    assert read_status(open_run(run)).state == "ended"


def test_hooks_of_another_monitor_stay(tmp_path: Path) -> None:
    """Two models are trained by one optimizer; the second of them takes no hooks."""
    first, second = tiny_gpt(), own_registration()
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    monitor = attach(first, optimizer, run=tmp_path / "first", every=1)
    before = hooks_of(optimizer), torch.autograd.backward, dict(copyreg.dispatch_table)
    assert not attach(second, optimizer, run=tmp_path / "second").enabled
    assert not attach(second, [optimizer, Wrapped(second.parameters())], run=tmp_path / "third").enabled
    assert (hooks_of(optimizer), torch.autograd.backward, dict(copyreg.dispatch_table)) == before
    tokens = torch.randint(0, 256, (4, 32))
    first(tokens).square().mean().backward()
    optimizer.step()
    monitor.detach()
    assert [frame.step for frame in frames(tmp_path / "first")] == [0]


# ---- lazy modules ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_lazy_modules_are_observed_from_the_pass_that_gives_them_their_size(run: Path, make_optimizer: Any) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(256, 8), nn.LazyLinear(16), nn.LazyLinear(256))

    job, truth = (Job(model, make_optimizer=make_optimizer) for _ in range(2))
    monitor = observe(job, run=run, every=1)
    assert_same_training(seeded_run(job), seeded_run(truth))
    assert monitor.stats().faults == {}
    assert entries(saved(job.model)) == entries(saved(truth.model))
    monitor.detach()
    found = frames(run)
    assert [frame.step for frame in found] == [0, 1, 2]
    assert all(group.gradients is not None for frame in found for group in frame.groups)
    assert [layer for group in found[0].groups for layer in group.layers] == ["0", "1", "2"]
