import sys
import textwrap

import pytest
import torch
from torch import nn

from entropy_monitor.errors import ConfigError, EntropyMonitorError
from entropy_monitor.ranking import find_source

FACTORIES = """
    from pathlib import Path
    from torch import nn

    def plain(): return nn.Linear(2, 3)
    def with_default(width=3): return nn.Linear(2, width)
    def with_tokenizer(): return nn.Linear(2, 3), lambda text: [len(text)]
    def from_checkpoint(path):
        model = nn.Linear(2, 3)
        model.weight.data.fill_(float(Path(path).read_text()))
        return model
    def two(path, width): return nn.Linear(2, width)
    def raising(): raise KeyError("no\\nsuch\\nkey")
    def leaving(): raise SystemExit(5)
    def nothing(): pass
    def wrong_tokenizer(): return nn.Linear(2, 3), "words"
    constant = 3
"""


@pytest.fixture
def factories(tmp_path):
    path = tmp_path / "factories.py"
    path.write_text(textwrap.dedent(FACTORIES))
    return path


def load(name):
    return find_source(str(name)).load()


def test_a_factory_in_a_file(factories):
    loaded = load(f"{factories}:plain")
    assert isinstance(loaded.model, nn.Linear)
    assert loaded.tokenize is None


def test_a_factory_in_a_package(monkeypatch, factories):
    assert isinstance(load("torch.nn:Identity").model, nn.Identity)
    monkeypatch.chdir(factories.parent)
    assert isinstance(load("factories:plain").model, nn.Linear), "beside the user"


def test_a_factory_may_bring_its_tokenizer(factories):
    assert load(f"{factories}:with_tokenizer").tokenize("text") == [4]


def test_a_required_argument_is_given_the_checkpoint(factories, tmp_path):
    (tmp_path / "weight.txt").write_text("0.25")
    assert (load(f"{factories}:from_checkpoint@{tmp_path / 'weight.txt'}").model.weight == 0.25).all()


@pytest.mark.parametrize("factory", ["plain", "with_default"])
def test_without_a_required_argument_the_checkpoint_is_a_state_dict(factories, tmp_path, factory):
    saved = nn.Linear(2, 3)
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    assert torch.equal(load(f"{factories}:{factory}@{tmp_path / 'model.pt'}").model.weight, saved.weight)


def test_an_unpickled_object_is_no_state_dict(factories, tmp_path):
    torch.save(nn.Linear(2, 3), tmp_path / "model.pt")
    with pytest.raises(EntropyMonitorError, match=r"expected a state dict of Linear in .*model.pt") as raised:
        load(f"{factories}:plain@{tmp_path / 'model.pt'}")
    assert "\n" not in str(raised.value)


def test_a_state_dict_of_another_model_is_refused(factories, tmp_path):
    torch.save(nn.Linear(9, 9).state_dict(), tmp_path / "model.pt")
    with pytest.raises(EntropyMonitorError, match="expected a state dict of Linear") as raised:
        load(f"{factories}:plain@{tmp_path / 'model.pt'}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/nowhere", "expected a Hugging Face directory, .*there is no such directory"),
        ("{folder}", "found no config.json"),
        ("{folder}/none.py:plain", "found no .*none.py"),
        ("no_such_package.models:make", "ModuleNotFoundError"),
        ("{file}:absent", "expected a function absent in .*; found nothing"),
        ("{file}:constant", "expected a function constant in .*; found a int"),
        ("{file}:", "there is no such directory"),
        ("{file}:from_checkpoint", "has 1: name the checkpoint after @"),
        ("{file}:two@{file}", "has 2: give the others defaults"),
        ("{file}:plain@{folder}/none.pt", "expected a checkpoint after @ .*none.pt"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_loaded(factories, tmp_path, name, message):
    with pytest.raises(ConfigError, match=message) as raised:
        find_source(name.format(folder=tmp_path, file=factories))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("raising", "it raised KeyError: .*: correct it"),
        ("leaving", "it raised SystemExit: 5: correct it"),
        ("nothing", r"to return a torch module or \(module, tokenize\); found nothing"),
        ("wrong_tokenizer", "found a tuple"),
    ],
)
def test_a_factory_that_makes_no_model_is_one_line(factories, factory, message):
    with pytest.raises(EntropyMonitorError, match=message) as raised:
        load(f"{factories}:{factory}")
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_imported_is_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("def make(:\n")
    with pytest.raises(ConfigError, match=r"expected to import .*broken.py; it raised SyntaxError"):
        find_source(f"{tmp_path / 'broken.py'}:make")


def test_a_file_that_leaves_when_imported_is_one_line(tmp_path):
    (tmp_path / "script.py").write_text("raise SystemExit('usage: ...')")
    with pytest.raises(ConfigError, match=r"expected to import .*script.py; it raised SystemExit: usage: ...: correct"):
        find_source(f"{tmp_path / 'script.py'}:make")


def test_files_import_their_neighbours_and_not_each_others(tmp_path):
    path, modules = list(sys.path), set(sys.modules)
    for folder, width in (("one", 3), ("two", 5)):
        (tmp_path / folder / "package").mkdir(parents=True)
        (tmp_path / folder / "package" / "__init__.py").write_text(f"width = {width}")
        (tmp_path / folder / "neighbour.py").write_text("from package import width\n")
        source = "from neighbour import width\nfrom torch import nn\ndef make(): return nn.Linear(2, width)\n"
        (tmp_path / folder / "factory.py").write_text(source)
    for folder, width in (("one", 3), ("two", 5)):
        assert load(f"{tmp_path / folder / 'factory.py'}:make").model.out_features == width
    assert sys.path == path
    assert not {"neighbour", "package", "factory"} & (set(sys.modules) - modules)


def test_a_file_named_like_a_library_does_not_replace_it(tmp_path):
    import json

    (tmp_path / "json.py").write_text("from torch import nn\ndef make(): return nn.Linear(2, 3)\n")
    assert load(f"{tmp_path / 'json.py'}:make").model.out_features == 3
    assert sys.modules["json"] is json


def test_an_at_sign_in_a_folder_is_no_checkpoint(factories, tmp_path):
    folder = tmp_path / "a@b"
    folder.mkdir()
    (folder / "m.py").write_text(factories.read_text())
    (folder / "w:1@2").write_text("0.5")
    assert isinstance(load(f"{folder / 'm.py'}:plain").model, nn.Linear)
    assert (load(f"{folder / 'm.py'}:from_checkpoint@{folder / 'w:1@2'}").model.weight == 0.5).all()
