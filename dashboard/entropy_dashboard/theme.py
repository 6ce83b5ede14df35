"""Colours of the page and of the charts, light and dark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Theme = Literal["light", "dark"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """Colours of the charts in one theme."""

    memorize: str
    compress: str
    band_opacity: float
    line: str
    """Cross-entropy."""
    spread: str
    """What lies between smallest and largest cross-entropy."""
    entropy: str
    command: str
    layers: tuple[str, ...]
    """Chosen layers; none looks like a phase."""
    diverging: tuple[str, ...]
    """From -1 over 0 to +1."""
    undetermined: str
    hatch: str


PALETTES: dict[Theme, Palette] = {
    "light": Palette(
        memorize="#D9772B",
        compress="#1F78B4",
        band_opacity=0.13,
        line="#26323D",
        spread="#5B6573",
        entropy="#0F8B8D",
        command="#7B61C9",
        layers=("#8E3B8A", "#6B7F1A", "#A8324E", "#4C566A", "#7A5230", "#B5179E", "#2F6B3C", "#5F0F40"),
        diverging=("#762a83", "#9970ab", "#c2a5cf", "#e7d4e8", "#f7f7f7", "#d9f0d3", "#a6dba0", "#5aae61", "#1b7837"),
        undetermined="#e3e6ea",
        hatch="#b4bbc4",
    ),
    "dark": Palette(
        memorize="#F0954C",
        compress="#4BA3DB",
        band_opacity=0.14,
        line="#E8EDF2",
        spread="#9AA7B4",
        entropy="#2BB3B1",
        command="#A993F0",
        layers=("#D68BD2", "#B9CC5C", "#F07F9A", "#AEB9C9", "#CFA27C", "#F45BDC", "#7CC48C", "#C77DA6"),
        diverging=("#c38bd0", "#8e5a9c", "#5b3767", "#33243d", "#1a2027", "#1d3626", "#2a6239", "#47995a", "#86d091"),
        undetermined="#2a313a",
        hatch="#4d5865",
    ),
}

STREAMLIT_THEME: dict[str, str | bool] = {
    "theme.showWidgetBorder": True,
    "theme.baseRadius": "0.55rem",
    "theme.light.primaryColor": "#0F6E84",
    "theme.light.backgroundColor": "#FFFFFF",
    "theme.light.secondaryBackgroundColor": "#F4F6F8",
    "theme.light.textColor": "#17202A",
    "theme.light.borderColor": "#E0E4EA",
    "theme.light.sidebar.backgroundColor": "#F4F6F8",
    "theme.light.sidebar.secondaryBackgroundColor": "#FFFFFF",
    "theme.dark.primaryColor": "#4FB3C9",
    "theme.dark.backgroundColor": "#0E131A",
    "theme.dark.secondaryBackgroundColor": "#18212B",
    "theme.dark.textColor": "#E8EDF2",
    "theme.dark.borderColor": "#2A343F",
    "theme.dark.sidebar.backgroundColor": "#121920",
    "theme.dark.sidebar.secondaryBackgroundColor": "#18212B",
}
"""Streamlit's options, so that the page around the charts matches them."""
