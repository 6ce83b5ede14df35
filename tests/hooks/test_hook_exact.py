"""The exact audit: autograd's own cosines on the probe, and a training job that cannot tell."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from entropy_hooks import MonitorStats, attach
from entropy_monitor.store import open_run

from .probing import MODELS, InPlace, Recurrent, Seen, Truth, half_frozen, next_byte_loss, snapshots, tied_gpt
from .scripts import finish, start
from .training import Job, apply_now, assert_same_training, byte_loss, frames, observe, tiny_gpt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS = ["blocks.0", "blocks.1", "blocks.2"]


def audited(run: Path) -> dict[int, dict[str, list[float]]]:
    """Step to layer to its two cosines, of the steps that have any."""
    found = {}
    for frame in frames(run):
        assert frame.exact_alignment is not None
        cosines = frame.exact_alignment.cosines
        if not all(math.isnan(value) for value in cosines.flatten()):
            found[frame.step] = dict(zip(frame.exact_alignment.layers, cosines.tolist(), strict=True))
    return found


# ---- nothing is disturbed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_bit_identical(run: Path, name: str, accumulate: int) -> None:
    expected = Seen(MODELS[name]).run(6, accumulate=accumulate)
    seen = Seen(MODELS[name])
    with observe(seen.job, run=run, every=1, exact_alignment_every=2) as monitor:
        seen.run(6, accumulate=accumulate)
    seen.assert_same(expected)
    if name == "checkpointed, reentrant":  # torch refuses `autograd.grad` through it
        assert monitor.stats().faults["probe_failed"] == 3
        assert audited(run) == {}
    else:
        assert monitor.stats().faults == {}
        assert list(audited(run)) == [0, 2, 4]


@pytest.mark.parametrize(
    ("protection", "name"),
    [
        ("torch.random.fork_rng", "dropout in eval mode too"),
        ("random.setstate", "draws from Python and numpy"),
        ("numpy.random.set_state", "draws from Python and numpy"),
        ("entropy_hooks.undisturbed._on_copies", "batch norm and a counter"),
        ("entropy_hooks.undisturbed._on_copies", "a buffer replaced"),
        ("entropy_hooks.undisturbed._on_copies", "max_norm"),
        ("entropy_hooks.undisturbed._on_copies", "max_norm, frozen"),
        ("entropy_hooks.undisturbed._on_copies", "tied weights"),
    ],
)
def test_without_one_of_its_protections_the_audit_would_disturb(
    run: Path, protection: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail, and nothing that is done for it is idle."""
    expected = Seen(MODELS[name]).run(3)
    seen = Seen(MODELS[name])
    monkeypatch.setattr(protection, lambda *_: contextlib.nullcontext())
    with observe(seen.job, run=run, every=1, exact_alignment_every=1):
        seen.run(3)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        seen.assert_same(expected)


def test_the_graph_is_freed_and_hooks_are_as_they_were(run: Path) -> None:
    job, made = Job(), []
    job.model.blocks[1].register_forward_hook(lambda module, args, output: made.append(weakref.ref(output)))
    with observe(job, run=run, every=1, exact_alignment_every=1):
        job.run(1)  # the first observed pass finds the last linear layers and unhooks the others
        hooks = [dict(module._forward_hooks) for module in job.model.modules()]
        job.run(2)
        assert [dict(module._forward_hooks) for module in job.model.modules()] == hooks
        gc.collect()
        assert len(made) == 6, "three training passes and three of the probe"
        assert [reference() for reference in made] == [None] * 6


def test_its_time_is_metered(run: Path) -> None:
    depths = []

    def probe(model: nn.Module) -> torch.Tensor:
        depths.append(monitor._session.meter._depth)  # type: ignore[union-attr]
        return byte_loss(model(torch.zeros(2, 16, dtype=torch.long)), torch.ones(2, 16, dtype=torch.long))

    job = Job()
    with attach(job.model, job.optimizer, run=run, every=1, exact_alignment_every=1, probe=probe) as monitor:
        job.run(2)
    assert depths == [1, 1]


# ---- the value -------------------------------------------------------------------------------------------------------

