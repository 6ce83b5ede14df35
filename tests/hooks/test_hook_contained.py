"""A replay changes nothing outside its twin: what it would write, draw or send there is refused, or put back."""

from __future__ import annotations

import functools
import gc
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
import torch._dynamo.eval_frame as dynamo
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from entropy_hooks import attach
from entropy_hooks.contained import Contained, ReachedOutError

from .compiled import BATCH, TOKENS, VOCABULARY, WIDTH, Net, assert_alike, assert_finite, each_block, train
from .scripts import finish, free_port, start
from .training import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- operations ------------------------------------------------------------------------------------------------------

OUTSIDE = torch.arange(4.0)
LAYER = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "write",
    [
        lambda: OUTSIDE.add_(1),
        lambda: OUTSIDE[1:2].mul_(2),
        lambda: OUTSIDE.__setitem__(0, 5.0),
        lambda: torch.add(torch.ones(4), 1, out=OUTSIDE),
        lambda: torch._foreach_add_([torch.ones(4), OUTSIDE], 1),
        lambda: OUTSIDE.resize_(9),
        lambda: OUTSIDE.view(2, 2).t().copy_(torch.zeros(2, 2)),
        lambda: F.relu(OUTSIDE - 1).add_(OUTSIDE.neg_()),
    ],
)
def test_a_write_outside_is_refused_before_it_is_done(write: Callable[[], Any]) -> None:
    before = OUTSIDE.clone()
    with pytest.raises(ReachedOutError, match="writes to a tensor outside"), Contained():
        write()
    assert torch.equal(OUTSIDE, before)


def test_a_parameter_s_data_is_outside_too() -> None:
    before = LAYER.weight.detach().clone()
    with pytest.raises(ReachedOutError), Contained():
        LAYER.weight.data.mul_(0.5)
    assert torch.equal(LAYER.weight, before)


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.zeros(3).add_(1),
        lambda: torch.tensor([1.0]).add_(1),
        lambda: torch.as_tensor([1.0]).add_(1),
        lambda: torch.ones(4).reshape(2, 2).t().add_(1),
        lambda: torch.ones(3).to(torch.float64).add_(1),
        lambda: F.dropout(LAYER(torch.ones(2, 4)), inplace=True),
        lambda: LAYER(torch.ones(2, 4)).relu_().sum().backward(),
        lambda: nn.BatchNorm1d(4)(torch.ones(2, 4)),
        lambda: nn.LSTM(4, 4)(torch.ones(2, 1, 4))[0].sum().backward(),
        lambda: nn.functional.scaled_dot_product_attention(*[torch.ones(1, 2, 4, 4, requires_grad=True)] * 3),
        lambda: torch.func.vmap(torch.func.grad(lambda x: (x**2).sum()))(torch.ones(2, 3)),
        lambda: checkpoint(LAYER, torch.ones(2, 4, requires_grad=True), use_reentrant=False).sum().backward(),
    ],
)
def test_what_is_made_within_may_be_written_to(run: Callable[[], Any]) -> None:
    with Contained():
        run()
    LAYER.zero_grad()


def test_an_address_that_was_its_own_is_not_for_ever() -> None:
    contained = Contained()
    with contained:
        for _ in range(200):
            torch.zeros(3)
    foreign = [torch.zeros(3) for _ in range(200)]
    for tensor in foreign:
        with pytest.raises(ReachedOutError), contained:
            tensor.add_(1)


def test_a_generator_that_is_drawn_from_is_put_back() -> None:
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    with Contained():
        torch.randn(3, generator=generator)
        torch.rand(3, generator=generator)
    assert torch.equal(generator.get_state(), state)


def test_no_other_thread_can_tell() -> None:
    runs: list[int] = []
    backend = lambda graph, _: lambda *args: (runs.append(1), graph.forward(*args))[1]  # noqa: E731
    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    with Contained():
        thread = threading.Thread(target=lambda: (OUTSIDE.add_(0), compiled(torch.zeros(3))))
        thread.start()
        thread.join()
    assert len(runs) == 1
    assert dynamo._stance.stance == "default"


# ---- what lies outside a model ---------------------------------------------------------------------------------------

LOSSES: list[Any] = []
MEMORY: dict[str, Any] = {"calls": 0}
BANK = torch.zeros(WIDTH)
COUNT = 0
SCRIPT_GENERATOR = torch.Generator()
NUMPY = np.random.default_rng(0)


class Outside(Net):
    """Its output depends on something outside, which each call changes."""

    def scale(self, z: torch.Tensor) -> Any:
        raise NotImplementedError

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        z = self.hidden(ids)
        return self.head(z * (1 + 0.1 * self.scale(z)))


