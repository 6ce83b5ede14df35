"""Scalars and metrics tables against slow twins: lists of rows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.catalog import METRICS
from entropy_monitor.errors import CorruptMetricsError, StoreError
from entropy_monitor.store import (
    MetricsLayout,
    MetricsReader,
    MetricsRow,
    MetricsWriter,
    ScalarsReader,
    ScalarsWriter,
    create_run,
    layout,
    read_cursor,
    read_states,
    read_tail,
    scalars,
)
from entropy_monitor.store.arrays import Array
from entropy_monitor.store.dataset import select_rows

from ..synthetic_trainer import flip_byte

if TYPE_CHECKING:
    from pathlib import Path

    from entropy_monitor.store import Run

SCALARS = ("attempt", "step", "phase", "regime", "ce", "num_patches")


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables whose chunks and segments end soon."""
    monkeypatch.setattr(layout, "TABLE_SEGMENT_ROWS", 12)
    monkeypatch.setattr(layout, "TABLE_CHUNK_ROWS", 4)
    monkeypatch.setattr(scalars, "_CHUNK_ROWS", 4)


# ---- scalars ---------------------------------------------------------------------------------------------------------


@dataclass
class ScalarsTwin:
    """What should be on disk, and what is only in memory."""

    on_disk: list[tuple[int, int]] = field(default_factory=list)
    pending: list[tuple[int, int]] = field(default_factory=list)


@pytest.mark.usefixtures("small_segments")
@settings(max_examples=60, deadline=None, suppress_health_check=list(settings.default.suppress_health_check))
@given(actions=st.lists(st.sampled_from(["append"] * 6 + ["many", "flush", "reopen", "look"]), max_size=60))
def test_scalars_are_what_was_appended_and_flushed(
    tmp_path_factory: pytest.TempPathFactory, actions: list[str]
) -> None:
    run, twin = create_run(tmp_path_factory.mktemp("run")), ScalarsTwin()
    attempt, step = 1, 0
    writer, incremental, seen = ScalarsWriter(run.objects, 2, attempt), ScalarsReader(run.objects, 2), []

    def look(reader: ScalarsReader) -> list[tuple[int, int]]:
        return [(number, int(row[0])) for number, rows in reader.read_new() for row in rows]

    for action in actions:
        if action in {"append", "many"}:
            for _ in range(1 if action == "append" else 17):
                writer.append({"step": step, "loss": step / 2, "lr": 0.1})
                twin.pending.append((attempt, step))
                step += 1
        elif action == "flush":
            writer.flush()
            twin.on_disk, twin.pending = twin.on_disk + twin.pending, []
        elif action == "reopen":  # the process dies: what was not flushed is lost but for the chunks that were full
            kept = look(ScalarsReader(run.objects, 2))
            assert kept[: len(twin.on_disk)] == twin.on_disk
            assert kept == (twin.on_disk + twin.pending)[: len(kept)]
            twin.on_disk, twin.pending = kept, []
            attempt += 1
            writer = ScalarsWriter(run.objects, 2, attempt)
        else:
            seen += look(incremental)
            full = look(ScalarsReader(run.objects, 2))
            assert seen == full
            assert full[: len(twin.on_disk)] == twin.on_disk
    writer.flush()
    twin.on_disk += twin.pending
    seen += look(incremental)
    assert seen == look(ScalarsReader(run.objects, 2)) == twin.on_disk
    table = run.scalars(rank=2, attempt="all")
    assert list(zip(table["attempt"].values, table["step"].values, strict=True)) == twin.on_disk
    np.testing.assert_array_equal(table["loss"].values, table["step"].values / 2)
    assert np.isnan(table["grad_norm"].values).all()