MLP = {"blocks.0": "mlp.2", "blocks.1": "mlp.2", "blocks.2": "mlp.2"}


@pytest.mark.parametrize(
    ("make_model", "last_linears"),
    [
        (tiny_gpt, MLP),
        (tied_gpt, MLP),
        (half_frozen, MLP),
        (InPlace, dict.fromkeys(MLP, "down")),
        (Recurrent, {"lstm": "has none"}),
    ],
)
def test_cosines_are_autograds_at_the_parameters_of_the_frame(
    run: Path, make_model: Callable[[], nn.Module], last_linears: dict[str, str]
) -> None:
    job = Job(make_model)
    states = snapshots(job)
    with observe(job, run=run, every=2, exact_alignment_every=4) as monitor:
        job.run(9)
    assert monitor.stats().faults == {}
    assert [frame.step for frame in frames(run)] == [0, 2, 4, 6, 8]
    found = audited(run)
    assert list(found) == [0, 4, 8]
    for step, cosines in found.items():
        truth = Truth(make_model(), states[step], job.batches[0], last_linears)
        assert list(cosines) == list(last_linears)
        for layer, pair in cosines.items():
            assert pair == pytest.approx(truth.cosines[layer], abs=2e-5, nan_ok=True), (step, layer)
    assert found[0] != found[8]


def test_a_probe_of_the_users_and_no_layers_for_which_nothing_is_known(run: Path) -> None:
    """The norm behind the blocks has no linear layer; the embedding's entropy depends on its own weight alone."""
    job, tokens = Job(), torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(9))
    states = snapshots(job)
    layers = ["bytes", "blocks.2", "norm"]
    options = {"exact_alignment_every": 1, "layers": layers, "probe": next_byte_loss(tokens)}
    with observe(job, run=run, every=1, **options) as monitor:
        job.run(2)
    assert monitor.stats().faults == {}
    for step, cosines in audited(run).items():
        truth = Truth(tiny_gpt(), states[step], tokens, {"bytes": "none", "blocks.2": "mlp.2", "norm": "none"})
        assert set(cosines) == set(layers)
        for layer, pair in cosines.items():
            assert pair == pytest.approx(truth.cosines[layer], abs=2e-5, nan_ok=True)


def test_autocast_is_off_and_accumulated_steps_use_the_first_micro_batch(run: Path) -> None:
    job = Job()
    states = snapshots(job)
    with observe(job, run=run, every=1, exact_alignment_every=1) as monitor, torch.autocast("cpu", torch.bfloat16):
        job.run(2, accumulate=2)
    assert monitor.stats().faults == {}
    for step, cosines in audited(run).items():
        truth = Truth(tiny_gpt(), states[step], job.batches[0], MLP)
        for layer, pair in cosines.items():
            assert pair == pytest.approx(truth.cosines[layer], abs=2e-5)


def test_steering_does_not_reach_the_audit(run: Path) -> None:
    job = Job()
    states = snapshots(job)
    with observe(job, run=run, every=1, exact_alignment_every=1, steer=True) as monitor:
        apply_now(job, run, monitor, "compress", weight=0.5)
        job.run(2)
    steered = [frame.step for frame in frames(run) if frame.phase == "compress"]
    assert steered == [1, 2]
    for step in steered:
        truth = Truth(tiny_gpt(), states[step], job.batches[0], MLP)
        for layer, pair in audited(run)[step].items():
            assert pair == pytest.approx(truth.cosines[layer], abs=2e-5)


# ---- where the loss comes from ---------------------------------------------------------------------------------------


class Output(NamedTuple):
    """As a Hugging Face model returns it."""

    loss: torch.Tensor | None
    logits: torch.Tensor


