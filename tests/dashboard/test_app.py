"""Every state of the pages, and every way to act, without a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

import entropy_dashboard.app  # noqa: F401  # imports take seconds, in which a live trainer would become a stale one
from entropy_dashboard import session
from entropy_dashboard.readers import RunReader
from entropy_monitor.store import acknowledge, list_commands
from entropy_monitor.types import Acknowledgement

from .synthetic_run import SyntheticRun

LAUNCHERS = [
    Path(__file__).resolve().parents[2] / "dashboard" / part for part in ("app.py", "entropy_dashboard/launch/app.py")
]
TOKEN = "sesame"


@pytest.fixture
def made(runs) -> SyntheticRun:
    run = SyntheticRun(runs / "demo", phase="auto")
    run.train(800)
    run.heartbeats()
    return run


@pytest.fixture(autouse=True)
def _fresh_readers():
    session.shared_reader.clear()


def open_app(run: str | None = None, *, script: Path = LAUNCHERS[1], operator: bool = False, **params: str) -> AppTest:
    app = AppTest.from_file(str(script), default_timeout=30)
    for name, value in {**({"run": run} if run else {}), **params}.items():
        app.query_params[name] = value
    app.run()
    if operator:
        app.text_input(key="operator_token_field").set_value(TOKEN).run()
    assert_whole(app)
    return app


def assert_whole(app: AppTest) -> None:
    assert not app.exception, app.exception[0].value


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.caption, app.info, app.warning, app.error, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind).replace("\\", "")


def charts(app: AppTest) -> list:
    return app.get("vega_lite_chart")


@pytest.mark.parametrize("script", LAUNCHERS)
def test_the_live_page(made, script):
    made.event(700, "transition", "plateau: CE is flat")
    app = open_app(script=script)
    assert len(charts(app)) == 3
    assert [metric.label for metric in app.metric] == ["CE loss", "Mean MBE", "Alignment", "Steps in phase"]
    assert "± 0.0200, n = 512 tokens in 64 patches, 12 of 12 layers determined" in app.metric[1].help
    assert "± 0.0600" in app.metric[2].help
    assert "Mean of the last 50 optimizer steps" in app.metric[0].help
    assert app.metric[3].value == "100"
    text = words(app)
    for part in ("Live · heartbeat", "Phase: memorize", "Regime: memorizing", "Control: auto"):
        assert part in text
    for part in ("step 799 · 12 layers", "0.42 ± 0.05 %", "No faults", "plateau: CE is flat"):
        assert part in text
    assert not app.error
    assert not app.warning


def test_charts_are_fed_named_arrow_datasets_and_fixed_specifications(made):
    app = open_app()
    before = [chart.proto.spec for chart in charts(app)]
    made.train(100)
    session.shared_reader(str(made.path))._looked_at = -1e9
    app.run()
    assert [chart.proto.spec for chart in charts(app)] == before
    assert {dataset.name for dataset in charts(app)[2].proto.datasets} == {
        "span",
        "image_below",
        "image_above",
        "tips",
        "scale",
    }
    assert all(json.loads(spec)["usermeta"]["embedOptions"]["renderer"] == "canvas" for spec in before)


def test_no_runs_yet_then_one(runs):
    app = open_app()
    text = words(app)
    assert "No runs yet" in text
    assert "from entropy_hooks import attach" in text
    assert 'with attach(model, optimizer, run="runs/my-run"):' in text
    assert "refreshes itself" in text
    SyntheticRun(runs / "first")
    app.run()
    assert_whole(app)
    assert "No runs yet" not in words(app)


def test_a_run_without_any_step(runs):
    run = SyntheticRun(runs / "r")
    run.heartbeats()
    app = open_app()
    assert "Nothing is measured yet: the watcher runs" in words(app)
    assert "No phase is known yet" in app.metric[3].help
    assert "no step yet" not in words(app)


def test_a_run_that_is_not_measured_shows_its_loss(runs):
    run = SyntheticRun(runs / "r")
    run.train(300, measured=False)
    run.heartbeats(watcher=False)
    app = open_app()
    text = words(app)
    assert "Nothing is measured yet and no watcher is running" in text
    assert f"entropy-monitor watch {runs / 'r'}".replace("\\", "") in text
    assert len(charts(app)) == 1
    assert app.metric[0].value != "—"
    assert app.metric[1].value == "—"


def test_the_watcher_has_stopped(made):
    made.run.objects.delete("heartbeat/watcher.json")
    app = open_app()
    assert "The watcher is not running" in words(app)
    assert f"entropy-monitor watch {made.path}" in [code.value for code in app.code]


STATES = {
    "stale": ({"age_s": 12.0}, ("Stale · heartbeat", "has been silent for")),
    "dead": ({"age_s": 240.0}, ("Dead · heartbeat 4 min ago", "start it again with the same run")),
    "ended": ({"age_s": 240.0, "state": "ended"}, ("Ended", "Training has ended")),
    "skew": ({"age_s": -60.0}, ("Clock skew ·", "Synchronise both clocks")),
    "hung": ({"step_age_s": 400.0}, ("Live · heartbeat", "no step for 7 min", "py-spy dump")),
}


@pytest.mark.parametrize("name", STATES)
def test_failing_states_have_words_and_a_next_step(made, name):
    fields, parts = STATES[name]
    made.heartbeats(**fields)
    app = open_app()
    text = words(app)
    for part in parts:
        assert part in text
    assert len(charts(app)) == 3


def test_no_heartbeat_at_all(runs):
    SyntheticRun(runs / "r").train(50)
    app = open_app()
    assert "No trainer has sent a heartbeat in this attempt" in words(app)


def test_an_unreadable_run_says_why_and_leaves_the_others(made, runs):
    (runs / "broken" / "store.zarr").mkdir(parents=True)
    (runs / "broken" / "store.zarr" / "zarr.json").write_text("{ not json")
    app = open_app("broken")
    assert "This run cannot be read" in app.error[0].value
    assert "restore the file" in words(app)
    assert not charts(app)
    app.selectbox[0].select("demo").run()
    assert_whole(app)
    assert len(charts(app)) == 3


def test_a_damaged_metrics_chunk_keeps_what_came_before(made):
    made.train(1000)
    chunk = made.path / "store.zarr/metrics/s000000/values/c.1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    app = open_app()
    assert any("Part of this run cannot be read" in warning.value for warning in app.warning)
    assert len(charts(app)) == 3


def test_a_malformed_event_does_not_break_the_page(made):
    made.event(1, "regime", "fine")
    made.run.objects.put_json("events/00000002.json", {"nonsense": 1})
    made.event(2, "regime", "later")
    app = open_app()
    assert "fine" in words(app)
    assert "later" in words(app)
    assert len(charts(app)) == 3


def test_drops_and_faults_are_shown(made):
    made.heartbeats(frames_dropped=7, faults={"non_finite": 3})
    made.run.objects.put_json("retention/r00000.json", {"frames_removed_unmeasured": 5})
    text = words(open_app())
    assert "**7**] frames dropped" in text
    assert "**5**] removed unmeasured" in text
    assert "Faults: non_finite × 3" in text


def test_the_entropy_and_alignment_shown_can_be_chosen(made):
    app = open_app()
    before = {dataset.name: dataset.data.data for dataset in charts(app)[1].proto.datasets}
    app.segmented_control(key="entropy_kind").set_value("mbe").run()
    assert_whole(app)
    after = {dataset.name: dataset.data.data for dataset in charts(app)[1].proto.datasets}
    assert after["entropy"] != before["entropy"]
    app.segmented_control(key="alignment_kind").set_value("alignment_activation").run()
    assert "`alignment_activation`" in words(app)
    app.segmented_control(key="window").set_value("Last 1k").run()
    app.multiselect[0].set_value([]).run()
    assert_whole(app)


def test_the_address_chooses_run_and_layers(made, runs):
    other = SyntheticRun(runs / "other", num_layers=2, layer_names=("left", "right"))
    other.train(20)
    app = open_app("demo", layer="transformer.h.7")
    assert app.selectbox[0].value == "demo"
    assert app.multiselect[0].value == ["transformer.h.7"]
    app.selectbox[0].select("other").run()
    assert_whole(app)
    assert app.query_params["run"] == "other"
    assert "layer" not in app.query_params
    assert app.multiselect[0].value == ["left", "right"]
    app.multiselect[0].set_value(["right"]).run()
    assert_whole(app)
    assert app.query_params["layer"] == "right"


@pytest.mark.parametrize("name", ["../../etc", "..", "/etc", "demo/../demo", "<script>alert(1)</script>", "a\x00b", ""])
def test_a_name_that_is_no_run_reaches_nothing(made, name):
    app = AppTest.from_file(str(LAUNCHERS[1]), default_timeout=30)
    app.query_params["run"] = name
    app.run()
    assert_whole(app)
    assert app.selectbox[0].value == "demo"
    assert any("There is no run" in warning.value for warning in app.warning)
    assert not any("<script>" in warning.value for warning in app.warning)


def test_an_odd_run_name_is_not_listed(made, runs):
    SyntheticRun(runs / "<img src=x onerror=alert(1)>")
    assert open_app().selectbox[0].options == ["demo"]


HOSTILE = "<img src=x onerror=alert(1)> [a](javascript:alert(1)) ![i](http://x.example/i.png) :material/home: $x$ **b**"


def test_text_from_a_run_is_never_markup(made, monkeypatch):
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", TOKEN)
    made.event(10, "alert", HOSTILE, layer=HOSTILE)
    made.heartbeats(faults={HOSTILE: 1})
    app = open_app(operator=True)
    send(app, reason=HOSTILE)
    acknowledge(
        made.run.objects, 1, Acknowledgement(command_id="00000001", rank=0, step=1, status="rejected", detail=HOSTILE)
    )
    session.shared_reader.clear()
    app.run()
    elements = [*app.markdown, *app.caption, *app.warning, *app.error, *app.info]
    hostile = [element for element in elements if "onerror" in str(element.value)]
    assert len(hostile) >= 3
    for element in hostile:
        assert not element.proto.allow_html if hasattr(element.proto, "allow_html") else True
        for part in ("<img", "](", "![", "http:", "$x$", "**b**", ":material/home:"):
            assert re.search(rf"(?<!\\){re.escape(part)}", element.value) is None


def send(app: AppTest, phase: str = "compress", reason: str = "because", weight: float | None = None) -> None:
    app.button(key=f"command_{phase}").click().run()
    app.text_input(key="reason").set_value(reason)
    if weight is not None:
        app.number_input(key="weight").set_value(weight)
    app.button(key="send").click().run()
    assert_whole(app)


def test_without_a_token_on_the_server_control_is_off(made):
    app = open_app()
    assert all(app.button(key=f"command_{phase}").disabled for phase in ("auto", "memorize", "compress"))
    assert "start the dashboard with ENTROPY_MONITOR_OPERATOR_TOKEN set" in words(app)


def test_a_wrong_token_unlocks_nothing(made, monkeypatch):
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", TOKEN)
    app = open_app()
    app.text_input(key="operator_token_field").set_value("open sesame").run()
    assert "That is not the token" in words(app)
    assert app.button(key="command_compress").disabled


def test_a_command_with_reason_and_weight(made, monkeypatch):
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", TOKEN)
    monkeypatch.setenv("ENTROPY_MONITOR_KEY", "secret")
    app = open_app(operator=True)
    send(app, reason=" entropy plateau ", weight=0.05)
    (command,) = list_commands(made.run.objects)
    assert (command.phase, command.weight, command.reason) == ("compress", 0.05, "entropy plateau")
    assert command.issued_by == "operator"
    assert command.signature is not None
    session.shared_reader.clear()
    app.run()
    assert "waiting for rank 0" in words(app)
    ack = Acknowledgement(command_id=command.command_id, rank=0, step=812, status="applied", detail="")
    acknowledge(made.run.objects, 1, ack)
    session.shared_reader.clear()
    app.run()
    assert "applied at step 812 by rank 0" in words(app)


def test_a_command_needs_a_reason(made, monkeypatch):
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", TOKEN)
    app = open_app(operator=True)
    send(app, reason="   ")
    assert "Give a reason" in words(app)
    assert list_commands(made.run.objects) == []
    app.button(key="cancel").click().run()
    assert_whole(app)
    assert not [box for box in app.text_input if box.key == "reason"]


def test_the_token_is_asked_again_at_the_moment_of_acting(made, monkeypatch):
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", TOKEN)
    app = open_app(operator=True)
    app.button(key="command_memorize").click().run()
    app.text_input(key="reason").set_value("because")
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", "changed")
    app.button(key="send").click().run()
    assert "This session is read-only" in words(app)
    assert list_commands(made.run.objects) == []


def test_locking_again(made, monkeypatch):
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", TOKEN)
    app = open_app(operator=True)
    assert not app.button(key="command_compress").disabled
    app.button(key="lock").click().run()
    assert app.button(key="command_compress").disabled


def test_an_ended_run_takes_no_command(made, monkeypatch):
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", TOKEN)
    made.heartbeats(state="ended")
    app = open_app(operator=True)
    send(app)
    assert "Training has ended: there is nobody to take the command" in words(app)
    assert list_commands(made.run.objects) == []


def test_an_observing_trainer_says_so_beside_the_buttons(made):
    made.heartbeats(steer=False)
    assert "This trainer only observes and rejects commands" in words(open_app())


def test_a_run_that_is_made_again_is_read_again(made, runs):
    import shutil

    reader = RunReader(made.path, min_age_s=0)
    reader.refresh()
    assert len(reader.layers.order.steps) == 80
    shutil.rmtree(made.path)
    again = SyntheticRun(runs / "demo")
    again.train(20)
    again.heartbeats()
    reader.refresh()
    assert len(reader.layers.order.steps) == 2


def test_viewers_share_one_look(made):
    reader = RunReader(made.path, min_age_s=60)
    assert reader.refresh() is reader.refresh()