def test_scalars_cross_chunk_and_segment_borders_at_their_real_sizes(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    writer, reader, seen = ScalarsWriter(run.objects, 0, 1), ScalarsReader(run.objects, 0), []
    count = layout.TABLE_SEGMENT_ROWS + 600
    for step in range(count):
        writer.append({"step": step, "loss": 1.0})
        if step % 300 == 0:
            writer.flush()
            seen += [row[0] for _, rows in reader.read_new() for row in rows]
    writer.flush()
    seen += [row[0] for _, rows in reader.read_new() for row in rows]
    assert seen == list(range(count))
    assert run.objects.children(layout.scalars_key(0)) == ["s000000", "s000001", "zarr.json"]
    assert run.scalars()["step"].values.tolist() == list(range(count))


def test_scalars_skip_a_segment_whose_writer_was_killed_while_it_was_made(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    for attempt in (1, 2, 3):
        writer = ScalarsWriter(run.objects, 0, attempt)
        writer.append({"step": 0, "loss": attempt})
        writer.flush()
    for file in (tmp_path / layout.scalars_key(0, 1) / "values").iterdir():
        file.unlink()
    table = run.scalars(attempt="all")
    assert table["loss"].values.tolist() == [1, 3]
    assert table["attempt"].values.tolist() == [1, 3]


def test_a_damaged_chunk_of_scalars_is_an_error_of_ours(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    writer = ScalarsWriter(run.objects, 0, 1)
    writer.append({"step": 0})
    writer.flush()
    flip_byte(tmp_path / layout.scalars_key(0, 0) / "values" / "c.0.0", 5)
    with pytest.raises(CorruptMetricsError, match="expected an intact chunk"):
        run.scalars()


# ---- metrics ---------------------------------------------------------------------------------------------------------


def table_layout(
    layers: tuple[str, ...] = ("a", "b"), metrics: tuple[str, ...] = ("mbe", "mbe_se"), num_ranks: int = 2
) -> MetricsLayout:
    return MetricsLayout(
        layers=layers, metrics=metrics, scalars=SCALARS, num_ranks=num_ranks, states=("level", "slope")
    )


def metrics_row(
    names: MetricsLayout,
    step: int,
    *,
    attempt: int = 1,
    source: dict[int, int] | None = None,
    value: float | None = None,
) -> MetricsRow:
    """A row whose every number says where it belongs."""
    base = step if value is None else value
    values = np.array([[base + 10 * len(layer) + m for m in range(len(names.metrics))] for layer in names.layers])
    row_scalars = {"attempt": attempt, "step": step, "phase": 0, "regime": 1, "ce": base / 2, "num_patches": 64}
    states = {"level": step / 3, "slope": base}
    return MetricsRow(values=values.astype(np.float32), scalars=row_scalars, source=source or {0: step}, states=states)


def rows_of(blocks: list[Any]) -> list[tuple[int, int, float, tuple[int, ...]]]:
    """Attempt, step, first value and source of each row."""
    return [
        (int(a), int(s), float(v[0, 0]), tuple(map(int, r)))
        for block in blocks
        for a, s, v, r in zip(block.column("attempt"), block.column("step"), block.values, block.source, strict=True)
    ]


LAYOUTS = (
    table_layout(),
    table_layout(("a", "b", "c")),
    table_layout(metrics=("mbe", "mbe_se", "s1")),
    table_layout(num_ranks=3),
)


@pytest.mark.usefixtures("small_segments")
@settings(max_examples=60, deadline=None, suppress_health_check=list(settings.default.suppress_health_check))
@given(
    actions=st.lists(
        st.tuples(st.sampled_from(["append"] * 6 + ["many", "reopen", "look", "layout"]), st.integers(0, 3)),
        max_size=50,
    )
)
def test_metrics_are_what_was_appended(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int]]
) -> None:
    run = create_run(tmp_path_factory.mktemp("run"))
    writer, incremental = MetricsWriter(run.objects), MetricsReader(run.objects)
    names, twin, seen, cursor = LAYOUTS[0], [], [], {}
    step = itertools.count()

    def append() -> None:
        now = next(step)
        source = {rank: now for rank in range(names.num_ranks) if (now + rank) % 3 or rank == 0}
        writer.append(names, metrics_row(names, now, source=source))
        cursor.update(source)
        ranks = tuple(source.get(rank, -1) for rank in range(names.num_ranks))
        twin.append((1, now, float(now + 10), ranks))

    for action, number in actions:
        if action in {"append", "many"}:
            for _ in range(1 if action == "append" else 13):
                append()
        elif action == "layout":
            names = LAYOUTS[number]
        elif action == "reopen":
            writer = MetricsWriter(run.objects)
            assert writer.cursor == read_cursor(run.objects) == cursor
            newest = twin[-1][1] if twin else None
            assert read_states(run.objects) == ({} if newest is None else {"level": newest / 3, "slope": newest})
        else:
            seen += rows_of(list(incremental.read_new()))
            assert seen == rows_of(list(MetricsReader(run.objects).read_new())) == twin
        assert writer.cursor == cursor
    seen += rows_of(list(incremental.read_new()))
    assert seen == twin
    for wanted in (1, 5, 1000):
        tail = rows_of(read_tail(run.objects, wanted))
        assert tail == twin[len(twin) - len(tail) :]
        assert len(tail) >= min(wanted, len(twin))
    assert run.metrics("all").sizes["step"] == len(twin)


def test_metrics_cross_chunk_and_segment_borders_at_their_real_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "TABLE_SEGMENT_ROWS", 128)  # two real chunks
    run, names = create_run(tmp_path), table_layout()
    writer, reader, seen = MetricsWriter(run.objects), MetricsReader(run.objects), []
    for step in range(300):
        writer.append(names, metrics_row(names, step))
        if step % 7 == 0:
            seen += rows_of(list(reader.read_new()))
    seen += rows_of(list(reader.read_new()))
    assert [row[1] for row in seen] == list(range(300))
    assert [name for name in run.objects.children(layout.metrics_key()) if name.startswith("s")] == [
        "s000000",
        "s000001",
        "s000002",
    ]


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("survived", [0, 1, 2, 3])
@pytest.mark.parametrize("before", [0, 1, 3, 4, 5, 11, 12])
def test_a_kill_between_the_four_arrays_leaves_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int, before: int
) -> None:
    """`survived` of the four writes of a row reach the disk; the row, its cursor and its state exist after all four."""
    run, names = create_run(tmp_path), table_layout()
    writer = MetricsWriter(run.objects)
    for step in range(before):
        writer.append(names, metrics_row(names, step))
    whole, writes = Array.write, itertools.count()

    def killed_after(self: Array, *args: Any) -> Any:
        if next(writes) == survived:
            raise KeyboardInterrupt
        return whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Array, "write", killed_after)
        with pytest.raises(KeyboardInterrupt):
            writer.append(names, metrics_row(names, before, value=-1.0))

    expected = [(1, step, float(step + 10), (step, -1)) for step in range(before)]
    assert rows_of(list(MetricsReader(run.objects).read_new())) == expected
    assert read_cursor(run.objects) == ({0: before - 1} if before else {})
    assert read_states(run.objects) == ({"level": (before - 1) / 3, "slope": before - 1} if before else {})
    restarted = MetricsWriter(run.objects)
    for step in (before, before + 1):
        restarted.append(names, metrics_row(names, step))
    expected += [(1, step, float(step + 10), (step, -1)) for step in (before, before + 1)]
    assert rows_of(list(MetricsReader(run.objects).read_new())) == expected
    assert run.metrics()["step"].values.tolist() == list(range(before + 2))