class Returning(nn.Module):
    """Computes its own loss, of the byte two places ahead, and returns it in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way = tiny_gpt(dropout=0.0), way

    def forward(self, tokens: torch.Tensor, *, targets: torch.Tensor | None = None) -> Any:
        logits = self.inner(tokens)
        loss = None if targets is None else byte_loss(logits, targets)
        ways = {
            "attribute": Output(loss, logits),
            "dictionary": {"loss": loss, "logits": logits},
            "tuple": (logits, loss),
            "scalar": loss,
            "next token, attribute": Output(None, logits),
            "next token, dictionary": {"logits": logits},
            "next token": logits,
            "sequence first": logits.transpose(0, 1),
            "other shape": logits[:, :-1],
            "fewer classes": logits[..., :200],
            "mean": {"mean": logits.mean((0, 1))},
        }
        return ways[self.way]


class SequenceFirst(Recurrent):
    """Runs on ``[T, B]``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16)


def train_returning(run: Path, model: Returning, steps: int = 2) -> tuple[MonitorStats, list[tuple[float, float]]]:
    """What the monitor counted; at each step the model's own loss and that of the next byte, on the first batch."""
    job = Job(lambda: model)
    tokens, losses = job.next_batch(), []
    with attach(model, job.optimizer, run=run, every=1, observe="probe", exact_alignment_every=1) as monitor:
        for _ in range(steps):
            targets = tokens.roll(-2, 1)
            with torch.no_grad():
                logits = model.inner(tokens)
                losses.append((byte_loss(logits, targets).item(), byte_loss(logits[:, :-1], tokens[:, 1:]).item()))
            model(tokens, targets=targets)
            job.optimizer.zero_grad()
            byte_loss(model.inner(tokens), targets).backward()
            job.optimizer.step()
    return monitor.stats(), losses


@pytest.mark.parametrize("way", ["attribute", "dictionary", "tuple", "scalar"])
def test_the_loss_that_the_model_returns(run: Path, way: str) -> None:
    stats, losses = train_returning(run, Returning(way))
    assert "no_probe_loss" not in stats.faults
    assert [frame.scalars["loss"] for frame in frames(run)] == pytest.approx([own for own, _ in losses], rel=1e-5)


@pytest.mark.parametrize("way", ["next token, attribute", "next token, dictionary", "next token"])
def test_next_token_cross_entropy(run: Path, way: str) -> None:
    stats, losses = train_returning(run, Returning(way))
    assert "no_probe_loss" not in stats.faults
    assert [frame.scalars["loss"] for frame in frames(run)] == pytest.approx([byte for _, byte in losses], rel=1e-5)


def test_next_token_cross_entropy_where_sequences_come_first(run: Path) -> None:
    job = Job(SequenceFirst, batch=16, tokens=16)  # as many sequences as tokens: the wrong axis would fit
    states = snapshots(job)
    with observe(job, run=run, every=1, observe="probe") as monitor:
        job.run(2)
    assert monitor.stats().faults == {}
    model, tokens = SequenceFirst(), job.batches[0]
    for frame in frames(run):
        model.load_state_dict(states[frame.step])
        with torch.no_grad():
            expected = byte_loss(model(tokens)[:-1], tokens[1:]).item()
        assert frame.scalars["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", ["sequence first", "other shape", "fewer classes", "mean"])
def test_no_loss_to_be_found(run: Path, way: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        stats, _ = train_returning(run, Returning(way), steps=3)
    assert stats.faults["no_probe_loss"] == 1
    assert sum("no_probe_loss: " in message and "give attach(probe=...)" in message for message in caplog.messages) == 1
    assert frames(run) == []


def test_without_a_loss_frames_go_on_and_say_nan(run: Path) -> None:
    def make_model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))

    def train(job: Job) -> None:
        for step in range(4):
            inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
            job.optimizer.zero_grad()
            loss = F.cross_entropy(job.model(inputs), torch.arange(32) % 4)
            loss.backward()
            job.optimizer.step()
            job.losses.append(loss.item())

    job, twin = Job(make_model), Job(make_model)
    with attach(job.model, job.optimizer, run=run, every=1, exact_alignment_every=2) as monitor:
        train(job)
    train(twin)
    assert_same_training(job, twin)
    assert monitor.stats().faults == {"no_probe_loss": 1}
    assert audited(run) == {}
    assert [frame.step for frame in frames(run)] == [0, 1, 2, 3]


# ---- where it does not run -------------------------------------------------------------------------------------------


