"""Finding what trains, from its steps alone."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from entropy_hooks.discovery import Found, Search, Seen, choose

from .loops import Net, batch, hook_dictionaries, loss_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Watched:
    """A search under way, and what came of it."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.errors: list[Exception] = []
        self.installed: list[int] = []
        self.search = Search(self.on_seen, self.errors.append)
        self.search.begin()

    def on_seen(self, seen: Seen) -> None:
        self.seen.append(seen)
        if (found := choose(seen)) is not None:
            self.search.install_after(found.last.optimizer, self.installed.append)

    @property
    def found(self) -> Found:
        assert self.errors == []
        (seen,) = self.seen
        found = choose(seen)
        assert found is not None
        return found


@pytest.fixture
def watched() -> Iterator[Watched]:
    before = hook_dictionaries()
    torch.manual_seed(0)
    watched = Watched()
    yield watched
    watched.search.remove()
    assert hook_dictionaries() == before


def step(model: Callable[..., Any], *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss_of(model, batch()).backward()  # type: ignore[arg-type]
    for optimizer in optimizers:
        optimizer.step()


def test_a_model_and_its_optimizer(watched: Watched) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model(batch())
    step(model, optimizer)
    assert watched.seen == []
    step(model, optimizer)
    assert watched.installed == [2], "at the end of the second step"
    assert watched.found.model is model
    assert watched.found.optimizers == (optimizer,)
    assert watched.found.others == ()
    assert not watched.found.scanned
    step(model, optimizer)
    assert len(watched.seen) == len(watched.installed) == 1


def test_steps_that_a_grad_scaler_skips_are_no_steps(watched: Watched) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for count in range(4):
        assert watched.installed == []
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch()) * (float("inf") if count < 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert watched.found.model is model
    assert watched.installed == [2]


def test_several_optimizers_of_one_model_in_their_order(watched: Watched) -> None:
    model = Net()
    parts = [model.head.parameters(), [*model.blocks.parameters(), *model.embedding.parameters()]]
    first, last = (torch.optim.SGD(part, lr=0.1) for part in parts)
    for _ in range(2):
        assert watched.installed == []
        step(model, first, last)
    assert watched.found.optimizers == (first, last)
    assert watched.installed == [2], "behind the last one's second step"
    assert str(watched.found) == "Net with SGD and SGD"


def test_a_loss_module_and_a_frozen_teacher_are_no_models_in_training(watched: Watched) -> None:
    model, teacher, criterion = Net(), Net().requires_grad_(False), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        tokens = batch()
        optimizer.zero_grad()
        targets = teacher(tokens).flatten(0, 1).argmax(-1)
        criterion(model(tokens).flatten(0, 1), targets).backward()
        optimizer.step()
    assert watched.found.model is model
    assert watched.found.others == ()


def test_the_larger_of_two_models_although_its_optimizer_steps_later(watched: Watched) -> None:
    """A critic that steps five times for each step of its generator."""
    generator, critic = Net(), nn.Sequential(nn.Linear(64, 2), nn.Linear(2, 1))
    often = torch.optim.SGD(critic.parameters(), lr=0.1)
    seldom = torch.optim.SGD(generator.parameters(), lr=0.1)
    for count in range(1, 13):
        optimizer = often if count % 6 else seldom
        critic(generator(batch())).mean().backward()
        optimizer.step()
    assert watched.found.model is generator
    assert watched.found.optimizers == (seldom,)
    assert watched.found.others == ("Sequential", "SGD")
    assert watched.installed == [2], "the generator's own steps"


def test_a_model_whose_optimizer_never_steps_is_not_waited_for(watched: Watched) -> None:
    model, other = Net(), Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        other(batch())
        step(model, optimizer)
    assert watched.found.model is model
    assert watched.installed == [10]


def test_passes_within_the_step(watched: Watched) -> None:
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch())
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert watched.found.model is model


def test_a_model_called_in_parts_is_its_largest_part(watched: Watched) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        z = model.embedding(batch())
        model.head(model.blocks[0](z)).mean().backward()
        optimizer.step()
    assert watched.found.model is model.head


def test_a_model_that_runs_with_other_tensors_for_its_parameters(watched: Watched) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        copies = {name: parameter * 1.0 for name, parameter in model.named_parameters()}
        torch.func.functional_call(model, copies, batch()).mean().backward()
        optimizer.step()
    assert watched.found.model is model
    assert not watched.found.scanned


def test_an_exception_in_a_forward_pass_leaves_no_wrong_root(watched: Watched) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    with pytest.raises(IndexError):
        model(batch() + 1000)
    step(model, optimizer)
    assert watched.found.model is model


def test_a_second_training_thread_is_not_mixed_in(watched: Watched) -> None:
    model, other = Net(), Net(width=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    step(model, optimizer)
    thread = threading.Thread(target=lambda: [step(other, elsewhere) for _ in range(3)])
    thread.start()
    thread.join()
    step(model, optimizer)
    assert watched.found.model is model
    assert [one.optimizer for one in watched.seen[0].stepped] == [optimizer]


@pytest.mark.parametrize("count", ["Adam", "SGD"])
def test_the_optimizers_own_count(watched: Watched, count: str) -> None:
    model = Net()
    optimizer = getattr(torch.optim, count)(model.parameters(), lr=0.1)
    for _ in range(2):
        step(model, optimizer)
    watched.search.remove()
    saved = optimizer.state_dict()
    again = Watched()
    resumed = getattr(torch.optim, count)(model.parameters(), lr=0.1)
    resumed.load_state_dict(saved)
    for _ in range(2):
        step(model, resumed)
    again.search.remove()
    assert again.found.last.num_steps == 2
    assert again.found.last.own_count.read(wait=False) == (4 if count == "Adam" else None)


@pytest.mark.parametrize("how", ["in place", "wrapped", "blocks"])
def test_compiled_models_are_found_without_disturbing_dynamo(how: str) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    torch.manual_seed(0)
    model = called = Net()
    if how == "in place":
        model.compile(backend="aot_eager")
    elif how == "wrapped":
        called = torch.compile(model, backend="aot_eager")
    else:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        step(called, optimizer)
    compiled = sum(counters["frames"].values())
    watched = Watched()
    for _ in range(3):
        step(called, optimizer)
    watched.search.remove()
    step(called, optimizer)
    assert sum(counters["frames"].values()) == compiled, "no frame was looked at again"
    assert watched.found.scanned
    assert watched.found.model is called
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inductor's own, at import
def test_a_compiled_optimizer_step_is_survived(watched: Watched) -> None:
    """Dynamo would trace a plain hook into the step, and fail on it."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled_step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        compiled_step()
    assert watched.installed == [2]
    assert watched.found.model is model
    torch.compiler.reset()
