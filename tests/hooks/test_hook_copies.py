"""What is saved, copied, scripted or transformed while it is observed is what it would be without us."""

from __future__ import annotations

import copy
import copyreg
import io
import multiprocessing.reduction
import pickle
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.jit import _recursive
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from entropy_hooks import attach
from entropy_monitor.errors import ConfigError
from entropy_monitor.store import open_run

from .training import BATCH, TOKENS, Job, assert_same_training, byte_loss, flushed, observe, tiny_gpt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from entropy_hooks import Monitor

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`torch.jit.{name}` is deprecated:DeprecationWarning")
    for name in ("script", "trace", "trace_method", "script_method")
]


def add_one(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """A hook of the user's."""
    return output + 1


class Hooked(nn.Module):
    """With a hook of the user's, and its handle as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.handle = self.blocks[1].register_forward_hook(add_one)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            z = block(z)
        return z


def _loaded(state: dict[str, torch.Tensor]) -> Reduced:
    model = Reduced()
    model.load_state_dict(state)
    return model


class Reduced(Hooked):
    """Says itself how it is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, (self.state_dict(),)


class Stateful(Hooked):
    """Leaves something out of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = [1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": []}


def saved(thing: object) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def entries(file: bytes) -> dict[str, bytes]:
    """The zip archive's entries, without torch's random number of the file."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("serialization_id")}


def by_torch(model: nn.Module) -> Any:
    return torch.load(io.BytesIO(saved(model)), weights_only=False)


def by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_multiprocessing(model: nn.Module) -> Any:
    return pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(model))


COPIES: list[Callable[[nn.Module], Any]] = [by_torch, by_pickle, by_multiprocessing, copy.deepcopy]


def train(model: nn.Module, *, width: int = 8, steps: int = 2, monitor: Monitor | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(2, 16, width)).square().mean().backward()
        optimizer.step()
        if monitor is not None:
            flushed(monitor)


def attached(model: nn.Module, run: Path, **options: Any) -> Monitor:
    return attach(model, torch.optim.SGD(model.parameters(), lr=0.1), run=run, every=1, **options)


@pytest.mark.parametrize("kind", [Hooked, Reduced, Stateful])
def test_a_saved_model_is_the_same_to_the_byte(run: Path, kind: type[nn.Module]) -> None:
    model = kind()
    before = entries(saved(model))
    assert before == entries(saved(model))
    with attached(model, run, steer=True):
        assert entries(saved(model)) == before
    assert entries(saved(model)) == before


@pytest.mark.parametrize("kind", [Hooked, Reduced, Stateful])
@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_holds_the_user_s_hooks_and_none_of_ours(
    run: Path, kind: type[Hooked], duplicate: Callable[[nn.Module], Any]
) -> None:
    model = kind()
    z = torch.randn(2, 16, 8)
    with attached(model, run, steer=True):
        twin = duplicate(model)
        assert [list(block._forward_hooks.values()) for block in twin.blocks] == [[], [add_one]]
        assert not any(module._forward_pre_hooks for module in twin.modules())
        assert torch.equal(twin(z), model(z))
        hooked = twin(z)
        twin.handle.remove()  # it removes the copy's own hook
        assert torch.equal(twin(z) + 1, hooked)
        assert torch.equal(model(z), hooked)


@pytest.mark.parametrize("duplicate", [by_torch, by_pickle, copy.deepcopy])
def test_a_copy_is_neither_observed_nor_counted(run: Path, duplicate: Callable[[nn.Module], Any]) -> None:
    job, truth = (Job(lambda: tiny_gpt(dropout=0)) for _ in range(2))
    monitor = observe(job, run=run, every=1)
    job.run(1)
    twin = duplicate(job.model)
    own = torch.optim.SGD(twin.parameters(), lr=0.1)
    tokens = torch.randint(0, 256, (BATCH, TOKENS))
    for _ in range(3):  # beside the original's passes, as a target network or a teacher is trained
        byte_loss(twin(tokens), tokens).backward()
        own.step()
    job.run(2)
    monitor.detach()
    assert [frame.step for frame in open_run(run).frames(arrays=False)] == [0, 1, 2]
    assert not monitor.stats().faults
    assert_same_training(job, truth.run(3))


def test_a_shallow_copy_shares_the_parts_and_their_hooks_but_not_its_own(run: Path) -> None:
    job, truth = (Job(lambda: tiny_gpt(dropout=0)) for _ in range(2))
    monitor = observe(job, run=run, every=1)
    twin = copy.copy(job.model)
    assert job.model._forward_hooks
    assert not twin._forward_hooks
    assert twin.blocks is job.model.blocks
    original, job.model = job.model, twin
    job.run(3)  # it trains the same parameters through the copy
    monitor.detach()
    assert_same_training(job, truth.run(3))
    assert original.blocks is twin.blocks


def test_an_average_of_the_model_is_kept_beside_it(run: Path) -> None:
    def averaged(*, observed: bool) -> list[torch.Tensor]:
        job = Job()
        if observed:
            observe(job, run=run, every=1, steer=True)
        average = AveragedModel(job.model)
        for _ in range(3):
            job.step()
            average.update_parameters(job.model)
        if job.monitor is not None:
            job.monitor.detach()
            assert not job.monitor.stats().faults
        return list(average.parameters())

    for one, other in zip(averaged(observed=True), averaged(observed=False), strict=True):
        assert torch.equal(one, other)


