"""Words: escaping, names, states and fates, without Streamlit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_dashboard.fate import judge
from entropy_dashboard.health import heartbeat_badge, notices, phase_badge, regime_badge
from entropy_dashboard.text import age, escape, number, short_names
from entropy_monitor.store import RunStatus
from entropy_monitor.types import Acknowledgement, Command

LIVE = RunStatus(
    run_id="r",
    state="live",
    heartbeat_age_s=0.5,
    attempt=1,
    step=100,
    phase="compress",
    weight=0.03,
    steer=True,
    every=10,
    regime="compressing",
    frames_committed=10,
    frames_dropped=0,
    frames_removed_unmeasured=0,
    overhead_percent=0.4,
    overhead_error_percent=0.1,
    overhead_samples=20,
    overhead_source="a clock",
    last_step_age_s=0.1,
    ranks=[0],
    missing_ranks=[],
    watcher_state="live",
    control="auto",
    last_measured_step=100,
    watcher_lag_s={"p50": 0.1, "p95": 0.2},
    commands_pending=0,
)
COMMAND = Command(
    command_id="00000003",
    phase="compress",
    weight=None,
    reason="plateau",
    issued_by="ada",
    issued_at=1000.0,
    expires_after_s=300.0,
)


@given(st.text(max_size=200))
def test_every_punctuation_mark_is_escaped(text):
    escaped = escape(text)
    bare = escaped.replace("\\\\", "")
    for position, character in enumerate(bare):
        if character in "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~":
            assert bare[position - 1] == "\\"
    assert "\n" not in escaped


def test_direction_marks_and_control_characters_become_visible():
    assert escape("a\u202eb\x1bc") == "a�b�c"


def test_long_text_is_shortened():
    assert escape("x" * 50, limit=10) == "xxxxxxxxx…"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (600, "10 min"), (7200, "2 h"), (900_000, "10 d")]
)
def test_age(seconds, words):
    assert age(seconds) == words


def test_an_undetermined_figure_is_a_dash():
    assert (number(float("nan")), number(None), number(0.25, 2, sign=True)) == ("—", "—", "+0.25")


@pytest.mark.parametrize(
    ("layers", "short"),
    [
        (("transformer.h.0", "transformer.h.11"), ("h.0", "h.11")),
        (("embed", "head"), ("embed", "head")),
        (("a.mlp", "b.mlp"), ("a.mlp", "b.mlp")),
        (("0", "1"), ("0", "1")),
        ((), ()),
    ],
)
def test_short_names_are_unique_and_say_what_they_number(layers, short):
    assert tuple(short_names(layers).values()) == short


STATES = {
    "live": ({}, [], "Live · heartbeat 0 s ago"),
    "stale": ({"state": "stale", "heartbeat_age_s": 12.0}, ["stale"], "Stale · heartbeat 12 s ago"),
    "dead": ({"state": "dead", "heartbeat_age_s": 90.0}, ["dead"], "Dead · heartbeat 90 s ago"),
    "never": ({"state": "dead", "heartbeat_age_s": None}, ["dead"], "No heartbeat yet"),
    "ended": ({"state": "ended", "heartbeat_age_s": 90.0}, ["ended"], "Ended"),
    "skew": ({"heartbeat_age_s": -30.0}, ["skew"], "Clock skew · 30 s ahead"),
    "hung": ({"last_step_age_s": 45.0}, ["hung"], "Live · heartbeat 0 s ago"),
    "no watcher": ({"watcher_state": "dead"}, ["watcher"], "Live · heartbeat 0 s ago"),
}


@pytest.mark.parametrize("name", STATES)
def test_each_state_has_its_words(name):
    changes, kinds, badge = STATES[name]
    status = replace(LIVE, **changes)
    assert [notice.kind for notice in notices(status, "/r", num_measured=5, step_time_s=0.1)] == kinds
    assert heartbeat_badge(status).label == badge


def test_slow_steps_are_no_hang():
    status = replace(LIVE, last_step_age_s=45.0)
    assert notices(status, "/r", num_measured=5, step_time_s=20.0) == []


def test_the_watcher_s_command_is_quoted():
    found = notices(replace(LIVE, watcher_state="dead"), "/runs/my run; rm", num_measured=0, step_time_s=None)
    assert found[0].command == "entropy-monitor watch '/runs/my run; rm'"


def test_a_live_watcher_without_rows_is_waiting():
    assert [notice.kind for notice in notices(LIVE, "/r", num_measured=0, step_time_s=None)] == ["empty"]


def test_an_ended_run_that_was_measured_needs_no_watcher():
    status = replace(LIVE, state="ended", watcher_state="ended")
    assert [notice.kind for notice in notices(status, "/r", num_measured=5, step_time_s=None)] == ["ended"]


def test_phase_and_regime_are_two_words():
    assert phase_badge("compress").label == "Phase: compress"
    assert phase_badge(None).label == "Phase unknown"
    assert regime_badge("compressing").label == "Regime: compressing"
    assert regime_badge("undetermined").label == "Regime: undetermined"


def answer(rank: int, status: str = "applied", detail: str = "") -> Acknowledgement:
    return Acknowledgement(command_id="00000003", rank=rank, step=120 + rank, status=status, detail=detail)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("acks", "ranks", "now", "kind", "words"),
    [
        ([], [0], 1010.0, "waiting", "waiting for rank 0; expires in 5 min"),
        ([], [], 1010.0, "waiting", "waiting for rank 0; expires in 5 min"),
        ([], [0], 1301.0, "expired", "expired unanswered: no trainer took it; send it again when one runs"),
        ([answer(0)], [0], 1010.0, "applied", "applied at step 120 by rank 0"),
        ([answer(0), answer(1)], [0, 1], 1010.0, "applied", "applied at step 121 by all 2 ranks"),
        ([answer(0)], [0, 1, 2], 1010.0, "partial", "applied by 1 of 3 ranks; no answer from rank 1, 2"),
        ([answer(0, "rejected", "observe-only")], [0], 1010.0, "rejected", "rejected by rank 0: observe-only"),
        ([answer(0), answer(1, "expired", "late")], [0, 1], 1010.0, "expired", "expired by rank 1: late"),
    ],
)
def test_fate(acks, ranks, now, kind, words):
    fate = judge(COMMAND, acks, ranks, now)
    assert (fate.kind, fate.text) == (kind, words)
