"""Saved models: a Hugging Face directory, or a Python factory with or without a checkpoint."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import nn

from entropy_monitor.errors import ConfigError, EntropyMonitorError
from entropy_monitor.ranking.reason import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from types import ModuleType

_FORMS = "a Hugging Face directory, package.module:factory or file.py:factory, each factory with @CHECKPOINT or without"
_FACTORY = re.compile(r"(?P<module>.+?):(?P<factory>[^:@/\\]+)(?:@(?P<checkpoint>.*))?")
"""A folder may hold an @ as well: the checkpoint's comes behind the factory."""


class LoadedModel(NamedTuple):
    """A model and its own tokenizer."""

    model: nn.Module
    tokenize: Callable[[str], Sequence[int]] | None
    """Text to ids; None: the model reads bytes."""


class ModelSource(Protocol):
    """Where a model comes from; made before any model is loaded, so that mistakes are found first."""

    @property
    def name(self) -> str:
        """As the user gave it."""
        ...

    def load(self) -> LoadedModel:
        """Load the model, on the CPU."""
        ...


def find_source(name: str) -> ModelSource:
    """Understand what the user named.

    Args:
        name: a directory with ``config.json``; or ``package.module:factory`` or ``path/to/file.py:factory``, which is
            called with the checkpoint after ``@`` if it requires an argument, and otherwise without, the checkpoint
            then being a state dict that is loaded into what it returns.

    Returns:
        The source.

    Raises:
        ConfigError: there is no such directory, file, factory or checkpoint.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(
                f"expected a Hugging Face model in {name}; found no config.json: give the folder that "
                "save_pretrained wrote, or a factory"
            )
        return HuggingFaceSource(name)
    parts = _FACTORY.fullmatch(name)
    if parts is None:
        raise ConfigError(f"expected {_FORMS}; found {name}: there is no such directory")
    module, factory, checkpoint = parts["module"], parts["factory"], parts["checkpoint"]
    if checkpoint and not Path(checkpoint).exists():
        raise ConfigError(f"expected a checkpoint after @ in {name}; found no {checkpoint}: correct the path")
    source = FactorySource(name, _function(module, factory), Path(checkpoint) if checkpoint else None)
    source.check_arguments()
    return source


@dataclass(frozen=True, slots=True)
class HuggingFaceSource:
    """A directory written by ``save_pretrained``, tokenizer included; nothing is downloaded."""

    name: str

    def load(self) -> LoadedModel:
        """Load model and tokenizer.

        Returns:
            The model without its head, which the residual blocks do not need.

        Raises:
            ConfigError: transformers is not installed.
            EntropyMonitorError: it cannot load the directory.
        """
        try:
            transformers: Any = importlib.import_module("transformers")
        except ImportError as error:
            raise ConfigError(f"a Hugging Face directory needs {error.name}: pip install transformers") from error
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.name, local_files_only=True)
            model = transformers.AutoModel.from_pretrained(self.name, local_files_only=True)
        except Exception as error:  # transformers raises whatever its parts raise
            raise EntropyMonitorError(
                f"expected model and tokenizer in {self.name}; {reason(error)}: save both with save_pretrained"
            ) from error

        def tokenize(text: str) -> Sequence[int]:
            # Not verbose: it would warn that the text is longer than the model's context.
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        return LoadedModel(model, tokenize)


@dataclass(frozen=True, slots=True)
class FactorySource:
    """A Python function that returns a module, or a module and its tokenizer."""

    name: str
    factory: Callable[..., Any]
    checkpoint: Path | None

    def check_arguments(self) -> None:
        """Refuse a factory that wants what the command line cannot give.

        Raises:
            ConfigError: it requires a checkpoint that is not named, or more than one argument.
        """
        required = len(_required_arguments(self.factory))
        if required > 1 or (required == 1 and self.checkpoint is None):
            remedy = "name the checkpoint after @" if required == 1 else "give the others defaults"
            raise ConfigError(f"expected a factory without required arguments; {self.name} has {required}: {remedy}")

    def load(self) -> LoadedModel:
        """Call the factory.

        Returns:
            What it made, with the checkpoint in it.

        Raises:
            EntropyMonitorError: it raises or returns something else, or the checkpoint does not fit.
        """
        takes_checkpoint = bool(_required_arguments(self.factory))
        try:
            made = self.factory(str(self.checkpoint)) if takes_checkpoint else self.factory()
        except (Exception, SystemExit) as error:  # user code may raise anything
            raise EntropyMonitorError(
                f"expected {self.name} to make a model; it raised {reason(error)}: correct it"
            ) from error
        pair: tuple[Any, Any] = made if isinstance(made, tuple) and len(made) == 2 else (made, None)  # pyright: ignore[reportUnknownVariableType]
        model, tokenize = pair
        if not isinstance(model, nn.Module) or not (tokenize is None or callable(tokenize)):
            raise EntropyMonitorError(
                f"expected {self.name} to return a torch module or (module, tokenize); found {_kind(made)}: correct it"
            )
        if self.checkpoint is not None and not takes_checkpoint:
            _load_state(model, self.checkpoint)
        return LoadedModel(model, cast("Callable[[str], Sequence[int]] | None", tokenize))


def _required_arguments(factory: Callable[..., Any]) -> list[str]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        name
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (*positional, inspect.Parameter.KEYWORD_ONLY)
    ]


def _function(module: str, name: str) -> Callable[..., Any]:
    try:
        found = getattr(_import_file(Path(module)) if module.endswith(".py") else _import_module(module), name, None)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything when imported
        raise ConfigError(f"expected to import {module}; it raised {reason(error)}: correct it") from error
    if not callable(found):
        raise ConfigError(f"expected a function {name} in {module}; found {_kind(found)}: correct the name")
    return found


def _import_module(name: str) -> ModuleType:
    # As `python -m` does: a module beside the user is found, however this program was started.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    # A name of its own: a file called json.py shall not become everybody's json.
    name = f"_rank_{abs(hash(path.resolve()))}"
    specification = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or specification is None or specification.loader is None:
        raise ConfigError(f"expected a Python file; found no {path}: correct the path before the colon")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    with _neighbours(path.resolve().parent):
        specification.loader.exec_module(module)
    return module


@contextmanager
def _neighbours(folder: Path) -> Generator[None]:
    """Let a file import what lies beside it, as scripts do.

    Its neighbours are forgotten afterwards: another folder's file may have neighbours of the same names.

    Yields:
        Nothing: the file is imported within.
    """
    before = set(sys.modules)
    beside = {
        entry.stem for entry in folder.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").is_file()
    } - before
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in beside:
                del sys.modules[name]


def _load_state(model: nn.Module, checkpoint: Path) -> None:
    try:
        # weights_only: a checkpoint is data, and shall run no code.
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises what pickle, zip and the model raise
        raise EntropyMonitorError(
            f"expected a state dict of {type(model).__name__} in {checkpoint}; {reason(error)}: save model.state_dict()"
        ) from error


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