def test_an_optimizer_is_saved_and_copied_as_without_us(run: Path) -> None:
    job = Job().run(1)
    before = entries(saved(job.optimizer))
    monitor = observe(job, run=run, every=1)
    twin = copy.deepcopy(job.optimizer)
    assert not twin._optimizer_step_pre_hooks
    assert not twin._optimizer_step_post_hooks
    assert entries(saved(job.optimizer)) == before
    monitor.detach()


def test_what_is_saved_is_loaded_where_nobody_knows_us(run: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    file = tmp_path / "model.pt"
    with attached(model, run, steer=True):
        train(model)
        torch.save(model, file)
    script = (
        "import sys, torch\n"
        "sys.modules['entropy_hooks'] = sys.modules['entropy_monitor'] = None\n"
        f"print(torch.load({str(file)!r}, weights_only=False)(torch.ones(8)).sum().item())\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(ended.stdout) == pytest.approx(model(torch.ones(8)).sum().item(), rel=1e-6)


def test_torch_and_copyreg_are_as_they_were_after_the_last_detach(tmp_path: Path) -> None:
    before, create = dict(copyreg.dispatch_table), _recursive.create_script_module
    models = [Hooked(), Hooked()]
    monitors = [attached(model, tmp_path / str(number)) for number, model in enumerate(models)]
    assert {Hooked, RemovableHandle} <= set(copyreg.dispatch_table)
    monitors[0].detach()
    assert not by_pickle(models[1]).blocks[0]._forward_hooks, "still observed, still without ours"
    monitors[1].detach()
    assert copyreg.dispatch_table == before
    assert _recursive.create_script_module is create


def test_a_reducer_of_the_user_s_stays_in_force(run: Path) -> None:
    copyreg.pickle(Hooked, lambda model: (Stateful, ()))  # type: ignore[arg-type,return-value]
    try:
        model = Hooked()
        with attached(model, run):
            assert type(by_pickle(model)) is Stateful
        assert type(by_pickle(model)) is Stateful
    finally:
        del copyreg.dispatch_table[Hooked]


# ---- torch.jit -------------------------------------------------------------------------------------------------------


def scripted(model: nn.Module, example: torch.Tensor) -> nn.Module:
    return torch.jit.script(model)  # type: ignore[no-any-return]


def traced(model: nn.Module, example: torch.Tensor) -> nn.Module:
    return torch.jit.trace(model, example)  # type: ignore[no-any-return]


@pytest.mark.parametrize("convert", [scripted, traced])
def test_an_observed_model_is_converted_by_torch_jit_as_without_us(
    run: Path, convert: Callable[[nn.Module, torch.Tensor], nn.Module]
) -> None:
    model = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    tokens = torch.randint(0, 256, (BATCH, TOKENS))
    code = convert(model, tokens).code
    with attached(model, run, steer=True) as monitor:
        found = convert(model, tokens)
        assert found.code == code
        assert torch.equal(found(tokens), model(tokens))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found(tokens).square().mean().backward()  # trained as a graph: shared parameters, none of our hooks
        optimizer.step()
    assert not monitor.stats().faults


def test_a_model_made_by_torch_jit_is_refused_before_anything_is_created(run: Path) -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    with pytest.raises(ConfigError, match="expected a model in Python; found RecursiveScriptModule, which takes no"):
        attached(model, run)
    assert not run.exists()


def test_a_scripted_part_is_left_out(run: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, run=run, every=1) as monitor:
        model(torch.randn(2, 16, 8)).square().mean().backward()
        optimizer.step()
    assert not monitor.stats().faults
    (frame,) = open_run(run).frames()
    assert frame.groups[0].layers == ("0", "2")
    with pytest.raises(ConfigError, match="expected"):
        attach(model, optimizer, run=run, layers=["1"])


# ---- torch.func ------------------------------------------------------------------------------------------------------


def test_passes_inside_torch_func_are_as_without_us_and_counted_where_there_is_no_other(run: Path) -> None:
    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        parameters = dict(model.named_parameters())
        tokens = torch.randint(0, 256, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))

        def loss(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
            return byte_loss(torch.func.functional_call(model, parameters, (row[None],)), row)

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)  # type: ignore[no-any-return]

    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 8), nn.Linear(8, 256))

    expected, job = gradients(Job(model).model), Job(model)
    monitor = observe(job, run=run, every=1, steer=True)
    for _ in range(3):
        found = gradients(job.model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    job.run(2)  # its own passes are observed all the same
    monitor.detach()
    assert [frame.step for frame in open_run(run).frames(arrays=False)] == [0, 1]
    assert monitor.stats().faults == {}
    with observe(job, run=run, every=1, start_step=2) as monitor:
        for _ in range(2):  # trained by hand
            job.optimizer.zero_grad()
            for name, gradient in gradients(job.model).items():
                job.model.get_parameter(name).grad = gradient.mean(0)
            job.optimizer.step()
    assert monitor.stats().faults == {"transformed": 2}
    assert [frame.step for frame in open_run(run).frames(arrays=False)] == [0, 1]
