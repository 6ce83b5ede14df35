"""A replay of a compiled pass leaves no trace in the training, and says what the step's own pass would say."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from entropy_hooks import attach
from entropy_hooks.twin import make_twin

from .training import flushed, frames, positions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from entropy_hooks import Monitor
    from entropy_monitor.types import Frame

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]
BATCH, TOKENS, WIDTH, VOCABULARY = 8, 16, 16, 32


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.outer(F.gelu(self.inner(z)))


class Net(nn.Module):
    """Plain; what is special is in its children."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        z = self.embedding(ids)
        for block in self.blocks:
            z = block(z)
        return z

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.hidden(ids))


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def each_block(model: nn.Module) -> nn.Module:
    """The model's own code stays Python; only its blocks are compiled."""
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="aot_eager")
    return model


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def wrapped_for_eager(model: nn.Module) -> nn.Module:
    """Autograd sees the model's own operations, not one node."""
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


@dataclass
class Trained:
    losses: list[float]
    model: nn.Module
    faults: dict[str, int]


def train(
    make: Callable[[], nn.Module],
    compile_it: Callable[[nn.Module], nn.Module],
    run: Path | None,
    *,
    loss_of: Callable[[Any, torch.Tensor], torch.Tensor] = next_token_loss,
    call: Callable[[nn.Module, torch.Tensor], Any] = lambda model, ids: model(ids),
    steps: int = 4,
    batch: int = BATCH,
    **options: Any,
) -> Trained:
    torch.manual_seed(0)
    model = make()
    called = compile_it(model)
    optimizer = torch.optim.AdamW([entry for entry in model.parameters() if entry.requires_grad], lr=1e-2)
    monitor: Monitor | None = None
    if run is not None:
        monitor = attach(called, optimizer, run=run, every=1, **options)
    losses: list[float] = []
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (batch, TOKENS))
        loss = loss_of(call(called, ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if monitor is not None:
            assert flushed(monitor)
    if monitor is not None:
        monitor.detach()
    return Trained(losses, model, {} if monitor is None else dict(monitor.stats().faults))


def assert_alike(one: Trained, other: Trained) -> None:
    assert one.losses == other.losses
    for first, second in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


# ---- no trace in the training ----------------------------------------------------------------------------------------


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


class Helper:
    """An object of the user's own, no module."""

    def __init__(self) -> None:
        self.total = 0.0
        self.term: Any = None

    def see(self, z: torch.Tensor) -> None:
        self.total += 0.1


def test_what_forward_keeps_is_what_it_is_without_us(run: Path) -> None:
    plain, observed = train(Remembering, each_block, None), train(Remembering, each_block, run)
    assert_alike(observed, plain)
    model: Any = observed.model
    assert (model.count, len(model.history), model.pair[1]) == (4, 4, 4)
    assert torch.equal(model.state, plain.model.state)  # type: ignore[arg-type]
    assert torch.equal(model.torchs.get_state(), plain.model.torchs.get_state())  # type: ignore[union-attr,operator]
    assert observed.faults == {}
    assert_finite(frames(run), 4)


def assert_finite(found: list[Frame], number: int) -> None:
    assert len(found) == number
    for frame in found:
        for group in frame.groups:
            tokens = slice(None, 8 * frame.num_patches)
            assert group.gradients is not None
            assert np.isfinite(group.gradients[:, tokens]).all()
            assert (group.gradients[:, tokens] != 0).any()


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


# ---- what a replay says ----------------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class Deep(Net):
    """Returns what it computed its output from."""

    kind = "tuple"

    def forward(self, ids: torch.Tensor) -> Any:
        hidden = self.hidden(ids)
        logits = self.head(hidden)
        if self.kind == "dataclass":
            return Output(logits, hidden)
        return (logits, logits, hidden) if self.kind == "twice" else (logits, hidden)


def deep_loss(output: Any, ids: torch.Tensor) -> torch.Tensor:
    if isinstance(output, Output):
        return next_token_loss(output.logits, ids) + 3 * output.hidden.square().mean()
    logits = (output[0] + output[1]) / 2 if len(output) == 3 else output[0]
    return next_token_loss(logits, ids) + 3 * output[-1].square().mean()


def as_it_is(model: nn.Module) -> nn.Module:
    return model


class Adding(Net):
    """Its layers leave losses of their own in attributes, one of them in a list and one in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[torch.Tensor] = []
        self.helper = Helper()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        z = self.embedding(ids)
        self.terms.clear()
        for block in self.blocks:
            z = block(z)
            self.terms.append(z.square().mean())
        self.helper.term = z.abs().mean()
        self.scores = self.head(z)  # and what is returned as well
        return self.scores

    def added(self) -> torch.Tensor:
        return 3 * sum(self.terms) + self.helper.term  # type: ignore[no-any-return]


class Broken(Net):
    """Behind a graph break a compiled model uses both an output and what its graph has made of that."""

    def forward(self, ids: torch.Tensor) -> Any:
        first = self.blocks[0](self.embedding(ids))
        second = self.blocks[1](first)
        torch._dynamo.graph_break()
        return self.head(first + second), first


def float_gradients(
    make: Callable[[], nn.Module],
    compile_it: Callable[[nn.Module], nn.Module],
    run: Path,
    loss_of: Callable[[nn.Module, torch.Tensor], torch.Tensor],
) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Gradients of one observed step as they were gathered: float32, layer by layer, in the order of the batch."""
    torch.manual_seed(0)
    model = make()
    called = compile_it(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gathered: list[torch.Tensor] = []
    with attach(called, optimizer, run=run, every=1) as monitor:
        assembler = monitor._session._assembler  # type: ignore[union-attr]
        assemble = assembler.assemble

        def spy(observed: Any, *args: Any) -> Any:
            order = observed.capture.sample.flat.argsort()
            gathered.extend(gradient[order].clone() for _, gradient in sorted(observed.capture.gradients.items()))
            return assemble(observed, *args)

        assembler.assemble = spy
        loss_of(called, torch.randint(0, VOCABULARY, (4, TOKENS))).backward()
        optimizer.step()
        assert flushed(monitor)
    return gathered, dict(monitor.stats().faults)


COMPILED = [wrapped, wrapped_for_eager, each_block]


@pytest.mark.parametrize("compile_it", COMPILED)
@pytest.mark.parametrize("kind", ["tuple", "twice", "dataclass", "attributes"])
def test_gradients_are_those_of_eager_autograd(
    tmp_path: Path, compile_it: Callable[[nn.Module], nn.Module], kind: str
) -> None:
    def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        if kind != "attributes":
            return deep_loss(model(ids), ids)
        loss = next_token_loss(model(ids), ids)
        return loss + getattr(model, "_orig_mod", model).added()  # type: ignore[operator]

    make = Adding if kind == "attributes" else type(kind, (Deep,), {"kind": kind})
    expected, no_faults = float_gradients(make, as_it_is, tmp_path / "eager", loss_of)
    found, faults = float_gradients(make, compile_it, tmp_path / "compiled", loss_of)
    assert faults == no_faults == {}
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


class Viewed(Net):
    """Returns a view of what it returns and computes more from."""

    def forward(self, ids: torch.Tensor) -> Any:
        hidden = self.hidden(ids)
        return self.head(hidden), hidden, hidden[:, -1]


def viewed_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits, hidden, last = model(ids)
    return next_token_loss(logits, ids) + hidden.square().mean() + 3 * last.abs().mean()


def hooked_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The user's own hook changes the gradient of what the model returned."""
    logits = model(ids)
    logits.register_hook(lambda gradient: 2 * gradient)
    return next_token_loss(logits, ids)


FEATURES: list[torch.Tensor] = []


def with_features() -> nn.Module:
    model = Net()
    model.blocks[0].register_forward_hook(lambda module, args, output: FEATURES.append(output))
    return model


def distillation_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Uses what a hook has handed out."""
    FEATURES.clear()
    return next_token_loss(model(ids), ids) + 3 * FEATURES[-1].square().mean()


def written_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return next_token_loss(model(ids).mul_(2), ids)


def penalised_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Parameters are no layer's output."""
    return next_token_loss(model(ids), ids) + sum(entry.square().sum() for entry in model.parameters())


@pytest.mark.parametrize(
    ("make", "loss_of", "compile_it", "told"),
    [
        (Net, hooked_loss, wrapped, True),
        (Net, hooked_loss, each_block, True),
        (Net, penalised_loss, wrapped, True),
        (Net, penalised_loss, each_block, True),
        (Net, written_loss, wrapped, True),
        (Net, written_loss, each_block, False),
        (Viewed, viewed_loss, wrapped, False),
        (Viewed, viewed_loss, wrapped_for_eager, True),
        (Viewed, viewed_loss, each_block, True),
        (with_features, distillation_loss, wrapped, False),
        (with_features, distillation_loss, each_block, False),
    ],
)
def test_gradients_are_right_or_undetermined(
    tmp_path: Path,
    make: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    compile_it: Callable[[nn.Module], nn.Module],
    told: bool,
) -> None:
    expected, _ = float_gradients(make, as_it_is, tmp_path / "eager", loss_of)
    found, faults = float_gradients(make, compile_it, tmp_path / "compiled", loss_of)
    assert len(found) == (len(expected) if told else 0)
    assert faults == ({} if told else {"no_gradients": 1})
    for one, other in zip(found, expected, strict=told):
        assert float((one - other).norm() / other.norm()) < 1e-5


def test_gradients_that_cannot_be_told_are_undetermined(tmp_path: Path) -> None:
    def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        logits, first = model(ids)
        return next_token_loss(logits, ids) + 3 * first.square().mean()

    gathered, faults = float_gradients(Broken, wrapped, tmp_path / "broken", loss_of)
    assert gathered == []
    assert faults == {"no_gradients": 1}
    (frame,) = frames(tmp_path / "broken")
    assert frame.gradients is not None
    assert np.isnan(frame.gradients[:, : 8 * frame.num_patches]).all()
    # Blocks that are compiled one by one show all that passes between them.
    expected, _ = float_gradients(Broken, as_it_is, tmp_path / "eager", loss_of)
    found, faults = float_gradients(Broken, each_block, tmp_path / "blocks", loss_of)
    assert faults == {}
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


def test_the_loss_and_the_batch_are_those_of_the_pass_with_a_backward_pass(run: Path) -> None:
    torch.manual_seed(0)
    model = each_block(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, batches = [], []
    with attach(model, optimizer, run=run, every=1) as monitor:
        for _ in range(3):
            ids, others = torch.randint(0, VOCABULARY, (2, BATCH, TOKENS))
            loss = next_token_loss(model(ids), ids)
            next_token_loss(model(others), others)  # an evaluation with gradients
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            batches.append(ids)
            assert flushed(monitor)
    assert monitor.stats().faults == {}
    found = frames(run)
    assert_finite(found, 3)
    for frame, loss, ids in zip(found, losses, batches, strict=True):
        assert frame.scalars["loss"] == pytest.approx(loss, rel=1e-6)
        assert len(positions(frame, ids)) == 8 * frame.num_patches


def with_closures(
    run: Path | None, compile_it: Callable[[nn.Module], nn.Module], optimizer_of: Callable[..., torch.optim.Optimizer]
) -> tuple[Trained, list[list[float]], list[torch.Tensor]]:
    """All losses of each step, and its batch."""
    torch.manual_seed(0)
    model = Net()
    called = compile_it(model)
    optimizer = optimizer_of(model.parameters())
    monitor = None if run is None else attach(called, optimizer, run=run, every=1)
    losses: list[list[float]] = []
    batches: list[torch.Tensor] = []
    for _ in range(3):
        ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
        batches.append(ids)
        losses.append([])

        def closure(ids: torch.Tensor = ids) -> torch.Tensor:
            optimizer.zero_grad()
            loss = next_token_loss(called(ids), ids)
            loss.backward()
            losses[-1].append(loss.item())
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        assert monitor is None or flushed(monitor)
    if monitor is not None:
        monitor.detach()
    faults = {} if monitor is None else dict(monitor.stats().faults)
    return Trained([step[-1] for step in losses], model, faults), losses, batches


@pytest.mark.parametrize("compile_it", [wrapped, each_block])
def test_a_closure_s_pass_is_run_again_before_the_optimizer_steps(
    tmp_path: Path, compile_it: Callable[[nn.Module], nn.Module]
) -> None:
    """As Lightning trains; after the step its parameters are gone."""
    adamw = functools.partial(torch.optim.AdamW, lr=0.1)
    plain, _, _ = with_closures(None, compile_it, adamw)
    with_closures(tmp_path / "eager", as_it_is, adamw)
    observed, losses, batches = with_closures(tmp_path / "run", compile_it, adamw)
    assert_alike(observed, plain)
    assert observed.faults == {}
    found, expected = frames(tmp_path / "run"), frames(tmp_path / "eager")
    assert_finite(found, 3)
    for one, other, loss, ids in zip(found, expected, losses, batches, strict=True):
        assert one.scalars["loss"] == pytest.approx(loss[-1], rel=1e-6)
        assert one.scalars["grad_norm"] == pytest.approx(other.scalars["grad_norm"], rel=1e-5)
        places = (np.argsort([16 * row + at for row, at in positions(frame, ids)]) for frame in (one, other))
        values = [frame.gradients[:, place] for frame, place in zip((one, other), places, strict=True)]  # type: ignore[index]
        assert np.linalg.norm(values[0] - values[1]) / np.linalg.norm(values[1]) < 5e-3, "bfloat16"


def test_a_closure_that_runs_several_times_is_observed_in_its_last_pass(run: Path) -> None:
    lbfgs = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    plain, _, _ = with_closures(None, wrapped, lbfgs)
    observed, losses, batches = with_closures(run, wrapped, lbfgs)
    assert_alike(observed, plain)
    assert observed.faults == {}
    assert_finite(frames(run), 3)
    for frame, loss, ids in zip(frames(run), losses, batches, strict=True):
        assert len(loss) == 3
        assert frame.scalars["loss"] == pytest.approx(loss[-1], rel=1e-6)
        assert len(positions(frame, ids)) == 8 * frame.num_patches


def test_a_step_without_a_pass_is_a_fault(run: Path) -> None:
    """Compiled beforehand, and then run in a way that cannot be seen."""
    torch.manual_seed(0)
    model = each_block(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, run=run, every=1) as monitor:
        for _ in range(2):
            ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
            next_token_loss(model.forward(ids), ids).backward()
            optimizer.step()
            assert flushed(monitor)
    assert monitor.stats().faults == {"not_observed": 2}
    assert frames(run) == []


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        z = self.embedding(ids)
        for block in self.blocks:
            z = block(z)
        return self.head(z)


def test_time_steps_are_not_taken_for_sequences(run: Path) -> None:
    """Of 64 steps of 4 sequences, position by position, some steps would do as well as all."""
    found = train(
        SequenceFirst, wrapped, run, call=lambda model, ids: model(ids.T).transpose(0, 1), batch=4, token_dim=0, steps=2
    )
    assert found.faults == {}
    for frame in frames(run):
        assert frame.num_patches == 4 * TOKENS // 8
        assert frame.alignment is not None
        assert (frame.alignment.info[:, 2] == frame.num_patches).all()


class Positioned(Net):
    """Takes arguments whose first dimension is no batch, and as long."""

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        z = self.embedding(ids) + self.embedding(positions)
        scores = (z @ z.transpose(1, 2)).masked_fill(mask, -1e9)
        z = scores.softmax(-1) @ z
        for block in self.blocks:
            z = block(z)
        return self.head(z)


def test_arguments_that_only_look_like_batches(run: Path) -> None:
    """Lengths alone cannot tell them from batches: the whole batch is run."""
    positions, mask = torch.arange(TOKENS), torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    call = {"call": lambda model, ids: model(ids, positions, mask), "batch": TOKENS, "patches": 8}
    plain = train(Positioned, wrapped, None, **call)  # type: ignore[arg-type]
    observed = train(Positioned, wrapped, run, **call)  # type: ignore[arg-type]
    assert_alike(observed, plain)
    assert observed.faults == {}
    assert_finite(frames(run), 4)


class Stateful(Net):
    """Takes a state as recurrent layers do, ``[1, B, d]``."""

    def forward(self, ids: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(ids) + state.transpose(0, 1))


def test_a_batch_that_is_not_the_first_dimension_everywhere(run: Path) -> None:
    state = torch.randn(1, 64, WIDTH)
    observed = train(Stateful, wrapped, run, call=lambda model, ids: model(ids, state), batch=64)
    assert observed.faults == {}
    assert_finite(frames(run), 4)


class Weighted(Net):
    """Takes a weight for each word, or whatever it is given."""

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if len(weights) == VOCABULARY:
            return self.head(self.hidden(ids)) * weights
        return self.head(self.hidden(ids)) * weights.mean()  # a part of them fits as well


class StrictlyWeighted(Net):
    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(ids)) * weights


@pytest.mark.parametrize("make", [Weighted, StrictlyWeighted])
def test_as_many_words_as_sequences(run: Path, make: Callable[[], nn.Module]) -> None:
    """What is taken for a batch in vain is noticed: the part cannot be run, or comes out otherwise."""
    weights = torch.linspace(0.5, 1.5, VOCABULARY)
    call = {"call": lambda model, ids: model(ids, weights), "batch": VOCABULARY, "patches": 8}
    plain = train(make, wrapped, None, **call)  # type: ignore[arg-type]
    observed = train(make, wrapped, run, **call)  # type: ignore[arg-type]
    assert_alike(observed, plain)
    assert observed.faults == {"replay_differs": 1}, "whole batches from then on"
    first, *others = frames(run)
    assert_finite(others, 3)
    tokens = slice(None, 8 * first.num_patches)
    assert np.isfinite(first.activations[:, tokens]).all()
    assert first.gradients is not None
    assert np.isnan(first.gradients[:, tokens]).all()


class Rows(nn.Module):
    """Each row of its input is a token: they are one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(pixels.flatten(1))))))


def test_rows_that_are_tokens_are_counted_as_such(run: Path) -> None:
    pixels = torch.randn(256, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    found = train(
        Rows, wrapped, run, loss_of=lambda output, _: output.square().mean(), call=lambda model, _: model(pixels)
    )
    assert found.faults == {}
    first, *others = frames(run)
    assert first.num_patches == 8, "a part, before it is known what rows are"
    assert [frame.num_patches for frame in others] == [32] * 3, "fewer than 64: all"
    for frame in (first, *others):
        assert frame.alignment is not None
        assert (frame.alignment.info[:, 2] == 256 / 8).all()
    found = train(
        Rows,
        wrapped,
        run.with_name("few"),
        loss_of=lambda output, _: output.square().mean(),
        call=lambda model, _: model(pixels),
        patches=4,
    )
    assert found.faults == {}
    assert [frame.num_patches for frame in frames(run.with_name("few"))] == [1, 4, 4, 4]


@dataclass
class Batch:
    ids: torch.Tensor
    weight: float = 1.0


def test_a_batch_in_an_object_is_run_as_a_whole(run: Path) -> None:
    class Taking(Net):
        def forward(self, batch: Batch) -> torch.Tensor:  # type: ignore[override]
            return self.head(self.hidden(batch.ids)) * batch.weight

    plain = train(Taking, each_block, None, call=lambda model, ids: model(Batch(ids)), batch=64)
    observed = train(Taking, each_block, run, call=lambda model, ids: model(Batch(ids)), batch=64)
    assert_alike(observed, plain)
    assert observed.faults == {}
    assert_finite(frames(run), 4)


def test_an_output_without_tensors_is_a_fault(run: Path) -> None:
    class Closed(Net):
        def forward(self, ids: torch.Tensor) -> Any:
            return lambda: self.head(self.hidden(ids))

    plain = train(Closed, each_block, None, loss_of=lambda output, ids: next_token_loss(output(), ids))
    observed = train(Closed, each_block, run, loss_of=lambda output, ids: next_token_loss(output(), ids))
    assert_alike(observed, plain)
    assert observed.faults == {"not_observed": 4}


def test_outputs_that_the_loss_does_not_use_are_no_fault(run: Path) -> None:
    found = train(
        type("tuple", (Deep,), {"kind": "tuple"}),
        wrapped,
        run,
        loss_of=lambda output, ids: next_token_loss(output[0], ids),
    )
    assert found.faults == {}
    assert_finite(frames(run), 4)
