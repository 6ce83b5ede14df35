"""What is wrong from the start is refused at the start, in one line, before anything is created."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from entropy_hooks import attach
from entropy_monitor.config import load_config
from entropy_monitor.errors import ConfigError

from .training import Job, tiny_gpt

if TYPE_CHECKING:
    from pathlib import Path


def check_refusal(error: pytest.ExceptionInfo[ConfigError], *parts: str) -> None:
    message = str(error.value)
    assert isinstance(error.value, ValueError)
    assert len(message.splitlines()) == 1
    for part in ("expected", "found", ":", *parts):
        assert part in message, message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"every": 0}, "every"),
        ({"every": -3}, "every"),
        ({"every": 2.5}, "every"),
        ({"every": True}, "every"),
        ({"every": "often"}, "every"),
        ({"every": None}, "every"),
        ({"patches": 0}, "patches"),
        ({"patches": 1}, "patches"),
        ({"keep": 0}, "keep"),
        ({"start_step": -1}, "start_step"),
        ({"total_steps": 0}, "total_steps"),
        ({"loss_scale": 0}, "loss_scale"),
        ({"loss_scale": float("nan")}, "loss_scale"),
        ({"token_dim": 2}, "token_dim"),
        ({"steer": 1}, "steer"),
        ({"steer": "yes"}, "steer"),
        ({"gradients": None}, "gradients"),
        ({"layers": 3}, "layers"),
        ({"layers": ["blocks.0", 3]}, "layers"),
        ({"layers": ["blocks.0", "nowhere"]}, "nowhere"),
        ({"layers": "nothing.*"}, "nothing.*"),
        ({"layers": []}, "layers"),
        ({"steer_layers": ["head"]}, "head"),
        ({"steer_layers": ["blocks.1", "nowhere"]}, "nowhere"),
        ({"stear": True}, "stear"),
        ({"frequency": 3}, "frequency"),
        ({"run": 7}, "run"),
        ({"exact_alignment_every": -10}, "exact_alignment_every"),
        ({"exact_alignment_every": 15}, "multiple of every, 10"),
        ({"exact_alignment_every": 10, "every": 4}, "multiple of every, 4"),
        ({"observe": "both"}, "observe training or probe"),
        ({"probe": 3}, "probe"),
        ({"probe": lambda model: model}, "exact_alignment_every or observe='probe'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    job = Job()
    before = list(job.model._forward_pre_hooks)
    with pytest.raises(ConfigError) as error:
        attach(job.model, job.optimizer, **{"run": tmp_path / "run", **options})
    check_refusal(error, named)
    assert not list(tmp_path.iterdir())
    assert list(job.model._forward_pre_hooks) == before


def test_a_model_without_submodules(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ConfigError) as error:
        attach(model, torch.optim.SGD(model.parameters()), run=tmp_path / "run")
    check_refusal(error, "Linear")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("swap", ["model", "optimizer"])
def test_something_else_than_a_model_or_an_optimizer(tmp_path: Path, swap: str) -> None:
    job = Job()
    model, optimizer = ("model", job.optimizer) if swap == "model" else (job.model, job.model)
    with pytest.raises(ConfigError) as error:
        attach(model, optimizer, run=tmp_path / "run")  # type: ignore[arg-type]
    check_refusal(error, swap)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "first"}, "RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "run directory"),
    ],
)
def test_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    job = Job()
    with pytest.raises(ConfigError) as error:
        attach(job.model, job.optimizer)
    check_refusal(error, named)
    assert not list(tmp_path.iterdir())


def test_environment_and_file_of_a_real_attach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keyword > environment > ./monitor.toml > default."""
    (tmp_path / "monitor.toml").write_text(
        'run = "from_file"\n[hooks]\nevery = 3\npatches = 5\nkeep = 7\nlayers = ["blocks.0", "blocks.1"]\n'
    )
    monkeypatch.setenv("ENTROPY_MONITOR_EVERY", "4")
    monkeypatch.setenv("ENTROPY_MONITOR_PATCHES", "6")
    monkeypatch.setenv("ENTROPY_MONITOR_STEER", "true")
    job = Job()
    with attach(job.model, job.optimizer, patches=8) as monitor:
        options = monitor.options
        assert (options.every, options.patches, options.keep, options.steer) == (4, 8, 7, True)
        assert options.layers == ("blocks.0", "blocks.1")
        assert options.gradients is True
        assert monitor.run_url == str(tmp_path / "from_file")
    monkeypatch.setenv("ENTROPY_MONITOR_RUN", "from_environment")
    with attach(job.model, job.optimizer) as monitor:
        assert monitor.run_url == str(tmp_path / "from_environment")
    with attach(job.model, job.optimizer, run="from_keyword") as monitor:
        assert monitor.run_url == str(tmp_path / "from_keyword")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("EVERY", "often"),
        ("EVERY", ""),
        ("STEER", "perhaps"),
        ("LOSS_SCALE", "x"),
        ("EVERY", "0"),
        ("LAYERS", "nowhere"),
    ],
)
def test_malformed_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(f"ENTROPY_MONITOR_{variable}", value)
    job = Job()
    with pytest.raises(ConfigError) as error:
        attach(job.model, job.optimizer, run=tmp_path / "run")
    check_refusal(error)
    assert not list(tmp_path.iterdir())


