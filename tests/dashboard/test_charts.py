"""Chart specifications, and the tables they are fed."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from entropy_dashboard import charts, tables
from entropy_dashboard.heatmap import draw_diverging
from entropy_dashboard.readers import RunReader
from entropy_dashboard.theme import PALETTES
from entropy_monitor.store import CommandRequest, acknowledge, issue_command
from entropy_monitor.types import Acknowledgement

from .synthetic_run import SyntheticRun

DATASETS = {
    charts.loss: {"bands", "span", "ce", "commands"},
    charts.entropy: {"bands", "span", "entropy", "layers", "commands"},
    charts.alignment: {"span", "image_below", "image_above", "tips", "scale"},
}


def names_in(spec: object) -> set[str]:
    if isinstance(spec, dict):
        own = {spec["data"]["name"]} if isinstance(spec.get("data"), dict) else set()
        return own.union(*(names_in(value) for value in spec.values()))
    return set().union(*(names_in(value) for value in spec)) if isinstance(spec, list) else set()


def fields_in(spec: object) -> set[str]:
    if isinstance(spec, dict):
        own = {spec["field"]} if isinstance(spec.get("field"), str) else set()
        return own.union(*(fields_in(value) for value in spec.values()))
    return set().union(*(fields_in(value) for value in spec)) if isinstance(spec, list) else set()


def read(stream: bytes) -> pa.Table:
    return pa.ipc.open_stream(stream).read_all()


@pytest.fixture
def reader(runs) -> RunReader:
    made = SyntheticRun(runs / "r", num_layers=30, phase="auto")
    made.train(1500)
    made.heartbeats()
    opened = RunReader(runs / "r", min_age_s=0)
    opened.refresh()
    return opened


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("chart", DATASETS)
def test_specifications_are_fixed_json_without_data(chart, theme):
    spec = chart(theme)
    assert json.loads(json.dumps(spec)) == spec
    assert spec is chart(theme)
    assert names_in(spec) == DATASETS[chart]
    assert "datasets" not in spec
    assert spec["usermeta"]["embedOptions"]["renderer"] == "canvas"
    assert "http" not in json.dumps({key: value for key, value in spec.items() if key != "$schema"})


def test_every_field_of_a_chart_is_in_its_tables(reader):
    window = tables.full_window(reader)
    snapshot = reader.refresh()
    shared = [tables.bands_table(reader, window), tables.span_table(window), tables.commands_table(snapshot, window)]
    layers = ("transformer.h.3", "transformer.h.20")
    data = {
        charts.loss: [*shared, tables.loss_table(reader, window)],
        charts.entropy: [
            *shared,
            tables.entropy_table(reader, "mbe_normalized", window),
            tables.layers_table(reader, "mbe_normalized", layers, window),
        ],
        charts.alignment: [
            tables.span_table(window),
            *tables.heat_tables(reader, "alignment_weight", window, PALETTES["light"]),
            tables.arrow({"v": [-1.0, 1.0]}),
        ],
    }
    for chart, streams in data.items():
        columns = {name for stream in streams for name in read(stream).column_names}
        assert fields_in(chart("light")) <= columns
        assert sum(read(stream).num_rows for stream in streams) < 2500


def test_a_million_steps_do_not_make_more_rows(runs):
    reader = RunReader(runs / "r")
    made = SyntheticRun(runs / "r", num_layers=3, every=1)
    made.train(2)
    reader.refresh()
    steps = np.arange(2, 300_000)
    values = np.random.default_rng(0).standard_normal((len(steps), 3))
    reader.steps.values.append(values)
    changed = reader.steps.order.append(np.ones(len(steps), np.int64), steps)
    assert changed is not None
    reader.steps.values.changed(changed)
    window = tables.full_window(reader)
    assert read(tables.loss_table(reader, window)).num_rows <= tables.CE_BUCKETS


def test_chosen_layers_carry_their_standard_error(reader):
    window = tables.full_window(reader)
    table = read(tables.layers_table(reader, "mbe_normalized", ("transformer.h.3", "gone"), window)).to_pydict()
    assert set(table["layer"]) == {"h.3"}
    assert set(table["error"]) == {"± 0.0200"}
    np.testing.assert_allclose(np.subtract(table["high"], table["low"]), 0.04, atol=1e-5)


def test_phase_bands_meet_at_the_step_of_the_change(reader):
    bands = read(tables.bands_table(reader, tables.full_window(reader))).to_pydict()
    assert bands["phase"] == ["memorize", "compress", "memorize", "compress", "memorize"]
    assert bands["first"] == [0, 350, 700, 1050, 1400]
    assert bands["last"] == [350, 700, 1050, 1400, 1500]


def test_many_phases_are_shown_by_buckets(runs):
    made = SyntheticRun(runs / "r", num_layers=1)
    made.scalars = None
    for phase in ["memorize", "compress"] * 300:
        made.train(3, measured=False, phase=phase)
    reader = RunReader(runs / "r")
    reader.refresh()
    first, last, codes = tables.phase_bands(reader, tables.full_window(reader))
    assert 0 < len(first) <= tables.MAX_BANDS
    assert (last > first).all()
    assert (np.diff(codes) != 0).all()


def test_only_applied_commands_are_drawn(reader, runs):
    run = reader.run
    for status in ("applied", "rejected"):
        request = CommandRequest(phase="compress", reason=f"because {status}", issued_by="ada")
        command = issue_command(run.objects, run.run_id, request)
        ack = Acknowledgement(command_id=command.command_id, rank=0, step=700, status=status, detail="")
        acknowledge(run.objects, int(command.command_id), ack)
    table = read(tables.commands_table(reader.refresh(), tables.full_window(reader))).to_pydict()
    assert table == {"step": [700.0], "phase": ["compress"], "by": ["ada"], "reason": ["because applied"]}


def test_quantiles_leave_undetermined_layers_out():
    values = np.array([[1.0, 2.0, 3.0, np.nan], [np.nan] * 4, [5.0, np.nan, np.nan, np.nan]])
    low, median = tables.quantiles(values, (0.1, 0.5))
    np.testing.assert_allclose(low, [np.nanquantile(values[0], 0.1), np.nan, 5.0])
    np.testing.assert_allclose(median, [2.0, np.nan, 5.0])


def pixels(url: str) -> np.ndarray:
    picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    return np.asarray(picture.convert("RGB"))


def test_an_undetermined_cell_is_hatched_and_zero_is_not(reader):
    palette = PALETTES["light"]
    image = pixels(draw_diverging(np.array([[0.0, np.nan], [1.0, -1.0]], np.float32), palette))
    height, width = image.shape[:2]
    zero, undetermined = image[height // 2 :, : width // 2], image[: height // 2, : width // 2]
    one, minus_one = image[height // 2 :, width // 2 :], image[: height // 2, width // 2 :]
    assert {tuple(p) for p in zero.reshape(-1, 3).tolist()} == {(247, 247, 247)}
    assert {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in undetermined.reshape(-1, 3).tolist()} == {
        palette.undetermined,
        palette.hatch,
    }
    assert one[0, 0].tolist() == [0x1B, 0x78, 0x37]
    assert minus_one[-1, -1].tolist() == [0x76, 0x2A, 0x83]


def test_the_heat_map_says_undetermined(reader):
    window = tables.Window(0, 60)
    _, tips = tables.heat_tables(reader, "alignment_weight", window, PALETTES["light"])
    words = dict(zip(read(tips)["layer"].to_pylist(), read(tips)["value"].to_pylist(), strict=True))
    assert "undetermined" in read(tips)["value"].to_pylist()
    assert any(" ± 0.060" in word for word in words.values())
    assert any(" … " in name for name in words)


def test_regular_sampling_leaves_no_gaps(reader):
    """Buckets finer than the sampling would be empty, and look undetermined."""
    image, _ = tables.heat_tables(reader, "alignment_activation", tables.full_window(reader), PALETTES["light"])
    colors = {tuple(p) for p in pixels(read(image)["url"][0].as_py()).reshape(-1, 3).tolist()}
    assert (0xB4, 0xBB, 0xC4) not in colors


def test_a_run_without_rows_has_empty_tables(runs):
    SyntheticRun(runs / "r")
    reader = RunReader(runs / "r")
    snapshot = reader.refresh()
    window = tables.full_window(reader)
    assert read(tables.loss_table(reader, window)).num_rows == 0
    assert read(tables.bands_table(reader, window)).num_rows == 0
    assert read(tables.commands_table(snapshot, window)).num_rows == 0
    assert read(tables.heat_tables(reader, "alignment_weight", window, PALETTES["dark"])[0]).num_rows == 0