def created_at_most(count: int) -> Any:
    """`Array.create` that is killed after so many arrays."""
    whole, made = Array.create, itertools.count()

    def create(*args: Any, **kwargs: Any) -> Array:
        if next(made) == count:
            raise StoreError("killed here")
        return whole(*args, **kwargs)

    return create


def test_readers_pass_segments_whose_watcher_was_killed_while_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, names = create_run(tmp_path), table_layout()
    MetricsWriter(run.objects).append(names, metrics_row(names, 0))
    for survived in range(3):  # of the three arrays of a segment
        with monkeypatch.context() as patch:
            patch.setattr(Array, "create", created_at_most(survived))
            with pytest.raises(StoreError):
                MetricsWriter(run.objects).append(names, metrics_row(names, 9))
    reader = MetricsReader(run.objects)
    assert [row[1] for row in rows_of(list(reader.read_new()))] == [0]
    assert read_cursor(run.objects) == {0: 0}
    MetricsWriter(run.objects).append(names, metrics_row(names, 1))
    assert [row[1] for row in rows_of(list(reader.read_new()))] == [1]
    assert [row[1] for row in rows_of(read_tail(run.objects, 2))] == [0, 1]
    assert run.metrics()["step"].values.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["values", "scalars", "source"])
def test_a_damaged_chunk_of_metrics_is_an_error_of_ours(tmp_path: Path, name: str) -> None:
    run, names = create_run(tmp_path), table_layout()
    MetricsWriter(run.objects).append(names, metrics_row(names, 0))
    (chunk,) = (tmp_path / layout.metrics_key(0) / name).glob("c.*")
    flip_byte(chunk, 7)
    with pytest.raises(CorruptMetricsError):
        run.metrics()
    if name == "source":
        with pytest.raises(CorruptMetricsError):
            MetricsWriter(run.objects)


