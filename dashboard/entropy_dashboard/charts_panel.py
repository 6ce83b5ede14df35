"""The two framed charts of the Live page and the choices above them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from entropy_dashboard import charts, session, tables
from entropy_dashboard.double_buffer import advance
from entropy_dashboard.readers import ALIGNMENTS, ENTROPIES
from entropy_dashboard.text import escape, short_names
from entropy_dashboard.theme import PALETTES
from entropy_dashboard.window import BRUSH, choose_span, chosen_window, draw_brush, view_of

if TYPE_CHECKING:
    from collections.abc import Mapping

from entropy_dashboard.readers import RunReader, Snapshot

MAX_LAYERS = 8
ENTROPY_NAMES: dict[str, str] = dict(zip(ENTROPIES, ("normalised", "raw", "centred"), strict=True))
ALIGNMENT_NAMES: dict[str, str] = dict(zip(ALIGNMENTS, ("weight space (paper)", "activations"), strict=True))


def draw_oscillation(reader: RunReader, snapshot: Snapshot) -> None:
    """Cross-entropy and entropy over the phases; the caller holds the reader's lock."""
    theme = session.theme()
    with st.container(border=True, key="oscillation"):
        st.markdown("**Phase oscillation** — CE loss and entropy &nbsp; :orange-badge[memorize] :blue-badge[compress]")
        with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
            span = choose_span()
            metric = _choose("Entropy", list(ENTROPIES), "entropy_kind", ENTROPY_NAMES)
            layers = _choose_layers(reader.path.name, reader.layers.layers)
        if span == BRUSH:
            draw_brush(reader)
        window = chosen_window(reader)
        key = (window, theme)
        commands = tables.commands_table(snapshot, window)
        shared = {
            "bands": reader.table(("bands", window), lambda: tables.bands_table(reader, window)),
            "span": tables.span_table(window),
            "commands": commands,
        }
        ce = reader.table(("ce", window), lambda: tables.loss_table(reader, window))
        _chart(
            charts.loss(theme),
            {**shared, "ce": ce},
            "chart_loss",
            "Cross-entropy loss by step, mean and min-max band, over bands of memorize and compress phases",
        )
        if not reader.layers.layers:
            st.caption("Entropy appears here with the first measured step.")
            return
        entropy = reader.table(("mbe", metric, *key), lambda: tables.entropy_table(reader, metric, window))
        chosen = reader.table(
            ("layers", metric, layers, *key), lambda: tables.layers_table(reader, metric, layers, window)
        )
        _chart(
            charts.entropy(theme),
            {**shared, "entropy": entropy, "layers": chosen},
            "chart_entropy",
            "Matrix-based entropy by step: 10 to 90 percent of the layers, their median, and chosen layers",
        )
        st.caption(
            "Ribbon: 10–90 % of the layers, line: their median. A chosen layer's band is ± the standard error of one "
            "measurement. Dashed: commands."
        )


def draw_alignment(reader: RunReader) -> None:
    """Alignment, layer by step; the caller holds the reader's lock."""
    if not reader.layers.layers:
        return
    theme = session.theme()
    with st.container(border=True, key="alignment"):
        st.markdown("**CE–MBE gradient alignment** — green: agree, purple: conflict, hatched: undetermined")
        metric = _choose("Alignment", list(ALIGNMENTS), "alignment_kind", ALIGNMENT_NAMES)
        window = chosen_window(reader)
        image, tips = reader.table(
            ("heat", metric, window, theme), lambda: tables.heat_tables(reader, metric, window, PALETTES[theme])
        )
        view = (reader.path, metric, theme, view_of(window))
        buffers = advance(st.session_state.get("heat_buffers"), view, image)
        st.session_state["heat_buffers"] = buffers
        images = {"image_below": buffers.below, "image_above": buffers.above}
        data = {**images, "tips": tips, "span": tables.span_table(window), "scale": _scale()}
        words = "Heat map of the cosine between the gradients of cross-entropy and entropy, layer by step"
        _chart(charts.alignment(theme), data, "chart_alignment", words)
        st.caption(
            f"`{metric}`, from -1 to +1. Layer 0 is {escape(reader.layers.layers[0], 60)}; the others by hovering."
        )


def _scale() -> bytes:
    return tables.arrow({"v": np.array([-1.0, 1.0])})


def _choose(label: str, options: list[str], key: str, names: Mapping[str, str] | None = None) -> str:
    shown = names or {}
    chosen = st.segmented_control(
        label,
        options,
        default=options[0],
        required=True,
        key=key,
        format_func=lambda option: str(shown.get(option, option)),
    )
    return chosen or options[0]


def _choose_layers(run_name: str, layers: tuple[str, ...]) -> tuple[str, ...]:
    if not layers:
        return ()
    # Judged once: the address follows the choice, and a default that followed the address would make a new widget.
    judged, first = st.session_state.get("first_layers", (None, ()))
    if judged != (run_name, layers):
        first = _first_layers(layers)
        st.session_state["first_layers"] = ((run_name, layers), first)
    short = short_names(layers)
    key = f"layers_of_{run_name}"  # another run's layers are another widget's
    chosen = st.multiselect(
        "Layers",
        layers,
        default=first,
        key=key,
        max_selections=MAX_LAYERS,
        placeholder="Choose up to 8",
        format_func=lambda layer: short[layer],
        on_change=_share_layers,
        args=(key,),
        width=215,
    )
    return tuple(chosen)


def _first_layers(layers: tuple[str, ...]) -> tuple[str, ...]:
    asked = tuple(layer for layer in st.query_params.get_all("layer") if layer in layers)
    count = len(layers)
    spread = dict.fromkeys(layers[position] for position in (count // 6, count // 2, 5 * count // 6))
    return asked[:MAX_LAYERS] or tuple(spread)


def _share_layers(key: str) -> None:
    st.query_params["layer"] = st.session_state[key]


def _chart(spec: dict[str, Any], data: Mapping[str, bytes], key: str, words: str) -> None:
    with st.container(key=key):
        st.vega_lite_chart(spec={**spec, "datasets": dict(data)}, alt=words, key=f"{key}_vega")
