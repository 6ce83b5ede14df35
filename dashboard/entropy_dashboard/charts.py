"""Chart specifications: pure, one a theme, authored in Altair and compiled once.

A specification names its datasets; what they hold changes with every look, the specification never does (a changed one
would remount the chart, which flickers). Domains come from the data.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import altair as alt
import numpy as np

from entropy_dashboard.theme import PALETTES, Palette, Theme

CANVAS = {"embedOptions": {"renderer": "canvas"}}
"""SVG costs the browser one node a mark."""
_AXIS_WIDTH: dict[str, Any] = {"minExtent": 40, "maxExtent": 40}
"""Equal on all charts, so that their x axes line up."""


_UNSEEN = 0.001
"""Opacity of marks that only catch the pointer: at 0 they would not."""


def _data(name: str) -> alt.NamedData:
    return alt.NamedData(name=name)


def _step_axis(*, labels: bool = True, title: str | None = "step") -> alt.X:
    axis = alt.Axis(format="~s", grid=False, labelFlush=True)
    if not labels:
        axis, title = alt.Axis(labels=False, ticks=False, grid=False), None
    return alt.X("step:Q", title=title, scale=alt.Scale(nice=False, zero=False), axis=axis)


def _background(palette: Palette) -> Any:
    # The ends of the window are invisible: they give every chart of the page the same x axis.
    colors = alt.Scale(domain=["memorize", "compress"], range=[palette.memorize, palette.compress])
    bands = (
        alt.Chart(_data("bands"))
        .mark_rect(opacity=palette.band_opacity, clip=True)
        .encode(
            x="first:Q",
            x2="last:Q",
            color=alt.Color("phase:N", scale=colors, legend=None),
            tooltip=[
                alt.Tooltip("phase:N", title="phase"),
                alt.Tooltip("first:Q", title="from step", format=","),
                alt.Tooltip("last:Q", title="to step", format=","),
            ],
        )
    )
    ends = alt.Chart(_data("span")).mark_point(opacity=0, size=0, tooltip=None).encode(x="step:Q")
    return bands + ends


@lru_cache
def loss(theme: Theme) -> dict[str, Any]:
    """Cross-entropy with its min-max band over the phases, applied commands as dashed rules.

    Datasets: ``bands, span, ce, commands``.

    Returns:
        A Vega-Lite specification without data.
    """
    palette = PALETTES[theme]
    x = _step_axis(labels=False)
    y_axis = alt.Axis(tickCount=5, **_AXIS_WIDTH)
    spread = (
        alt.Chart(_data("ce"))
        .mark_area(opacity=0.28, color=palette.spread, clip=True, tooltip=None)
        .encode(x=x, y=alt.Y("low:Q", title="CE loss (nats)", scale=alt.Scale(zero=False), axis=y_axis), y2="high:Q")
    )
    line = (
        alt.Chart(_data("ce"))
        .mark_line(color=palette.line, strokeWidth=1.6, clip=True, tooltip=None)
        .encode(x=x, y="mean:Q")
    )
    hover = _hover(
        "ce",
        [
            alt.Tooltip("step:Q", format=",.0f"),
            alt.Tooltip("mean:Q", title="CE, mean", format=".4f"),
            alt.Tooltip("low:Q", title="smallest", format=".4f"),
            alt.Tooltip("high:Q", title="largest", format=".4f"),
            alt.Tooltip("rows:Q", title="steps in bucket", format=","),
        ],
    )
    commands = (
        alt.Chart(_data("commands"))
        .mark_rule(strokeDash=[4, 3], strokeWidth=1.6, color=palette.command, clip=True)
        .encode(
            x="step:Q",
            tooltip=[
                alt.Tooltip("phase:N", title="command"),
                alt.Tooltip("step:Q", title="applied at step", format=","),
                alt.Tooltip("by:N", title="by"),
                alt.Tooltip("reason:N", title="reason"),
            ],
        )
    )
    return _spec(_background(palette) + spread + line + hover + commands, height=190)


@lru_cache
def entropy(theme: Theme) -> dict[str, Any]:
    """Matrix-based entropy: 10-90 % of the layers, their median, and chosen layers with standard errors.

    Datasets: ``bands, span, entropy, layers, commands``.

    Returns:
        A Vega-Lite specification without data.
    """
    palette = PALETTES[theme]
    x = _step_axis()
    y = alt.Y("q10:Q", title="MBE (nats)", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5, **_AXIS_WIDTH))
    ribbon = (
        alt.Chart(_data("entropy"))
        .mark_area(opacity=0.26, color=palette.entropy, clip=True, tooltip=None)
        .encode(x=x, y=y, y2="q90:Q")
    )
    median = (
        alt.Chart(_data("entropy"))
        .mark_line(color=palette.entropy, strokeWidth=2.4, clip=True, tooltip=None)
        .encode(x=x, y="q50:Q")
    )
    hover = _hover(
        "entropy",
        [
            alt.Tooltip("step:Q", format=",.0f"),
            alt.Tooltip("q50:Q", title="median of layers", format=".4f"),
            alt.Tooltip("q10:Q", title="10 %", format=".4f"),
            alt.Tooltip("q90:Q", title="90 %", format=".4f"),
            alt.Tooltip("layers:Q", title="layers determined"),
        ],
    )
    legend = alt.Legend(
        title=None,
        orient="top",
        symbolType="stroke",
        symbolStrokeWidth=3,
        symbolOpacity=1,
        labelLimit=150,
        columns=8,
        padding=0,
    )
    color = alt.Color("layer:N", scale=alt.Scale(range=list(palette.layers)), sort=None, legend=legend)
    chosen = alt.Chart(_data("layers"))
    errors = chosen.mark_area(opacity=0.22, clip=True, tooltip=None).encode(x=x, y="low:Q", y2="high:Q", color=color)
    lines = chosen.mark_line(strokeWidth=1.3, clip=True, tooltip=None).encode(x=x, y="value:Q", color=color)
    points = chosen.mark_point(opacity=_UNSEEN, filled=True, size=40, clip=True).encode(
        x=x,
        y="value:Q",
        tooltip=[
            alt.Tooltip("layer:N", title="layer"),
            alt.Tooltip("step:Q", format=",.0f"),
            alt.Tooltip("value:Q", title="MBE, nats", format=".4f"),
            alt.Tooltip("error:N", title="standard error"),
        ],
    )
    commands = (
        alt.Chart(_data("commands"))
        .mark_rule(strokeDash=[4, 3], strokeWidth=1.6, color=palette.command, clip=True, tooltip=None)
        .encode(x="step:Q")
    )
    background = _background(palette)
    figure = alt.layer(background, ribbon, hover, alt.layer(errors, lines), median, commands, points)
    return _spec(figure.resolve_scale(color="independent"), height=290)


@lru_cache
def alignment(theme: Theme) -> dict[str, Any]:
    """Alignment of the gradients of cross-entropy and entropy, layer by step, fixed at [-1, 1].

    Datasets: ``span, image_below, image_above, tips, scale``; see `double_buffer` for why there are two images.

    Returns:
        A Vega-Lite specification without data.
    """
    palette = PALETTES[theme]
    x_axis = alt.Axis(format="~s", grid=False, labelFlush=True)
    x = alt.X("first:Q", title="step", scale=alt.Scale(nice=False, zero=False), axis=x_axis)
    y_axis = alt.Axis(grid=False, tickMinStep=1, format="d", **_AXIS_WIDTH)
    y = alt.Y("bottom:Q", title="layer", scale=alt.Scale(nice=False, zero=False), axis=y_axis)
    place: dict[str, Any] = {"x": x, "x2": "last:Q", "y": y, "y2": "top:Q"}
    below, above = (
        alt.Chart(_data(name)).mark_image(aspect=False, clip=True).encode(url="url:N", **place)
        for name in ("image_below", "image_above")
    )
    tips = (
        alt.Chart(_data("tips"))
        .mark_rect(opacity=_UNSEEN, clip=True)
        .encode(
            tooltip=[
                alt.Tooltip("layer:N", title="layer"),
                alt.Tooltip("steps:N", title="steps"),
                alt.Tooltip("value:N", title="cosine"),
            ],
            **place,
        )
    )
    ends = alt.Chart(_data("span")).mark_point(opacity=0, size=0).encode(x="step:Q")
    legend = alt.Legend(
        title="cosine", orient="top", direction="horizontal", gradientLength=220, gradientThickness=8, gradientOpacity=1
    )
    scale = alt.Scale(domain=np.linspace(-1, 1, len(palette.diverging)).tolist(), range=list(palette.diverging))
    colors = (
        alt.Chart(_data("scale"))
        .mark_point(opacity=0, size=0)
        .encode(color=alt.Color("v:Q", scale=scale, legend=legend))
    )
    return _spec(below + above + tips + ends + colors, height=330)


@lru_cache
def overview(theme: Theme) -> dict[str, Any]:
    """A strip of the whole run, with the selection ``window`` over its steps.

    Datasets: ``bands, span, ce``.

    Returns:
        A Vega-Lite specification without data.
    """
    palette = PALETTES[theme]
    mark = alt.BrushConfig(fill=palette.entropy, fillOpacity=0.2, stroke=palette.entropy)
    brush = alt.selection_interval(name="window", encodings=["x"], mark=mark)
    y_axis = alt.Axis(labels=False, ticks=False, grid=False, domain=False, **_AXIS_WIDTH)
    line = (
        alt.Chart(_data("ce"))
        .mark_line(color=palette.line, strokeWidth=1.2, tooltip=None)
        .encode(x=_step_axis(title=None), y=alt.Y("mean:Q", title=" ", scale=alt.Scale(zero=False), axis=y_axis))
        .add_params(brush)
    )
    return _spec(_background(palette) + line, height=84)


def _hover(name: str, tooltip: list[alt.Tooltip]) -> alt.Chart:
    # A bucket answers to the pointer over its whole width and height.
    area = alt.Chart(_data(name)).mark_rect(opacity=_UNSEEN, clip=True)
    return area.encode(x="first:Q", x2="last:Q", tooltip=tooltip)


def _spec(chart: Any, height: int) -> dict[str, Any]:
    return chart.properties(
        height=height, usermeta=CANVAS, padding={"left": 0, "top": 4, "right": 6, "bottom": 0}
    ).to_dict()
