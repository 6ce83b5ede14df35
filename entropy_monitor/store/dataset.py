"""Tables of a run as xarray datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from entropy_monitor.catalog import METRICS, RUN_PREFIX
from entropy_monitor.store import layout
from entropy_monitor.store.metrics_reader import MetricsReader
from entropy_monitor.types import PHASES, REGIMES, STAGES

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from entropy_monitor.store.metrics import MetricsBlock
    from entropy_monitor.store.objects import Objects

Attempt = int | Literal["latest", "all"]
_RUN_SCALARS = ("ce", "wall_time_s", "num_patches", "num_tokens", "num_tokens_seen", "num_ranks")
"""Columns of every run; a run's table may have more."""
_CODES = {"phase": PHASES, "regime": REGIMES, "stage": STAGES}
_INDICES = ("attempt", "step")


def metrics_dataset(objects: Objects, attempt: Attempt) -> xr.Dataset:
    """The metrics table over (step, layer); see `Run.metrics`.

    Args:
        objects: the run.
        attempt: which attempts.

    Returns:
        The dataset.
    """
    import xarray as xr

    blocks = list(MetricsReader(objects).read_new())
    layers = _model_order(blocks)
    steps = _column(blocks, "step").astype(np.int64)
    attempts = _column(blocks, "attempt").astype(np.int64)
    keep = select_rows(steps, attempts, attempt)
    variables: dict[str, Any] = {}
    for metric in METRICS:
        samples = _column(blocks, f"num_{metric.samples}")[keep]
        attributes = {"unit": metric.unit, "long_name": metric.description, "source": metric.source}
        is_constant = len(np.unique(samples)) == 1 and np.isfinite(samples[0])
        attributes |= {"n": int(samples[0]) if is_constant else f"see num_{metric.samples}"}
        for name in (metric.name, f"{metric.name}_se"):
            variables[name] = (("step", "layer"), _layer_table(blocks, layers, name)[keep], attributes)
        mean = f"Mean over the layers that are determined; its standard error is an upper bound. {metric.description}"
        for name in (RUN_PREFIX + metric.name, f"{RUN_PREFIX}{metric.name}_se"):
            variables[name] = ("step", _column(blocks, name)[keep], {**attributes, "long_name": mean})
    recorded = (name for block in blocks for name in block.layout.scalars)
    for name in dict.fromkeys((*_RUN_SCALARS, *recorded)):
        if name not in _INDICES and name not in _CODES and name not in variables:
            variables[name] = ("step", _column(blocks, name)[keep])
    variables["attempt"] = ("step", attempts[keep])
    for name, meanings in _CODES.items():
        variables[name] = ("step", _decode(_column(blocks, name)[keep], meanings))
    return xr.Dataset(variables, coords={"step": steps[keep], "layer": np.array(layers, dtype=object)})


def scalars_dataset(rows: NDArray[np.float64], attempts: NDArray[np.int64], attempt: Attempt) -> xr.Dataset:
    """The per-step scalars over (step); see `Run.scalars`.

    Args:
        rows: shape ``(T, S)``, the columns of `layout.SCALAR_COLUMNS`.
        attempts: shape ``(T,)``.
        attempt: which attempts.

    Returns:
        The dataset.
    """
    import xarray as xr

    columns = dict(zip(layout.SCALAR_COLUMNS, rows.T, strict=True))
    steps = columns.pop("step").astype(np.int64)
    keep = select_rows(steps, attempts, attempt)
    variables: dict[str, Any] = {name: ("step", values[keep]) for name, values in columns.items() if name != "phase"}
    variables["attempt"] = ("step", attempts[keep])
    variables["phase"] = ("step", _decode(columns["phase"][keep], PHASES))
    return xr.Dataset(variables, coords={"step": steps[keep]})


def select_rows(steps: NDArray[np.int64], attempts: NDArray[np.int64], attempt: Attempt) -> NDArray[np.int64]:
    """Rows that a view of the attempts shows.

    Args:
        steps: shape ``(T,)``, in commit order.
        attempts: shape ``(T,)``.
        attempt: ``latest``: each step once, from the newest attempt that reached it; ``all``: every row; a number.

    Returns:
        Indices of the rows, by step unless ``all``. Of several rows of one step and attempt the last one counts.
    """
    rows = np.arange(len(steps))
    if attempt == "all":
        return rows
    if attempt != "latest":
        rows = rows[attempts == attempt]
    order = rows[np.lexsort((rows, attempts[rows], steps[rows]))]
    last_of_step = np.append(steps[order][1:] != steps[order][:-1], True)[: len(order)]
    return order[last_of_step]


def _model_order(blocks: list[MetricsBlock]) -> list[str]:
    """Layers of every segment by name, in the newest model's order; those it no longer has come last."""
    return list(dict.fromkeys(layer for block in reversed(blocks) for layer in block.layout.layers))


def _column(blocks: list[MetricsBlock], name: str) -> NDArray[np.float64]:
    return np.concatenate([block.column(name) for block in blocks]) if blocks else np.empty(0)


def _layer_table(blocks: list[MetricsBlock], layers: list[str], metric: str) -> NDArray[np.float32]:
    tables = [np.full((len(block.values), len(layers)), np.nan, np.float32) for block in blocks]
    for block, table in zip(blocks, tables, strict=True):
        if metric in block.layout.metrics:
            where = [layers.index(layer) for layer in block.layout.layers]
            table[:, where] = block.values[:, :, block.layout.metrics.index(metric)]
    return np.concatenate(tables) if tables else np.empty((0, len(layers)), np.float32)


def _decode(codes: NDArray[np.float64], names: tuple[str, ...]) -> NDArray[np.object_]:
    known = np.array([*names, ""], dtype=object)
    return known[np.nan_to_num(codes, nan=len(names)).astype(np.int64)]
