"""The pages, in the order of the navigation; a new page is a file here and a line in `PAGES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from entropy_dashboard.pages import live

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class PageEntry:
    """One page in the navigation."""

    draw: Callable[[], None]
    title: str
    icon: str
    url_path: str
    default: bool = False


PAGES: tuple[PageEntry, ...] = (
    PageEntry(draw=live.draw, title="Live", icon=":material/sensors:", url_path="live", default=True),
)