def test_a_silent_rank_keeps_its_place_in_the_cursor(tmp_path: Path) -> None:
    run, names = create_run(tmp_path), table_layout()
    writer = MetricsWriter(run.objects)
    writer.append(names, metrics_row(names, 0, source={0: 5, 1: 64}))
    for step in range(1, 200):  # over several chunks, and a restart
        writer.append(names, metrics_row(names, step, source={0: 5 + step}))
    assert read_cursor(run.objects) == {0: 204, 1: 64}
    restarted = MetricsWriter(run.objects)
    restarted.append(names, metrics_row(names, 200, source={0: 300}))
    assert read_cursor(run.objects) == {0: 300, 1: 64}
    restarted.append(names, metrics_row(names, 200, source={1: 60}))  # a correction does not move it back
    assert read_cursor(run.objects) == restarted.cursor == {0: 300, 1: 64}


# ---- the datasets ----------------------------------------------------------------------------------------------------


def slow_select(steps: list[int], attempts: list[int], attempt: Any) -> list[int]:
    """What `select_rows` should give, said differently."""
    rows = range(len(steps))
    if attempt == "all":
        return list(rows)
    chosen: dict[int, int] = {}
    for row in rows:
        if attempt not in {"latest", attempts[row]}:
            continue
        best = chosen.get(steps[row])
        if best is None or attempts[row] >= attempts[best]:
            chosen[steps[row]] = row
    return [chosen[step] for step in sorted(chosen)]


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 3)), max_size=30),
    attempt=st.sampled_from(["latest", "all", 1, 2, 3, 4]),
)
def test_views_of_attempts_are_those_of_the_slow_twin(rows: list[tuple[int, int]], attempt: Any) -> None:
    steps, attempts = [step for step, _ in rows], [number for _, number in rows]
    fast = select_rows(np.array(steps, np.int64), np.array(attempts, np.int64), attempt)
    assert fast.tolist() == slow_select(steps, attempts, attempt)


def filled(tmp_path: Path) -> Run:
    """Attempt 1 reaches step 3, attempt 2 resumes at 2; step 1 has a correction."""
    run, names = create_run(tmp_path), table_layout()
    writer = MetricsWriter(run.objects)
    for attempt, step, value in (
        (1, 0, 0.0),
        (1, 1, 1.0),
        (1, 2, 2.0),
        (1, 1, 1.5),
        (1, 3, 3.0),
        (2, 2, 20.0),
        (2, 4, 40.0),
    ):
        writer.append(names, metrics_row(names, step, attempt=attempt, value=value))
    return run


@pytest.mark.parametrize(
    ("attempt", "steps", "values"),
    [
        ("latest", [0, 1, 2, 3, 4], [0.0, 1.5, 20.0, 3.0, 40.0]),
        ("all", [0, 1, 2, 1, 3, 2, 4], [0.0, 1.0, 2.0, 1.5, 3.0, 20.0, 40.0]),
        (1, [0, 1, 2, 3], [0.0, 1.5, 2.0, 3.0]),
        (2, [2, 4], [20.0, 40.0]),
        (3, [], []),
    ],
)
def test_attempts_and_corrections_in_the_dataset(
    tmp_path: Path, attempt: Any, steps: list[int], values: list[float]
) -> None:
    table = filled(tmp_path).metrics(attempt)
    assert table["step"].values.tolist() == steps
    assert (table["mbe"].sel(layer="a").values - 10).tolist() == values
    assert (2 * table["ce"].values).tolist() == values
    assert table["phase"].values.tolist() == ["memorize"] * len(steps)
    assert table["regime"].values.tolist() == ["memorizing"] * len(steps)


