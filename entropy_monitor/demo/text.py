"""Text for the demo: the sources of the running interpreter's standard library, or files that the user names."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from entropy_monitor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_BYTES = 4_000_000


def check_files(files: Sequence[Path]) -> None:
    """Refuse text files that cannot be used, before anything is started.

    Args:
        files: the files.

    Raises:
        ConfigError: a file is missing, unreadable or empty.
    """
    for path in files:
        if not _read(path):
            raise ConfigError(f"expected text in {path}; found an empty file: name another with --text")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"expected a readable text file; {error}: name another with --text") from error


def load_bytes(files: Sequence[Path] = (), *, context: int) -> torch.Tensor:
    """Read the text as bytes.

    Args:
        files: text files; the standard library's modules when empty.
        context: tokens in a training sequence; the text must be longer.

    Returns:
        A tensor ``[num_bytes]``, uint8.

    Raises:
        ConfigError: a file cannot be read, or there is too little text.
    """
    check_files(files)
    chosen = list(files) or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"\n".join(_read(path) for path in chosen)[:_MAX_BYTES]
    if len(text) < 2 * (context + 1):
        raise ConfigError(
            f"expected at least {2 * (context + 1)} bytes of text; found {len(text)}: name more with --text"
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def draw_batch(
    text: torch.Tensor, batch: int, context: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random sequences.

    Args:
        text: ``[num_bytes]``.
        batch: how many sequences.
        context: tokens in each.
        generator: their randomness.

    Returns:
        Inputs and targets, ``[batch, context]`` each, int64.
    """
    starts = torch.randint(0, len(text) - context, (batch,), generator=generator)
    windows = torch.stack([text[start : start + context + 1] for start in starts.tolist()]).long()
    return windows[:, :-1], windows[:, 1:]
