"""What the charts are fed: small Arrow tables of one window of a run.

The caller holds the reader's lock, or calls through `RunReader.table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from entropy_dashboard import heatmap
from entropy_dashboard.readers import STEP_COLUMNS
from entropy_dashboard.text import short_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from entropy_dashboard.pyramid import Buckets
    from entropy_dashboard.readers import RunReader, Snapshot
    from entropy_dashboard.theme import Palette

CE_BUCKETS = 512
ENTROPY_BUCKETS = 256
LAYER_BUCKETS = 256
HEAT_BUCKETS = 400
TIP_COLUMNS, TIP_ROWS = 40, 25
MAX_BANDS = 256


@dataclass(frozen=True, slots=True)
class Window:
    """Steps ``[start, stop)``; the same for every chart of the page."""

    start: int
    stop: int


def arrow(columns: Mapping[str, ArrayLike]) -> bytes:
    """Columns as an Arrow stream, which Streamlit hands through untouched.

    Returns:
        The stream.
    """
    table = pa.table({name: pa.array(np.asarray(values)) for name, values in columns.items()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def loss_buckets(reader: RunReader, window: Window, max_buckets: int = CE_BUCKETS) -> Buckets:
    """Cross-entropy (column 0) and phase code (column 1) of every optimizer step, or else of every measured one.

    Returns:
        The buckets.
    """
    if len(reader.steps.order.steps):
        return reader.steps.values.query(window.start, window.stop, max_buckets)
    return reader.layers.scalars.query(window.start, window.stop, max_buckets)


def full_window(reader: RunReader) -> Window:
    """Everything that is known of the run.

    Returns:
        The window.
    """
    known = [order.steps for order in (reader.steps.order, reader.layers.order) if len(order.steps)]
    return Window(int(min(s[0] for s in known)), int(max(s[-1] for s in known)) + 1) if known else Window(0, 1)


def drawn_window(window: Window) -> Window:
    """A window whose end moves in buckets, so that a new step does not make every chart be sent and drawn anew.

    Returns:
        The window, longer by less than a pixel or two.
    """
    shift = ((window.stop - window.start) // CE_BUCKETS).bit_length()
    return Window(window.start, -(-window.stop >> shift) << shift)


def span_table(window: Window) -> bytes:
    """The window's ends, invisible marks that give all charts the same x axis.

    Returns:
        Arrow, columns ``step``.
    """
    return arrow({"step": np.array([window.start, window.stop], np.float64)})


def loss_table(reader: RunReader, window: Window, max_buckets: int = CE_BUCKETS) -> bytes:
    """Cross-entropy in buckets.

    Returns:
        Arrow, columns ``step, first, last, mean, low, high, rows``.
    """
    ce = loss_buckets(reader, window, max_buckets)
    columns = {"mean": ce.mean[:, 0], "low": ce.low[:, 0], "high": ce.high[:, 0], "rows": ce.count[:, 0]}
    return arrow({"step": ce.step, **_extent(ce), **columns})


def _extent(buckets: Buckets) -> dict[str, NDArray[np.float64]]:
    # Each reaches to the next: the pointer falls into no gap between two measurements.
    first = (buckets.number << buckets.shift).astype(np.float64)
    end = (buckets.number[-1:] + 1 << buckets.shift).astype(np.float64)
    return {"first": first, "last": np.append(first[1:], end)}


def phase_bands(reader: RunReader, window: Window) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Spans of steps of one phase: at every change exactly, or by buckets when there are too many to draw.

    Returns:
        First step, step behind the last, and phase code of each span; spans of unknown phase are left out.
    """
    if len(reader.steps.order.steps):
        order, phases = reader.steps.order, reader.steps.values.shown()[:, STEP_COLUMNS.index("phase")]
    else:
        order, phases = reader.layers.order, reader.layers.scalar("phase")
    part = slice(*np.searchsorted(order.steps, [window.start, window.stop]))
    steps, codes = order.steps[part], _codes(phases[part])
    starts = np.flatnonzero(np.diff(codes, prepend=-2))
    if len(starts) > MAX_BANDS:
        buckets = loss_buckets(reader, window, MAX_BANDS)
        steps, codes = buckets.number << buckets.shift, _codes(np.rint(buckets.mean[:, 1]))
        starts = np.flatnonzero(np.diff(codes, prepend=-2))
    first = np.maximum(steps[starts], window.start)
    last = np.append(first[1:], window.stop)[: len(first)]
    known = codes[starts] >= 0
    return first[known], last[known], codes[starts][known]


