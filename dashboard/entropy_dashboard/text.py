"""Words: whatever comes from a run is text, never markup."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")


def escape(value: object, limit: int = 400) -> str:
    """Text from a run as Markdown that shows exactly this text.

    Every ASCII punctuation mark gets a backslash, so that there is no HTML, no link, no image, no icon and no formula;
    control and direction marks become a visible sign.

    Args:
        value: the text.
        limit: characters kept.

    Returns:
        Markdown.
    """
    plain = "".join("�" if unicodedata.category(c) in {"Cc", "Cf", "Cs"} else c for c in " ".join(str(value).split()))
    shortened = plain if len(plain) <= limit else f"{plain[: limit - 1]}…"
    return _PUNCTUATION.sub(r"\\\1", shortened)


def age(seconds: float) -> str:
    """A duration as people say it: ``4 s``, ``12 min``, ``3 h``, ``2 d``.

    Returns:
        The words.
    """
    for limit, unit, size in ((100, "s", 1), (6000, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """A figure, or a dash where it is undetermined.

    Returns:
        The words.
    """
    if value is None or value != value:
        return "—"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def short_names(layers: Sequence[str]) -> dict[str, str]:
    """Layer names without what they all share: ``h.11`` for ``transformer.h.11``.

    Args:
        layers: module names.

    Returns:
        Name to short name; short names are unique, and never a bare number.
    """
    parts = {layer: layer.split(".") for layer in layers}
    for kept in range(1, max([1, *map(len, parts.values())]) + 1):
        short = {layer: ".".join(names[-kept:]) for layer, names in parts.items()}
        if len(set(short.values())) == len(short) and not any(name.isdigit() for name in short.values()):
            return short
    return {layer: layer for layer in layers}
