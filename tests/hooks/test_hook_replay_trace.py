"""A replay of a compiled pass leaves no trace in the training."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from entropy_hooks import attach
from entropy_hooks.twin import make_twin

from .compiled import (
    BATCH,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Helper,
    Net,
    assert_alike,
    assert_finite,
    each_block,
    next_token_loss,
    train,
    wrapped,
)
from .training import flushed, frames, positions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Remembering(Net):
    """Keeps all that a forward pass can keep, and lets it act on the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))
        self.state: Any = None
        self.pair: tuple[torch.Tensor, int] = (torch.zeros(WIDTH), 0)
        self.count, self.history, self.cache = 0, [], {"scale": torch.ones(())}
        self.torchs, self.numpys, self.pythons = torch.Generator(), np.random.default_rng(0), random.Random(0)
        self.helper = Helper()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        z = self.hidden(ids)
        if self.state is not None:
            z = z + 0.1 * self.state.mean()
        z = z + 0.1 * self.average + 0.1 * self.pair[0] + 0.01 * self.count + 0.01 * self.helper.total
        z = z + 0.01 * torch.rand(WIDTH, generator=self.torchs)
        z = z + 0.01 * float(self.numpys.random()) + 0.01 * self.pythons.random()
        z = z + 0.1 * self.cache["scale"] + 0.01 * len(self.history)
        self.state = z.detach()[-1]
        with torch.no_grad():
            self.average.mul_(0.9).add_(z.mean((0, 1)))
            self.cache["scale"].mul_(0.99)
            self.pair = (self.pair[0] + 0.1, self.pair[1] + 1)
        self.count += 1
        self.history.append(z.detach().mean())
        self.helper.see(z)
        return self.head(z)


def test_what_forward_keeps_is_what_it_is_without_us(run: Path) -> None:
    plain, observed = train(Remembering, each_block, None), train(Remembering, each_block, run)
    assert_alike(observed, plain)
    model: Any = observed.model
    assert (model.count, len(model.history), model.pair[1]) == (4, 4, 4)
    assert torch.equal(model.state, plain.model.state)  # type: ignore[arg-type]
    assert torch.equal(model.torchs.get_state(), plain.model.torchs.get_state())  # type: ignore[union-attr,operator]
    assert observed.faults == {}
    assert_finite(frames(run), 4)


def test_hooks_of_the_user_s_are_called_once_a_pass(run: Path) -> None:
    calls: list[str] = []

    def make() -> nn.Module:
        model = Net()
        for name, module in (("head", model.head), ("block", model.blocks[0].inner)):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(f"before {name}"))
            module.register_forward_hook(lambda *_, name=name: calls.append(f"after {name}"))
            module.register_full_backward_hook(lambda *_, name=name: calls.append(f"backward {name}"))
        return model

    plain = train(make, each_block, None)
    expected = list(calls)
    calls.clear()
    observed = train(make, each_block, run)
    assert calls == expected
    assert_alike(observed, plain)
    assert observed.faults == {"no_gradients": 4}, "a hook may change gradients, and the twin has none"
    assert all(np.isnan(group.gradients).all() for frame in frames(run) for group in frame.groups)


def test_weights_that_torch_s_own_hooks_compute_are_computed(run: Path) -> None:
    def make() -> nn.Module:
        model = Net()
        nn.utils.spectral_norm(model.blocks[0].outer)
        nn.utils.weight_norm(model.head)
        return model

    plain, observed = train(make, each_block, None), train(make, each_block, run)
    assert_alike(observed, plain)
    assert observed.faults == {}
    assert_finite(frames(run), 4)