def _codes(phases: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.nan_to_num(phases, nan=-1).astype(np.int64)


def bands_table(reader: RunReader, window: Window) -> bytes:
    """Phase bands behind the curves.

    Returns:
        Arrow, columns ``first, last, phase``.
    """
    first, last, codes = phase_bands(reader, window)
    names = np.array(["memorize", "compress"])[codes]
    return arrow(
        {
            "first": first.astype(np.float64),
            "last": last.astype(np.float64),
            "phase": pa.array(names.tolist(), pa.string()),
        }
    )


def commands_table(snapshot: Snapshot, window: Window) -> bytes:
    """Commands that were applied in the window, at the first step they govern.

    Returns:
        Arrow, columns ``step, phase, by, reason``.
    """
    applied = {ack.command_id: ack.step for ack in snapshot.acks if ack.status == "applied"}
    rows = [
        (float(applied[command.command_id]), command.phase, command.issued_by, command.reason)
        for command in snapshot.commands
        if window.start <= applied.get(command.command_id, -1) < window.stop
    ][-MAX_BANDS:]
    step, phase, by, reason = zip(*rows, strict=True) if rows else ((), (), (), ())
    texts = {"phase": phase, "by": by, "reason": reason}
    return arrow({"step": np.array(step, np.float64), **{name: _strings(values) for name, values in texts.items()}})


def _strings(values: Iterable[object]) -> pa.Array:
    return pa.array([str(value) for value in values], pa.string())


def quantiles(values_BL: NDArray[np.floating], levels: Sequence[float]) -> list[NDArray[np.float64]]:
    """Quantiles over the determined values of each row, linearly interpolated; NaN where there are none.

    Args:
        values_BL: the values.
        levels: which quantiles.

    Returns:
        One array ``(B,)`` a level.
    """
    if values_BL.shape[1] == 0:
        return [np.full(len(values_BL), np.nan) for _ in levels]
    ordered = np.sort(values_BL.astype(np.float64), axis=1)  # NaN last
    count = np.isfinite(ordered).sum(axis=1)
    rows, found = np.arange(len(ordered)), []
    for level in levels:
        position = level * np.maximum(count - 1, 0)
        lower = np.floor(position).astype(np.int64)
        upper = np.minimum(lower + 1, np.maximum(count - 1, 0))
        fraction = position - lower
        found.append(ordered[rows, lower] * (1 - fraction) + ordered[rows, upper] * fraction)
    return found


def entropy_table(reader: RunReader, metric: str, window: Window) -> bytes:
    """Spread of a metric over the layers.

    Returns:
        Arrow, columns ``step, first, last, q10, q50, q90, layers``.
    """
    buckets = reader.layers.metric(metric).query(window.start, window.stop, ENTROPY_BUCKETS)
    q10, q50, q90 = quantiles(buckets.mean, (0.1, 0.5, 0.9))
    layers = (buckets.count > 0).sum(axis=1)
    columns = {"q10": q10, "q50": q50, "q90": q90}
    return arrow(
        {
            "step": buckets.step,
            **_extent(buckets),
            **{k: v.astype(np.float32) for k, v in columns.items()},
            "layers": layers,
        }
    )


def layers_table(reader: RunReader, metric: str, layers: Sequence[str], window: Window) -> bytes:
    """Chosen layers, each with the standard error of one measurement.

    Returns:
        Arrow, columns ``layer, step, value, low, high, error``; `error` in words.
    """
    known = [layer for layer in layers if layer in reader.layers.layers]
    where = [reader.layers.layers.index(layer) for layer in known]
    means = reader.layers.metric(metric).query(window.start, window.stop, LAYER_BUCKETS)
    errors = reader.layers.metric(f"{metric}_se").query(window.start, window.stop, LAYER_BUCKETS)
    value, error = means.mean[:, where].T.ravel(), errors.mean[:, where].T.ravel()
    margin = np.nan_to_num(error)  # without a known error the band has no width, and the words say so
    words = ["unknown" if e != e else f"± {e:.4f}" for e in error.tolist()]
    columns = {"step": np.tile(means.step, len(where)), "value": value, "low": value - margin, "high": value + margin}
    short = short_names(reader.layers.layers)
    names = _strings(short[layer] for layer in known for _ in range(len(means)))
    return arrow({"layer": names, **columns, "error": _strings(words)})


def heat_tables(reader: RunReader, metric: str, window: Window, palette: Palette) -> tuple[bytes, bytes]:
    """Heat map of a metric in [-1, 1]: one image, and coarse cells that carry the figures.

    Returns:
        Arrow, columns ``url, first, last, bottom, top``; and columns ``first, last, bottom, top, layer, steps, value``.
    """
    series, error_series = reader.layers.metric(metric), reader.layers.metric(f"{metric}_se")
    # No finer than the distance of two measurements, or the gaps between them would look undetermined.
    min_shift = max(0, (reader.layers.order.wide_stride - 1).bit_length())
    buckets = series.query(window.start, window.stop, HEAT_BUCKETS, min_shift)
    layers, width = reader.layers.layers, 1 << buckets.shift
    if len(buckets) == 0 or not layers:
        nothing = np.empty(0)
        image = {"url": _strings([]), "first": nothing, "last": nothing, "bottom": nothing, "top": nothing}
        return arrow(image), arrow({**image, "layer": _strings([]), "steps": _strings([]), "value": _strings([])})
    begin, num_columns = int(buckets.number[0]), int(buckets.number[-1] - buckets.number[0]) + 1
    cells = np.full((num_columns, len(layers)), np.nan, np.float32)
    cells[buckets.number - begin] = buckets.mean
    ends = np.array([begin, begin + num_columns], np.float64) * width
    image = {
        "url": _strings([heatmap.draw_diverging(cells, palette)]),
        "first": ends[:1],
        "last": ends[1:],
        "bottom": np.array([-0.5]),
        "top": np.array([len(layers) - 0.5]),
    }
    errors = np.full_like(cells, np.nan)
    error_buckets = error_series.query(window.start, window.stop, HEAT_BUCKETS, min_shift)
    errors[error_buckets.number - begin] = error_buckets.mean
    return arrow(image), _tips(cells, errors, begin, width, layers)


def _tips(
    cells_BL: NDArray[np.float32], errors_BL: NDArray[np.float32], begin: int, width: int, layers: Sequence[str]
) -> bytes:
    # Rectangles of several cells with their mean in words.
    x_edges = _edges(len(cells_BL), TIP_COLUMNS)
    y_edges = _edges(len(layers), TIP_ROWS)
    rows: list[tuple[float, float, float, float, str, str, str]] = []
    for left, right in pairwise(x_edges):
        first, last = (begin + left) * width, (begin + right) * width
        steps = f"{first:,} – {last - 1:,}"
        for bottom, top in pairwise(y_edges):
            block = cells_BL[left:right, bottom:top]
            known = np.isfinite(block)
            if known.any():
                error = errors_BL[left:right, bottom:top][known]
                error = error[np.isfinite(error)]
                words = f"{block[known].mean():+.3f}" + (f" ± {error.mean():.3f}" if len(error) else " ± unknown")
            else:
                words = "undetermined"
            name = layers[bottom] if top - bottom == 1 else f"{layers[bottom]} … {layers[top - 1]}"
            rows.append((first, last, bottom - 0.5, top - 0.5, name, steps, words))
    first, last, bottom, top, names, steps, words = zip(*rows, strict=True)
    numbers = {"first": first, "last": last, "bottom": bottom, "top": top}
    texts = {"layer": names, "steps": steps, "value": words}
    return arrow({k: np.array(v, np.float64) for k, v in numbers.items()} | {k: _strings(v) for k, v in texts.items()})


def _edges(count: int, most: int) -> list[int]:
    size = -(-count // most)
    return [*range(0, count, size), count]