class InGlobalNumber(Outside):
    def scale(self, z: torch.Tensor) -> Any:
        global COUNT
        COUNT += 1
        return COUNT


def remember(z: torch.Tensor) -> int:
    LOSSES.append(z.detach().mean())
    return len(LOSSES)


class InGlobalList(Outside):
    def scale(self, z: torch.Tensor) -> Any:
        return remember(z)


class InGlobalDict(Outside):
    def scale(self, z: torch.Tensor) -> Any:
        MEMORY["calls"] += 1
        return MEMORY["calls"]


class InGlobalTensor(Outside):
    def scale(self, z: torch.Tensor) -> Any:
        BANK.mul_(0.5).add_(z.detach().mean((0, 1)))
        return BANK


class InClass(Outside):
    calls = 0

    def scale(self, z: torch.Tensor) -> Any:
        type(self).calls += 1
        return self.calls


class InDefault(Outside):
    def scale(self, z: torch.Tensor, calls: list[int] = []) -> Any:  # noqa: B006
        calls.append(1)
        return len(calls)


class InFunction(Outside):
    def scale(self, z: torch.Tensor) -> Any:
        counted.calls += 1  # type: ignore[attr-defined]
        return counted.calls  # type: ignore[attr-defined]


def counted() -> None:
    """Has an attribute."""


class InGenerator(Outside):
    def scale(self, z: torch.Tensor) -> Any:
        return torch.rand(1, generator=SCRIPT_GENERATOR) + float(NUMPY.random())


ARRAY = np.zeros(WIDTH, dtype=np.float32)


class InArray(Outside):
    def scale(self, z: torch.Tensor) -> Any:
        return torch.from_numpy(ARRAY).add_(1)


class Statistics:
    def __init__(self) -> None:
        self.calls = 0


STATISTICS = Statistics()


class InGlobalObject(Outside):
    def scale(self, z: torch.Tensor) -> Any:
        STATISTICS.calls += 1
        return STATISTICS.calls


def fresh_outside() -> None:
    global COUNT
    ARRAY.fill(0)
    COUNT = InClass.calls = STATISTICS.calls = counted.calls = 0  # type: ignore[attr-defined]
    LOSSES.clear()
    MEMORY["calls"] = 0
    BANK.zero_()
    InDefault.scale.__defaults__[0].clear()  # type: ignore[index]
    SCRIPT_GENERATOR.manual_seed(0)
    NUMPY.bit_generator.state = np.random.default_rng(0).bit_generator.state


def outside() -> list[Any]:
    numbers = [COUNT, len(LOSSES), MEMORY["calls"], InClass.calls, counted.calls, STATISTICS.calls]  # type: ignore[attr-defined]
    return [*numbers, BANK.tolist(), ARRAY.tolist(), SCRIPT_GENERATOR.get_state().tolist(), NUMPY.bit_generator.state]


@pytest.mark.parametrize(
    "make",
    [
        InGlobalNumber, InGlobalList, InGlobalDict, InGlobalTensor, InClass, InDefault, InFunction, InGenerator,
        InGlobalObject, InArray,
    ],
)  # fmt: skip
def test_what_lies_outside_is_as_without_us(run: Path, make: Callable[[], nn.Module]) -> None:
    fresh_outside()
    plain = train(make, each_block, None)
    state = outside()
    fresh_outside()
    observed = train(make, each_block, run)
    assert_alike(observed, plain)
    assert outside() == state
    assert sum(observed.faults.values()) >= 4, "and it is told"


class ClosuresInAList(Net):
    """Functions in containers, which write to the model that they close over."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

        def count() -> torch.Tensor:
            return self.seen.add_(1)

        def add(model: Any, number: int) -> torch.Tensor:
            return model.seen.add_(number)

        self.actions = [count, functools.partial(add, self, number=2)]
        self.named = {"count": count}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scales = [action() for action in (*self.actions, *self.named.values())]
        return self.head(self.hidden(ids)) * (1 + 0.1 * scales[-1])


def test_functions_in_containers_lead_to_the_twin(run: Path) -> None:
    plain, observed = train(ClosuresInAList, each_block, None), train(ClosuresInAList, each_block, run)
    assert_alike(observed, plain)
    assert observed.model.seen.item() == 16  # type: ignore[operator,union-attr]
    assert observed.faults == {}
    assert_finite(frames(run), 4)


class LateTeacher(Net):
    """Begins to move its teachers after some steps, behind autograd's back."""

    def __init__(self) -> None:
        super().__init__()
        self.teachers = nn.ModuleList([nn.Linear(WIDTH, VOCABULARY).requires_grad_(False) for _ in range(3)])
        self.calls = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 3:
            for teacher in self.teachers:
                teacher.weight.data.mul_(0.9).add_(self.head.weight.data, alpha=0.1)  # type: ignore[union-attr,operator]
        z = self.hidden(ids)
        return self.head(z) + sum(teacher(z) for teacher in self.teachers)


