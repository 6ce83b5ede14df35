"""`rank` as users run it: trained against untrained, equal checkpoints, Hugging Face, one line for what is wrong."""

from __future__ import annotations

import json
import math
import sysconfig
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from entropy_monitor.cli import run_command
from entropy_monitor.demo.model import ByteGPT, GPTOptions
from entropy_monitor.demo.text import draw_batch, load_bytes

from .processes import entropy_monitor, one_line

SIZE = GPTOptions(num_layers=2, width=64, num_heads=2, context=64)

FACTORIES = """
    import torch
    from torch import nn
    from entropy_monitor.demo.model import ByteGPT, GPTOptions

    def make():
        torch.manual_seed(0)
        return ByteGPT(GPTOptions(num_layers=2, width=64, num_heads=2, context=64))

    def few_ids():
        return ByteGPT(GPTOptions(vocabulary=50, num_layers=2, width=64, num_heads=2, context=64))

    def not_a_number():
        model = make()
        model.blocks[1].mlp[2].weight.data.fill_(float("nan"))
        return model

    def no_blocks(): return nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 8))
    def silent():
        model = make()
        for block in model.blocks:
            block.register_forward_hook(lambda module, arguments, output: 0 * output)
        return model

    def loud():
        print("loading weights")
        model = make()
        model.register_forward_pre_hook(lambda module, arguments: print("forward"))
        return model

    def no_ids(): return make(), lambda text: []
    def bad_tokenizer(): return make(), lambda text: "".join(["x", 3])
    def leaving(): raise SystemExit(5)
    def raising(): raise RuntimeError("no such thing")
    def nothing(): pass
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factories, a text, and the demo's model after some training, saved twice."""
    directory = tmp_path_factory.mktemp("rank")
    (directory / "factories.py").write_text(textwrap.dedent(FACTORIES))
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = load_bytes(sources, context=SIZE.context)
    (directory / "text").write_bytes(bytes(data[-40_000:].tolist()))
    (directory / "short").write_bytes(b"too short")
    torch.manual_seed(0)
    model, generator = ByteGPT(SIZE), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(250):
        inputs, targets = draw_batch(data[:-40_000], 16, SIZE.context, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    for name in ("trained.pt", "again.pt"):
        torch.save(model.state_dict(), directory / name)
    return directory


def ranked(directory: Path, *models: str, options: tuple[object, ...] = ()) -> dict[str, Any]:
    given = ["rank", *models, "--text", directory / "text", "--block", "64", "--max-tokens", "16384"]
    found = entropy_monitor(*given, "--json", *options)
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    return json.loads(found.stdout)


def test_training_tells_more_of_what_follows_and_equal_checkpoints_tie(directory: Path) -> None:
    make = f"{directory / 'factories.py'}:make"
    trained, again = (f"{make}@{directory / name}" for name in ("trained.pt", "again.pt"))
    found = ranked(directory, make, trained, again)
    models = {model["name"]: model for model in found["models"]}
    assert list(models)[2] == make, "the untrained model comes last"
    assert [(model["rank"], model["tied"]) for model in found["models"]] == [(1, True), (1, True), (3, False)]
    for figure in ("output_information", "optimality", "distance", "soft_entropy"):
        assert models[trained][figure] == models[again][figure]
    gained = models[trained]["output_information"][0], models[make]["output_information"][0]
    noise = math.hypot(gained[0]["std_error"], gained[1]["std_error"])
    assert gained[0]["value"] - gained[1]["value"] > 4 * noise
    assert [layer["layer"] for layer in models[make]["layers"]] == ["blocks.0", "blocks.1"]
    assert models[make]["num_tokens"] == 16384
    assert found["same_tokens"] is True


def test_the_table_shows_ranks_figures_and_units(directory: Path) -> None:
    make = f"{directory / 'factories.py'}:make"
    found = entropy_monitor(
        "rank",
        make,
        make,
        "--text",
        directory / "text",
        "--block",
        "64",
        "--max-tokens",
        "4096",
        "--layers",
        "blocks.0",
    )
    assert found.returncode == 0, found.stderr
    rows = [line for line in found.stdout.splitlines() if "1 tied" in line]
    assert len(rows) == 2
    assert all("±" in row and "4096" in row and make in row for row in rows)
    assert "nats" in found.stdout
    # Soft entropy, optimality and distance have errors; of the information the note says where they are.
    assert all(row.count("±") == 3 for row in rows)
    assert "± is one standard error; those of I are in --json" in found.stdout


def test_what_models_print_is_not_in_the_result(directory: Path) -> None:
    given = ["rank", f"{directory / 'factories.py'}:loud", "--text", directory / "text", "--json"]
    found = entropy_monitor(*given, "--block", "64", "--max-tokens", "4096", "--layers", "blocks.0")
    assert found.returncode == 0, found.stderr
    (model,) = json.loads(found.stdout)["models"]
    assert model["num_tokens"] == 4096
    assert found.stderr.splitlines() == ["loading weights"] + ["forward"] * 8


def test_a_model_without_directions_is_undetermined_beside_one_with(directory: Path) -> None:
    make, silent = (f"{directory / 'factories.py'}:{name}" for name in ("make", "silent"))
    given = ["rank", silent, make, "--text", directory / "text", "--block", "64", "--max-tokens", "4096"]
    shown = entropy_monitor(*given)
    assert shown.returncode == 0, shown.stderr
    (line,) = [line for line in shown.stdout.splitlines() if silent in line]
    assert line.split() == ["-", silent, *["undetermined"] * 5, "4096"]
    assert "nan" not in shown.stdout
    found = json.loads(entropy_monitor(*given, "--json").stdout)
    ranks = {model["name"]: model["rank"] for model in found["models"]}
    assert ranks == {make: 1, silent: None}
    undetermined = {"value": None, "std_error": None}
    assert found["models"][1]["soft_entropy"] == found["models"][1]["optimality"] == undetermined


def test_a_hugging_face_directory_is_ranked_beside_a_factory(directory: Path, tmp_path: Path) -> None:
    from tests.ranking.hugging_face import save_tiny_gpt2

    save_tiny_gpt2(tmp_path / "gpt2", (directory / "text").read_text(encoding="utf-8", errors="ignore"))
    make = f"{directory / 'factories.py'}:make"
    found = ranked(directory, str(tmp_path / "gpt2"), make)
    assert found["same_tokens"] is False
    assert {model["name"] for model in found["models"]} == {str(tmp_path / "gpt2"), make}


BAD: dict[str, tuple[list[str], int, str]] = {
    "no directory": (["{d}/nowhere"], 2, "there is no such directory"),
    "no config.json": (["{d}"], 2, "found no config.json"),
    "no factory": (["{d}/factories.py:absent"], 2, "expected a function absent"),
    "the second is wrong": (["{d}/factories.py:make", "{d}/nowhere"], 2, "nowhere"),
    "factory raises": (["{d}/factories.py:raising"], 1, "it raised RuntimeError: no such thing"),
    "factory returns nothing": (["{d}/factories.py:nothing"], 1, "found nothing"),
    "text too short": (["{d}/factories.py:make", "--text", "{d}/short"], 2, "found 9"),
    "no text": (["{d}/factories.py:make", "--text", "{d}/absent"], 2, "expected a readable text file"),
    "no blocks": (["{d}/factories.py:no_blocks"], 2, "name the modules to observe with --layers"),
    "not finite": (["{d}/factories.py:not_a_number"], 1, "blocks.1 puts out NaN"),
    "ids beyond the vocabulary": (["{d}/factories.py:few_ids"], 2, "expected ids from 0 to 49"),
    "block beyond the context": (["{d}/factories.py:make", "--block", "128"], 1, "--block within its context"),
    "wrong layers": (["{d}/factories.py:make", "--layers", "heads.*"], 2, "expected layers among"),
    "no such device": (["{d}/factories.py:make", "--device", "abacus"], 2, "found abacus"),
    "device without numbers": (["{d}/factories.py:make", "--device", "meta"], 2, "found meta"),
    "tokenizer gives nothing": (["{d}/factories.py:no_ids"], 1, "the tokenizer gave none"),
    "tokenizer raises": (["{d}/factories.py:bad_tokenizer"], 1, "the tokenizer raised TypeError"),
    "factory leaves": (["{d}/factories.py:leaving"], 1, "it raised SystemExit: 5"),
    "wrong option": (["{d}/factories.py:make", "--batch", "0"], 2, "--batch"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_bad_input_is_one_line(directory: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    given, code, part = BAD[case]
    arguments = [argument.format(d=directory) for argument in given]
    options = {"--text": str(directory / "text"), "--block": "64", "--max-tokens": "4096"}
    missing = [piece for option, value in options.items() if option not in arguments for piece in (option, value)]
    assert run_command(["rank", *arguments, *missing]) == code
    said = capsys.readouterr()
    assert part in one_line(said.err)
    assert said.out == ""


def test_usage_is_one_line_in_a_process_of_its_own(directory: Path) -> None:
    for given, part in ((["rank"], "models"), (["rank", "x"], "--text")):
        found = entropy_monitor(*given)
        assert found.returncode == 2
        assert part in one_line(found.stderr).lower()