def test_off_unless_asked_for(run: Path) -> None:
    job = Job()
    with observe(job, run=run, every=1):
        job.run(1)
    (frame,) = frames(run)
    assert frame.exact_alignment is None


@pytest.mark.parametrize("failing", ["forward", "loss"])
def test_a_probe_that_fails_costs_the_audit_and_nothing_else(run: Path, failing: str) -> None:
    def probe(model: nn.Module) -> Any:
        assert not any(module.training for module in model.modules())
        output = model(torch.zeros(2, 16, dtype=torch.long))
        if failing == "forward":
            raise ZeroDivisionError
        return output  # no scalar

    expected, seen = (Seen(MODELS["batch norm and a counter"]) for _ in range(2))
    expected.run(4)
    with observe(seen.job, run=run, every=1, exact_alignment_every=2, probe=probe) as monitor:
        seen.run(4)
    seen.assert_same(expected)
    assert monitor.stats().faults == ({"probe_failed": 2} if failing == "forward" else {"no_probe_loss": 1})
    assert audited(run) == {}
    for frame in frames(run):
        assert frame.scalars["loss"] == seen.job.losses[frame.step]
        assert frame.alignment is not None


def test_sequences_shorter_than_a_patch(run: Path) -> None:
    job, probe = Job(), next_byte_loss(torch.zeros(2, 7, dtype=torch.long))
    with observe(job, run=run, every=1, exact_alignment_every=1, probe=probe) as monitor:
        job.run(2)
    assert monitor.stats().faults == {"batch_too_short": 6}
    assert audited(run) == {}
    assert len(frames(run)) == 2


def test_a_closure_is_audited_once_a_batch_is_known(run: Path) -> None:
    job, twin = Job(), Job()
    states = snapshots(job)

    def train(job: Job) -> None:
        torch.manual_seed(5)

        def closure() -> torch.Tensor:
            job.optimizer.zero_grad()
            loss = job.forward_loss()
            loss.backward()
            job.losses.append(loss.item())
            return loss

        for _ in range(3):
            job.optimizer.step(closure)

    with attach(job.model, job.optimizer, run=run, every=1, exact_alignment_every=1) as monitor:
        train(job)
    train(twin)
    assert_same_training(job, twin)
    assert monitor.stats().faults == {"no_probe_batch": 1}
    found = audited(run)
    assert list(found) == [1, 2]
    for step, cosines in found.items():
        truth = Truth(tiny_gpt(), states[step], job.batches[0], MLP)
        assert cosines["blocks.1"] == pytest.approx(truth.cosines["blocks.1"], abs=2e-5)


DISTRIBUTED = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
losses, parameters = [], []
for observed in (False, True):
    job = Job(lambda: tiny_gpt(dropout=0.0))
    if sys.argv[2] == "sharded":
        fully_shard(job.model, mesh=init_device_mesh("cpu", (1,)))
    else:
        job.model = DistributedDataParallel(job.model)
    if observed:
        observe(job, run=Path(sys.argv[1]), every=1, exact_alignment_every=1)
    job.run(3)
    losses.append(job.losses)
    parameters.append([float(p.sum()) for p in job.parameters])
job.monitor.detach()
dist.destroy_process_group()
report(losses=losses, parameters=parameters, faults=job.monitor.stats().faults)
"""


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_distributed_parameters(run: Path, how: str) -> None:
    """A replica is audited as the model inside it; a model of which each rank has a part is not."""
    found, _ = finish(start(DISTRIBUTED, run, how))
    assert found["losses"][0] == found["losses"][1]
    assert found["parameters"][0] == found["parameters"][1]
    if how == "replicated":
        assert found["faults"] == {}
        assert list(audited(run)) == [0, 1, 2]
    else:
        assert found["faults"]["probe_sharded"] == 1
        assert "probe_failed" not in found["faults"]
        assert audited(run) == {}


def test_the_attempt_says_how_often(run: Path) -> None:
    job = Job()
    with attach(job.model, job.optimizer, run=run, every=5, exact_alignment_every=10):
        pass
    assert open_run(run).attempts()[0]["options"]["exact_alignment_every"] == 10