def test_parameters_that_are_written_to_later_are_not_written_to_twice(run: Path) -> None:
    plain, observed = train(LateTeacher, each_block, None, steps=9), train(LateTeacher, each_block, run, steps=9)
    assert_alike(observed, plain)
    assert observed.faults == {"not_observed": 2}, "the first, then those that are found with it"
    assert [frame.step for frame in frames(run)] == [0, 1, 2, 5, 6, 7, 8]


# ---- copying ---------------------------------------------------------------------------------------------------------


class Drawing:
    def __deepcopy__(self, memo: Any) -> Drawing:
        torch.rand(3)
        np.random.random()
        return Drawing()


class Ending:
    ended = 0

    def __del__(self) -> None:
        type(self).ended += 1


def test_a_copy_that_draws_leaves_the_random_state(run: Path) -> None:
    def make() -> nn.Module:
        model = Net()
        model.drawing = Drawing()
        return model

    plain, observed = train(make, each_block, None), train(make, each_block, run)
    assert_alike(observed, plain)
    assert observed.faults == {}


def test_what_destroys_itself_at_its_end_is_not_copied_twice(run: Path) -> None:
    def make() -> nn.Module:
        model = Net()
        model.scratch = Ending()
        return model

    plain = train(make, each_block, None)
    Ending.ended = 0
    observed = train(make, each_block, run)
    gc.collect()
    assert Ending.ended == 0
    assert_alike(observed, plain)
    assert observed.faults == {"not_observed": 4}


class Shared(nn.Linear):
    """Is never copied: too large, say."""

    def __deepcopy__(self, memo: Any) -> Shared:
        return self


def test_a_module_that_copies_as_itself_is_left_alone(run: Path) -> None:
    calls: list[int] = []

    def make() -> nn.Module:
        model = Net()
        model.head = Shared(WIDTH, VOCABULARY)
        model.head.register_forward_hook(lambda *_: calls.append(1))
        return model

    plain, observed = train(make, each_block, None), train(make, each_block, run)
    assert_alike(observed, plain)
    assert len(calls) == 8
    assert len(observed.model.head._forward_hooks) == 1  # type: ignore[union-attr,arg-type]
    assert observed.faults == {"not_observed": 4}


class Proxy:
    """Is asked for nothing but its type."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(name)


PROXY = Proxy()


class NamesAProxy(Net):
    def forward(self, ids: torch.Tensor, default: Any = PROXY) -> torch.Tensor:
        assert PROXY is default
        return self.head(self.hidden(ids))


def test_what_runs_code_when_it_is_looked_at_is_not_looked_at(run: Path) -> None:
    plain, observed = train(NamesAProxy, each_block, None), train(NamesAProxy, each_block, run)
    assert_alike(observed, plain)
    assert observed.faults == {}


class Viewing(Net):
    """Writes through one attribute, and reads through another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(2))
        self.first = self.state[:1]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.first.add_(1)
        return self.head(self.hidden(ids)) * (1 + 0.1 * self.state[0])


def test_views_of_one_memory_stay_such(run: Path) -> None:
    plain, observed = train(Viewing, each_block, None), train(Viewing, each_block, run)
    assert_alike(observed, plain)
    assert observed.faults == {}
    assert_finite(frames(run), 4)


