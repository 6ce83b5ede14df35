"""Two images one above the other, so that a changed one never flashes.

A browser decodes an image a few frames after its mark has been drawn without it. So each look replaces one image only,
the older, and the other still shows while the new one is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable


@dataclass(frozen=True, slots=True)
class Buffers:
    """What a viewer's chart shows."""

    view: Hashable
    """What the images are of; another view replaces both."""
    below: bytes
    above: bytes
    above_is_older: bool = True


def advance(buffers: Buffers | None, view: Hashable, newest: bytes) -> Buffers:
    """Show the newest image, replacing the older one of the two.

    Args:
        buffers: what was shown before, None at first.
        view: what the newest image is of.
        newest: the image.

    Returns:
        What to show now; both images are the newest after two looks without a change.
    """
    if buffers is None or buffers.view != view:
        return Buffers(view, newest, newest)
    older, younger = (buffers.above, buffers.below) if buffers.above_is_older else (buffers.below, buffers.above)
    if older == newest:
        # The older image may be the newest one only when nothing has changed, or has changed back.
        return buffers if younger == newest else Buffers(view, newest, newest)
    if buffers.above_is_older:
        return Buffers(view, buffers.below, newest, above_is_older=False)
    return Buffers(view, newest, buffers.above)