def test_environment_lists_and_switches() -> None:
    found = load_config(
        environment={
            "ENTROPY_MONITOR_LAYERS": "a.*, b",
            "ENTROPY_MONITOR_GRADIENTS": "No",
            "ENTROPY_MONITOR_LOSS_SCALE": "0.5",
            "ENTROPY_MONITOR_CONTROL": "off",
        }
    )
    assert (found.hooks.layers, found.hooks.gradients, found.hooks.loss_scale) == (("a.*", "b"), False, 0.5)
    assert found.watch.control == "off"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[hooks\nevery = 1", ["monitor.toml"]),
        ("[hooks]\nevery = 'x'", ["every", "file"]),
        ("[hooks]\nevry = 1", ["evry", "file"]),
        ("hooks = 3", ["[hooks]", "monitor.toml"]),
        ("gapt = [1]", ["[gapt]", "monitor.toml"]),
        ("[hoks]\nevery = 1", ["hoks", "monitor.toml"]),
        ("run = 3", ["run"]),
        ("[hooks]\nevery = 0", ["every"]),
    ],
)
def test_malformed_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "monitor.toml").write_text(text)
    job = Job()
    with pytest.raises(ConfigError) as error:
        attach(job.model, job.optimizer)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for part in ("expected", *parts):
        assert part in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["monitor.toml"]


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "monitor.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="expected a readable TOML file"):
        attach(tiny_gpt(), Job().optimizer)
    with pytest.raises(ConfigError, match="expected a readable TOML file"):
        load_config(path=tmp_path / "missing.toml")


def test_one_optimizer_twice(tmp_path: Path) -> None:
    job = Job()
    with pytest.raises(ConfigError) as error:
        attach(job.model, [job.optimizer, job.optimizer], run=tmp_path / "run")
    check_refusal(error, "twice")
    assert not list(tmp_path.iterdir())


def test_a_second_attach_that_asks_for_something_else_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = Job()
    with attach(job.model, job.optimizer, run=tmp_path / "run", every=5) as monitor:
        assert attach(job.model, job.optimizer, run=tmp_path / "run", every=5) is monitor
        assert not caplog.records
        assert attach(job.model, job.optimizer, run=tmp_path / "run", every=5, steer=True) is monitor
        assert attach(job.model, job.optimizer, run=tmp_path / "other", every=5) is monitor
    assert len(caplog.records) == 2
    assert all("nothing is changed" in record.getMessage() for record in caplog.records)
    assert not (tmp_path / "other").exists()