class Teacher(Net):
    """Its forward pass moves a teacher after the student, in place and behind autograd's back (MoCo)."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(WIDTH, VOCABULARY)
        self.teacher.weight.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.teacher.weight.data.mul_(0.9).add_(self.head.weight.data, alpha=0.1)
        z = self.hidden(ids)
        return self.head(z) + self.teacher(z).detach()


def test_a_forward_pass_that_writes_to_parameters_is_noticed_before_it_is_run_again(run: Path) -> None:
    plain, observed = train(Teacher, each_block, None), train(Teacher, each_block, run)
    assert_alike(observed, plain)
    assert observed.faults == {"not_observed": 1}, "the first step shows it"
    assert [frame.step for frame in frames(run)] == [1, 2, 3]
    assert_finite(frames(run), 3)


class Clamped(Net):
    """As `Teacher`, on parameters that are trained."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.head.weight.mul_(0.99)
        return self.head(self.hidden(ids))


def test_so_is_one_that_scales_trained_parameters(run: Path) -> None:
    plain, observed = train(Clamped, each_block, None), train(Clamped, each_block, run)
    assert_alike(observed, plain)
    assert observed.faults == {"not_observed": 1}


class Hiding(Net):
    """Hides a teacher in a list, and an optimizer beside it."""

    moves = False

    def __init__(self) -> None:
        super().__init__()
        self.hidden_teacher = [nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)]
        self.hidden_teacher[0].register_forward_hook(lambda *_: CALLS.append("teacher"))
        self.own = torch.optim.SGD(self.parameters(), lr=0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        (teacher,) = self.hidden_teacher
        if self.moves:
            teacher.weight.mul_(0.9).add_(self.head.weight.detach(), alpha=0.1)
        z = self.hidden(ids)
        return self.head(z) + teacher(z)


class HidingMoving(Hiding):
    moves = True


CALLS: list[str] = []


@pytest.mark.parametrize("make", [Hiding, HidingMoving])
def test_a_hidden_module_is_treated_as_the_others(run: Path, make: Callable[[], nn.Module]) -> None:
    plain = train(make, each_block, None)
    CALLS.clear()
    observed = train(make, each_block, run)
    assert_alike(observed, plain)
    assert len(CALLS) == 4
    teachers = [trained.model.hidden_teacher[0].weight for trained in (plain, observed)]  # type: ignore[index,union-attr]
    assert torch.equal(*teachers)
    unobserved = int(make is HidingMoving)
    assert observed.faults == {"no_gradients": 4 - unobserved, **({"not_observed": 1} if unobserved else {})}
    assert len(frames(run)) == 4 - unobserved


def test_a_twin_shares_what_is_large() -> None:
    model = Hiding()
    made = make_twin(model, {}, (), {}, ())
    twin: Any = made.model
    assert twin.head.weight is model.head.weight
    assert twin.hidden_teacher[0] is not model.hidden_teacher[0]
    assert twin.hidden_teacher[0].weight is model.hidden_teacher[0].weight
    assert twin.own is model.own


class Counting(Net):
    """Counts its calls, and each makes another output."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.head(self.hidden(ids)) * (1 + self.count / 10)


def with_a_wrapped_forward() -> nn.Module:
    model, calls = Counting(), [0]
    original = model.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return original(ids) * (1 + calls[0] / 10)

    model.forward = forward  # type: ignore[method-assign]
    return model


def with_a_compiled_method() -> nn.Module:
    model = Counting()
    model.forward = torch.compile(model.forward, backend="aot_eager")  # type: ignore[method-assign]
    return model


class WeaklyTied(Counting):
    """A child knows its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.head.parent = weakref.ref(self)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        parent: Any = self.head.parent()  # type: ignore[operator]
        parent.count += 1
        return self.head(self.hidden(ids)) * (1 + parent.count / 10)


@pytest.mark.parametrize("make", [with_a_wrapped_forward, with_a_compiled_method, WeaklyTied])
def test_ways_back_to_the_model_lead_to_the_twin(run: Path, make: Callable[[], nn.Module]) -> None:
    plain, observed = train(make, each_block, None), train(make, each_block, run)
    assert_alike(observed, plain)
    assert observed.model.count == plain.model.count == 4
    assert observed.faults == {}
    assert_finite(frames(run), 4)


REGISTRY: dict[str, Any] = {}


class Registered(Counting):
    """Finds itself in a global registry."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        REGISTRY["model"] = self

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        model = REGISTRY["model"]
        model.count += 1
        z = self.hidden(ids)
        return model.head(model.norm(z.flatten(0, 1)).view_as(z)) * (1 + model.count / 10)


class RegisteredCount(Registered):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        REGISTRY["model"].count += 1
        return self.head(self.hidden(ids)) * (1 + REGISTRY["model"].count / 10)


@pytest.mark.parametrize("make", [Registered, RegisteredCount])
def test_a_twin_that_reaches_the_model_is_stopped_and_told(run: Path, make: Callable[[], nn.Module]) -> None:
    plain, observed = train(make, each_block, None), train(make, each_block, run)
    assert_alike(observed, plain)
    assert observed.model.count == 4
    assert observed.faults == {"not_observed": 4}
    assert frames(run) == []


def test_a_model_that_cannot_be_copied_is_not_observed(run: Path) -> None:
    def make() -> nn.Module:
        model = Net()
        model.lock = threading.Lock()
        return model

    plain, observed = train(make, each_block, None), train(make, each_block, run)
    assert_alike(observed, plain)
    assert observed.faults == {"not_observed": 4}
    assert frames(run) == []


def test_global_module_hooks_are_not_called_again(run: Path) -> None:
    seen: list[str] = []
    with contextlib.ExitStack() as stack:
        plain = train(Net, each_block, None)
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        stack.callback(handle.remove)
        observed = train(Net, each_block, run)
    assert_alike(observed, plain)
    assert seen.count("Net") == 4
    assert observed.faults == {"not_observed": 4}


def test_what_the_loop_passes_in_is_not_changed_twice_and_may_be_filled_anew(run: Path) -> None:
    """A cache that the forward pass extends, and a batch whose memory the loader uses again."""

    class Caching(Net):
        def forward(self, ids: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
            z = self.hidden(ids) + 0.1 * sum(cache)
            cache.append(z.detach().mean())
            return self.head(z)

    def train_on_one_buffer(run: Path | None) -> tuple[list[float], list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        model, cache = each_block(Caching()), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        buffer, losses, batches = torch.empty(BATCH, TOKENS, dtype=torch.long), [], []
        monitor = None if run is None else attach(model, optimizer, run=run, every=1)
        for _ in range(3):
            buffer.copy_(torch.randint(0, VOCABULARY, (BATCH, TOKENS)))
            batches.append(buffer.clone())
            loss = next_token_loss(model(buffer, cache), buffer)
            loss.backward()
            buffer.zero_()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            assert monitor is None or flushed(monitor)
        if monitor is not None:
            monitor.detach()
            assert monitor.stats().faults == {}
        return losses, cache, batches

    plain, observed = train_on_one_buffer(None), train_on_one_buffer(run)
    assert observed[0] == plain[0]
    assert observed[1] == plain[1]
    for frame, ids in zip(frames(run), observed[2], strict=True):
        assert len(positions(frame, ids)) == 8 * frame.num_patches


@pytest.mark.parametrize("compile_it", [wrapped, each_block])
def test_outputs_that_the_user_collects_hold_no_twin(run: Path, compile_it: Callable[[nn.Module], nn.Module]) -> None:
    class Only(Net):
        """Counted below."""

    torch.manual_seed(0)
    model = Only()
    called = compile_it(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs: list[torch.Tensor] = []
    with attach(called, optimizer, run=run, every=1) as monitor:
        for _ in range(3):
            outputs.append(called(torch.randint(0, VOCABULARY, (BATCH, TOKENS))))
            outputs[-1].square().mean().backward()
            optimizer.step()
            assert flushed(monitor)
        gc.collect()
        assert sum(type(thing) is Only for thing in gc.get_objects()) == 1
    assert monitor.stats().faults == {}
    assert_finite(frames(run), 3)