def test_the_contract_variables_are_always_there(tmp_path: Path) -> None:
    for run in (create_run(tmp_path / "empty"), filled(tmp_path / "filled")):
        table = run.metrics()
        assert isinstance(table, xr.Dataset)
        for metric in METRICS:
            for name in (metric.name, f"{metric.name}_se"):
                assert table[name].dims == ("step", "layer")
                assert table[name].attrs["unit"] == metric.unit
                assert table[name].attrs["long_name"]
            if metric.name not in {"mbe"}:
                assert np.isnan(table[metric.name].values).all()
        for name in ("attempt", "ce", "phase", "regime"):
            assert table[name].dims == ("step",)
    assert run.metrics()["mbe"].attrs["n"] == 64
    assert run.metrics()["s1"].attrs["n"] == "see num_tokens"


def test_the_sample_size_is_said_where_it_is_the_same_throughout(tmp_path: Path) -> None:
    run, names = create_run(tmp_path), table_layout()
    writer = MetricsWriter(run.objects)
    for step, patches in enumerate((64, 64, 32)):
        row = metrics_row(names, step)
        writer.append(
            names, MetricsRow(values=row.values, scalars={**row.scalars, "num_patches": patches}, source={0: step})
        )
        expected = 64 if step < 2 else "see num_patches"
        assert run.metrics()["mbe"].attrs["n"] == expected
    assert run.metrics()["num_patches"].values.tolist() == [64, 64, 32]


def test_a_changed_layout_is_joined_by_name_in_model_order(tmp_path: Path) -> None:
    run, writer = create_run(tmp_path), None
    for step, (layers, metrics) in enumerate(
        ((("x", "b"), ("mbe", "mbe_se")), (("b", "a"), ("s1", "mbe")), (("a", "b", "c"), ("mbe",)))
    ):
        names = table_layout(layers, metrics)
        writer = writer or MetricsWriter(run.objects)
        writer.append(names, metrics_row(names, step))
    assert run.objects.children(layout.metrics_key())[:3] == ["s000000", "s000001", "s000002"]
    table = run.metrics()
    assert table["layer"].values.tolist() == ["a", "b", "c", "x"]
    mbe = table["mbe"].values
    nan = np.nan
    np.testing.assert_array_equal(mbe, [[nan, 10, nan, 10], [12, 12, nan, nan], [12, 12, 12, nan]])
    np.testing.assert_array_equal(table["s1"].sel(layer="a").values, [nan, 11, nan])
    np.testing.assert_array_equal(table["mbe_se"].sel(layer="x").values, [11, nan, nan])


def test_scalars_of_a_rank_that_never_wrote_are_empty(tmp_path: Path) -> None:
    table = create_run(tmp_path).scalars(rank=7)
    assert table.sizes["step"] == 0
    assert {"loss", "lr", "wall_time_s", "attempt", "phase"} <= set(table)


def test_plain_readers_open_the_tables(tmp_path: Path) -> None:
    run = filled(tmp_path)
    writer = ScalarsWriter(run.objects, 0, 1)
    writer.append({"step": 0, "loss": 2.0})
    writer.flush()
    root = zarr.open_group(f"{run.objects.url}/store.zarr", mode="r")
    arrays = {path for path, node in root.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert arrays == {
        "metrics/s000000/values",
        "metrics/s000000/scalars",
        "metrics/s000000/states",
        "metrics/s000000/source",
        "scalars/r00000/s000000/values",
    }
    opened = xr.open_zarr(f"{run.objects.url}/{layout.metrics_key(0)}", consolidated=False, zarr_format=3, chunks=None)
    assert opened["values"].dims == ("row", "layer", "metric")
    assert opened["values"].values[:7, 0, 0].tolist() == run.metrics("all")["mbe"].sel(layer="a").values.tolist()
    assert opened["source"].values[7:].tolist() == [[-1, -1]] * (len(opened["source"]) - 7)
    assert opened.attrs["phase"] == {"flag_values": [0, 1], "flag_meanings": "memorize compress"}
    steps = xr.open_zarr(
        f"{run.objects.url}/{layout.scalars_key(0, 0)}", consolidated=False, zarr_format=3, chunks=None
    )
    assert steps["values"].values[0, :2].tolist() == [0.0, 2.0]
