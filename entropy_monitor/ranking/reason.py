"""What somebody else's code raised, fit for a message of one line."""

from __future__ import annotations

_LONGEST = 300


def reason(error: BaseException) -> str:
    r"""Give type and text of an error without its line breaks, cut where it gets long.

    Args:
        error: from torch, transformers or the user's code.

    Returns:
        One line.

    >>> reason(ValueError("first\n  second"))
    'ValueError: first second'
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
