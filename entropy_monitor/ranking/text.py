"""The text that models are ranked on, as token ids."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from entropy_monitor.errors import ConfigError, EntropyMonitorError
from entropy_monitor.ranking.reason import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from jaxtyping import Int
    from torch import Tensor

_BYTES_A_TOKEN = 32
"""Read ahead for each token wanted; tokenisers of prose need about 4, those of spaces in code up to 16."""


@dataclass(frozen=True, slots=True)
class TextSample:
    """The beginning of a text file."""

    path: Path
    content: bytes
    max_tokens: int

    def tokens(self, tokenize: Callable[[str], Sequence[int]] | None) -> Int[Tensor, " t"]:
        """Turn the text into ids.

        Args:
            tokenize: text to ids; None takes bytes.

        Returns:
            At most ``max_tokens`` ids, ``[t]`` int64.

        Raises:
            ConfigError: the tokenizer needs UTF-8 text and this is not.
            EntropyMonitorError: the tokenizer fails or gives something else than ids.
        """
        if tokenize is None:
            return torch.tensor(list(self.content[: self.max_tokens]), dtype=torch.int64)
        text = self._decoded()
        try:
            ids_T = torch.as_tensor(tokenize(text))
        except Exception as error:  # user code may raise anything
            raise EntropyMonitorError(
                f"expected token ids of {self.path}; the tokenizer raised {reason(error)}: correct it"
            ) from error
        if not ids_T.numel():
            raise EntropyMonitorError(
                f"expected token ids of {self.path}; the tokenizer gave none: correct it, or give another --text"
            )
        if ids_T.ndim != 1 or ids_T.is_floating_point() or ids_T.is_complex():
            raise EntropyMonitorError(
                f"expected the tokenizer to give a list of integers; found shape {tuple(ids_T.shape)} of "
                f"{ids_T.dtype}: return one id per token"
            )
        return ids_T[: self.max_tokens].long()

    def _decoded(self) -> str:
        try:
            # Not final: a character that the end of the sample cuts in two is left out.
            return codecs.getincrementaldecoder("utf-8")().decode(self.content)
        except UnicodeDecodeError as error:
            raise ConfigError(f"expected UTF-8 text in {self.path}; {error}: convert it, or name another") from error


def read_text(path: Path, max_tokens: int) -> TextSample:
    """Read as much of a text as is needed.

    Args:
        path: the file.
        max_tokens: tokens wanted.

    Returns:
        The sample.

    Raises:
        ConfigError: the file is missing, unreadable or empty.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_BYTES_A_TOKEN * max_tokens)
    except OSError as error:
        raise ConfigError(f"expected a readable text file; {error}: name another with --text") from error
    if not content:
        raise ConfigError(f"expected text in {path}; found an empty file: name another with --text")
    return TextSample(path, content, max_tokens)
