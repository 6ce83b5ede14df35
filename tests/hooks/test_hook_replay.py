"""A replay of a compiled pass says what the step's own pass would say."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from entropy_hooks import attach

from .compiled import (
    BATCH,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Block,
    Helper,
    Net,
    Trained,
    assert_alike,
    assert_finite,
    each_block,
    next_token_loss,
    train,
    wrapped,
    wrapped_for_eager,
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
