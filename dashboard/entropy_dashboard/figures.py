"""The four figures: newest value, its error, and the run as a sparkline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from entropy_dashboard.readers import ALIGNMENTS, ENTROPIES
from entropy_dashboard.tables import full_window, loss_buckets, phase_bands
from entropy_dashboard.text import number

if TYPE_CHECKING:
    from typing import Literal

    from numpy.typing import NDArray

    from entropy_dashboard.readers import RunReader

SPARK_BUCKETS = 160
LOSS_STEPS = 50
"""Optimizer steps behind the cross-entropy's figure."""
MAX_BARS = 24


def draw(reader: RunReader) -> None:
    """Draw the figures; the caller holds the reader's lock."""
    entropy, alignment = ENTROPIES[0], ALIGNMENTS[0]
    columns = st.columns(4, gap="small")
    with columns[0]:
        _draw_loss(reader)
    with columns[1]:
        _draw_layer_mean(
            reader, entropy, "Mean MBE", "Row-normalised matrix-based entropy in nats, mean over the layers."
        )
    with columns[2]:
        words = "Cosine of the gradients of CE and MBE in weight space, mean over the layers: +1 agree, -1 conflict."
        _draw_layer_mean(reader, alignment, "Alignment", words, sign=True)
    with columns[3]:
        _draw_steps_in_phase(reader)


def _draw_loss(reader: RunReader) -> None:
    per_step = len(reader.steps.order.steps) > 0
    if per_step:
        recent = reader.steps.values.shown(max(0, len(reader.steps.order.steps) - 2 * LOSS_STEPS))[:, 0]
    else:
        recent = reader.layers.scalar("ce")[-2 * LOSS_STEPS :]
    recent = recent[np.isfinite(recent)]
    last, before = recent[-LOSS_STEPS:], recent[:-LOSS_STEPS]
    mean = float(last.mean()) if len(last) else None
    change = float(last.mean() - before.mean()) if len(before) and len(last) else None
    error = float(last.std(ddof=1) / np.sqrt(len(last))) if len(last) > 1 else None
    which = "optimizer steps (rank 0)" if per_step else "measured steps"
    help_text = f"Mean of the last {len(last)} {which}: {number(mean, 4)} ± {number(error, 4)} nats (standard error)."
    _metric("CE loss", mean, error, change, help_text, _spark(reader), "inverse")


def _spark(reader: RunReader) -> list[float]:
    buckets = reader.table("spark/ce", lambda: loss_buckets(reader, full_window(reader), SPARK_BUCKETS))
    return _finite(buckets.mean[:, 0])


def _draw_layer_mean(reader: RunReader, metric: str, label: str, words: str, *, sign: bool = False) -> None:
    if len(reader.layers.order.steps) == 0:
        _metric(label, None, None, None, f"{words} Nothing is measured yet.", [], "off", sign=sign)
        return
    start = max(0, len(reader.layers.order.steps) - 2)
    values, errors = (reader.layers.metric(name).shown(start) for name in (metric, f"{metric}_se"))
    mean, error = _mean(values[-1]), _mean(errors[-1])
    before = _mean(values[0]) if len(values) > 1 else None
    change = None if mean is None or before is None else mean - before
    known = int(np.isfinite(values[-1]).sum())
    tokens, patches = (reader.layers.scalar(name)[-1] for name in ("num_tokens", "num_patches"))
    step = int(reader.layers.order.steps[-1])
    help_text = (
        f"{words} At step {step:,}: {number(mean, 4)} ± {number(error, 4)}, n = {number(tokens, 0)} tokens in "
        f"{number(patches, 0)} patches, {known} of {values.shape[1]} layers determined. The error is the layers' mean "
        "standard error: they share their tokens, so it does not shrink with their number."
    )

    def spark() -> list[float]:
        window = full_window(reader)
        means = reader.layers.metric(metric).query(window.start, window.stop, SPARK_BUCKETS).mean
        return _finite(np.array([_mean(row) or np.nan for row in means]))

    _metric(label, mean, error, change, help_text, reader.table(f"spark/{metric}", spark), "off", sign=sign)


def _draw_steps_in_phase(reader: RunReader) -> None:
    window = full_window(reader)
    first, last, codes = reader.table("phases", lambda: phase_bands(reader, window))
    if len(first) == 0:
        with st.container(key="figure_phase"):
            st.metric("Steps in phase", "—", border=True, help="No phase is known yet.")
        return
    lengths = (last - first)[-MAX_BARS:].tolist()
    name = ("memorize", "compress")[int(codes[-1])]
    many = "1 phase so far" if len(first) == 1 else f"{len(first)} phases so far"
    with st.container(key="figure_phase"):
        st.metric(
            "Steps in phase",
            f"{int(last[-1] - first[-1]):,}",
            many,
            delta_color="off",
            delta_arrow="off",
            border=True,
            help=f"Optimizer steps since the phase became {name}, at step {int(first[-1]):,}. A bar a phase.",
            chart_data=lengths if len(lengths) > 1 else None,
            chart_type="bar",
        )


def _metric(
    label: str,
    value: float | None,
    error: float | None,
    change: float | None,
    help_text: str,
    spark: list[float],
    color: Literal["inverse", "off"],
    *,
    sign: bool = False,
) -> None:
    with st.container(key=f"figure_{label.split()[-1].lower()}"):
        st.metric(
            label,
            number(value, sign=sign),
            None if change is None else f"{change:+.3f}",
            delta_color=color,
            delta_description=f"± {number(error)}",
            border=True,
            help=help_text,
            chart_data=spark if len(spark) > 1 else None,
        )


def _mean(values: NDArray[np.floating]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _finite(values: NDArray[np.floating]) -> list[float]:
    # A sparkline cannot show gaps; the charts below do.
    return values[np.isfinite(values)].astype(float).tolist()