class Forces(nn.Module):
    """Differentiates by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> Any:
        z = x
        for block in self.blocks:
            z = torch.tanh(block(z))
        energy = self.head(z)
        return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def test_inputs_that_require_a_gradient_still_do(run: Path) -> None:
    def call(model: nn.Module, ids: torch.Tensor) -> Any:
        return model(F.one_hot(ids % WIDTH, WIDTH).float().requires_grad_())

    def loss_of(output: Any, ids: torch.Tensor) -> torch.Tensor:
        return output[0].pow(2).mean() + output[1].pow(2).mean()

    def compile_it(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="eager")  # type: ignore[return-value]

    plain = train(Forces, compile_it, None, call=call, loss_of=loss_of)
    observed = train(Forces, compile_it, run, call=call, loss_of=loss_of)
    assert_alike(observed, plain)
    assert len(frames(run)) == 4
    assert "not_observed" not in observed.faults


class Slow:
    """As many small objects would be."""

    def __deepcopy__(self, memo: Any) -> Slow:
        before = time.thread_time()
        while time.thread_time() < before + 0.3:
            pass
        return self


def test_a_slow_copy_is_told_once_it_is_the_rule(run: Path) -> None:
    def make() -> nn.Module:
        model = Net()
        model.slow = Slow()
        return model

    assert train(make, each_block, run, steps=2).faults == {}
    assert train(make, each_block, run.with_name("longer")).faults == {"slow_copy": 2}


class Cached(Net):
    """A cache keeps every model that it has seen, and each model has much."""

    def __init__(self) -> None:
        super().__init__()
        self.held = Held()
        self.itself = [self]

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def angles(self, length: int) -> torch.Tensor:
        return torch.linspace(0, 1, length)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(ids) * self.angles(ids.shape[1])[:, None])


class Held:
    alive: ClassVar[weakref.WeakSet[Held]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.alive.add(self)

    def __deepcopy__(self, memo: Any) -> Held:
        return Held()


def test_a_twin_that_something_keeps_is_empty(run: Path) -> None:
    observed = train(Cached, each_block, run)
    assert observed.faults == {}
    assert len(Held.alive) == 1, "that of the model"
    kept = [found for found in gc.get_objects() if type(found) is Cached and found is not observed.model]
    assert kept, "the cache keeps them"
    assert all(len(list(each.modules())) == 1 for each in kept), "and whoever searches the process finds modules"


# ---- hooks of torch's own --------------------------------------------------------------------------------------------


def test_quantization_s_own_hooks_are_run_in_the_twin(run: Path) -> None:
    quantization = torch.ao.quantization

    def make() -> nn.Module:
        model = Net()
        for block in model.blocks:
            block.qconfig = quantization.QConfig(  # type: ignore[assignment]
                activation=quantization.MinMaxObserver, weight=quantization.default_weight_observer
            )
        quantization.prepare(model.train(), inplace=True)
        return model

    plain, observed = train(make, each_block, None), train(make, each_block, run)
    assert_alike(observed, plain)
    assert observed.faults == {}
    assert_finite(frames(run), 4)


def test_what_transformers_puts_on_an_embedding_for_checkpointing_is_no_user_s_hook(run: Path) -> None:
    def make() -> nn.Module:
        model = Net()

        def make_inputs_require_grads(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            output.requires_grad_(True)

        model.embedding.weight.requires_grad_(False)
        model.embedding.register_forward_hook(make_inputs_require_grads)
        return model

    plain, observed = train(make, each_block, None), train(make, each_block, run)
    assert_alike(observed, plain)
    assert observed.faults == {}
    assert_finite(frames(run), 4)


# ---- ranks -----------------------------------------------------------------------------------------------------------

RANKS = """
import torch, time
import torch.distributed as dist
from torch import nn

run, which = sys.argv[1], sys.argv[2]
rank = int(os.environ["RANK"])

class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x - self.centre(x)
    @torch.compiler.disable
    def centre(self, x):
        mean = x.detach().mean((0, 1))
        dist.all_reduce(mean)
        return mean / 2

def train(run):
    torch.manual_seed(rank)
    model = Centred()
    called = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = attach(called, optimizer, run=run, every=1) if run else None
    losses = []
    for _ in range(5):
        loss = called(torch.randn(4, 16, 16)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if monitor is not None:
        monitor.detach()
    return losses, {} if monitor is None else dict(monitor.stats().faults)

dist.init_process_group("gloo")
plain, _ = train(None)
observed, faults = train(run if which == "both" or rank == 0 else None)
report(plain=plain, observed=observed, faults=faults)
dist.barrier()
time.sleep(0.3)  # gloo's own thread may abort a process that ends right behind a collective
dist.destroy_process_group()
"""


@pytest.mark.parametrize("which", ["both", "rank 0"])
def test_no_collective_is_issued_twice(run: Path, which: str) -> None:
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start(RANKS, run, which, RANK=str(rank), **variables) for rank in (0, 1)]
    try:
        found = [finish(process)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    for rank, report in enumerate(found):
        assert report["observed"] == report["plain"]
        assert report["faults"] == ({"not_observed": 5} if which == "both" or rank == 0 else {})


def test_what_another_thread_puts_into_a_global_stays_there(run: Path) -> None:
    torch.manual_seed(0)
    model = TakesFromAQueue()
    called = each_block(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    produced, over = [0], threading.Event()

    def produce() -> None:
        while not over.wait(0.001):
            QUEUE.append(torch.ones(()))
            produced[0] += 1

    thread = threading.Thread(target=produce)
    with attach(called, optimizer, run=run, every=1):
        thread.start()
        for _ in range(20):
            called(torch.randint(0, VOCABULARY, (BATCH, TOKENS))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        over.set()
        thread.join()
    assert len(QUEUE) == produced[0]


QUEUE: list[torch.Tensor] = []


class TakesFromAQueue(Net):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(ids)) * (1 + 0.001 * len(QUEUE))
