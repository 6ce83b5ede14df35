import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.errors import ConfigError
from entropy_monitor.gapt import GatedPhaseTransition, GateOptions, GateState
from entropy_monitor.types import PATCH_LENGTH

SHORT = GateOptions(memorize_patience=10, compress_patience=6)
HIGH_MBE = 1.5


def feed(gate, ces, mbes=HIGH_MBE, start=0):
    """Feed one step per CE; give the transitions."""
    ces = list(ces)
    mbes = [mbes] * len(ces) if mbes is None or isinstance(mbes, float) else list(mbes)
    found = [gate.update(start + i, ce, mbe) for i, (ce, mbe) in enumerate(zip(ces, mbes, strict=True))]
    return [transition for transition in found if transition is not None]


def compressing_gate(options=SHORT, ce=2.0):
    gate = GatedPhaseTransition(options)
    feed(gate, [ce] * (options.memorize_patience + 1))
    assert gate.phase == "compress"
    return gate


def columns(state):
    """A state's row with NaN made comparable."""
    return {name: "nan" if math.isnan(value) else value for name, value in state.to_row().items()}


def test_starts_memorizing_without_weight():
    gate = GatedPhaseTransition()
    assert gate.phase == "memorize"
    assert gate.weight == 0.0
    assert gate.options == GateOptions()


def test_plateau_of_ce_starts_compression_after_exactly_the_patience():
    gate = GatedPhaseTransition(SHORT)
    transitions = feed(gate, [2.0] * 10)
    assert transitions == []
    (transition,) = feed(gate, [2.0], start=10)
    assert (transition.step, transition.phase) == (10, "compress")
    assert gate.phase == "compress"
    assert gate.weight == SHORT.weight
    assert "CE 2 " in transition.reason
    assert "10 updates" in transition.reason
    assert transition.evidence["num_stale"] == 10
    assert transition.evidence["ce_best"] == 2.0
    assert gate.state.phase_since == 11


def test_a_ce_that_keeps_falling_is_never_compressed():
    gate = GatedPhaseTransition(SHORT)
    assert feed(gate, [5 * 0.99**i for i in range(300)]) == []


def test_a_fall_too_slow_for_one_step_counts_once_it_adds_up():
    # 0.2 % a step is below tau but passes 1 % well within the patience.
    options = replace(SHORT, ema=0.5)
    gate = GatedPhaseTransition(options)
    assert feed(gate, [5 * 0.998**i for i in range(300)]) == []
    crawling = GatedPhaseTransition(options)
    assert feed(crawling, [5 * 0.9995**i for i in range(300)])[0].phase == "compress"


def test_a_spike_of_ce_ends_compression():
    gate = compressing_gate(replace(SHORT, compress_patience=100, duty=1.0))
    transitions = feed(gate, [2.5] * 60, start=100)
    assert transitions[0].phase == "memorize"
    assert "spike threshold 10.0%" in transitions[0].reason
    assert transitions[0].evidence["ce_ema"] > 1.1 * transitions[0].evidence["ce_best"]
    # The EMA needs ceil(log(1 - .2 / .5) / log .95) = 10 steps to rise by a tenth of 2.
    assert transitions[0].step == 109


def test_a_rise_below_the_spike_does_not_end_compression():
    gate = compressing_gate(replace(SHORT, compress_patience=1000, duty=1.0))
    assert feed(gate, [2.19] * 300, start=100) == []


def test_the_spike_is_measured_from_the_minimum_of_the_phase_however_small_its_gain():
    gate = compressing_gate(replace(SHORT, compress_patience=10_000, duty=1.0, ema=0.0))
    feed(gate, [1.985], start=100)
    assert gate.state.ce_best == 1.985
    (transition,) = feed(gate, [1.985 * 1.1005], start=101)
    assert transition.phase == "memorize"


def test_noise_of_ce_raises_the_spike_threshold():
    options = replace(SHORT, duty=1.0, compress_patience=1000, ema=0.5)
    noisy, calm = GatedPhaseTransition(options), GatedPhaseTransition(options)
    wobble = [2.0, 2.0] + [2.0 * (1 + 0.2 * (-1) ** i) for i in range(8)]
    feed(noisy, wobble)
    feed(calm, [2.0] * 10)
    for gate in (noisy, calm):
        gate.force(10, "compress")
        best = gate.state.ce_best
        ended = gate.update(10, best * 1.4, HIGH_MBE)
        assert (ended is None) == (gate is noisy)
    assert noisy.state.ce_variance > 0.01


def test_noise_is_not_learned_from_the_spike_it_must_tell():
    gate = compressing_gate(replace(SHORT, compress_patience=1000, duty=1.0))
    before = gate.state.ce_variance
    feed(gate, [2.1] * 20, start=100)
    assert gate.state.ce_variance == before


def test_compression_ends_after_its_patience_without_a_gain_in_mbe():
    gate = compressing_gate()
    transitions = feed(gate, [2.0] * 6, start=20)
    assert [(t.step, t.phase) for t in transitions] == [(25, "memorize")]
    assert "MBE 1.5" in transitions[0].reason
    assert "6 updates" in transitions[0].reason


def test_compression_goes_on_while_mbe_falls():
    gate = compressing_gate(replace(SHORT, duty=1.0))
    assert feed(gate, [2.0] * 60, [1.5 * 0.98**i for i in range(60)], start=20) == []


def test_mbe_measured_now_and_then_is_held_between():
    gate = compressing_gate(replace(SHORT, duty=1.0))
    mbes = [1.5 * 0.99**i if i % 5 == 0 else None for i in range(40)]
    assert feed(gate, [2.0] * 40, mbes, start=20) == []
    assert gate.state.mbe == 1.5 * 0.99**35


def test_minima_start_afresh_on_a_change_of_phase():
    gate = compressing_gate(replace(SHORT, duty=1.0))
    feed(gate, [2.0] * 5, 1.2, start=20)
    feed(gate, [2.0] * 10, 1.2, start=25)
    assert gate.phase == "memorize"
    assert (gate.state.num_stale, gate.state.mbe_best) == (8, 1.2)
    feed(gate, [3.0] * 300, 1.4, start=40)
    # CE settled 50 % higher: from the old minimum of 2, compression would be left at once as a spike.
    gate.force(400, "compress")
    assert gate.state.ce_best == pytest.approx(3.0, rel=1e-3)
    assert gate.update(400, 3.0, 1.4) is None


def test_a_second_compression_gains_from_where_mbe_has_risen_to():
    gate = compressing_gate(replace(SHORT, duty=1.0))
    feed(gate, [2.0] * 10, 1.0, start=20)
    assert gate.phase == "memorize"
    (begun,) = feed(gate, [2.0] * 8, 1.6, start=30)
    assert begun.phase == "compress"
    assert feed(gate, [2.0] * 20, [1.6 * 0.98**i for i in range(20)], start=40) == []


def test_the_floor_ends_compression_and_keeps_it_from_starting():
    floor = SHORT.floor * math.log(SHORT.patch)
    gate = compressing_gate()
    (transition,) = feed(gate, [2.0], floor * 0.99, start=20)
    assert transition.phase == "memorize"
    assert "floor 0.15" in transition.reason
    assert feed(gate, [2.0] * 50, floor * 0.99, start=30) == []
    (back,) = feed(gate, [2.0], floor * 1.01, start=90)
    assert back.phase == "compress"


def test_compression_does_not_start_before_mbe_was_measured():
    gate = GatedPhaseTransition(SHORT)
    assert feed(gate, [2.0] * 50, None) == []
    assert feed(gate, [2.0], HIGH_MBE, start=50)[0].phase == "compress"


def test_duty_bounds_compression():
    options = replace(SHORT, compress_patience=10_000)
    gate = GatedPhaseTransition(options)
    transitions = feed(gate, [2.0] * 400, [1.5 * 0.999**i for i in range(400)])
    assert [t.phase for t in transitions[:2]] == ["compress", "memorize"]
    assert transitions[1].step == 21
    assert "11 of 22 steps were compression (duty 50%)" in transitions[1].reason


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.5, 4), st.none() | st.floats(0.01, 2.07)), max_size=200),
    st.floats(0, 1),
)
def test_duty_is_never_exceeded(steps, duty):
    gate = GatedPhaseTransition(GateOptions(memorize_patience=3, compress_patience=4, duty=duty, tau_ce=0.5))
    for step, (ce, mbe) in enumerate(steps):
        gate.update(step, ce, mbe)
        assert gate.state.num_compress_steps <= duty * gate.state.num_steps


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.5, 4) | st.just(math.nan), st.none() | st.floats(0.01, 2.07) | st.just(math.nan)),
        min_size=1,
        max_size=80,
    ),
    st.data(),
)
def test_a_gate_restarted_from_its_row_goes_on_exactly(steps, data):
    options = GateOptions(memorize_patience=3, compress_patience=4, tau_ce=0.3, duty=0.8)
    whole = GatedPhaseTransition(options)
    parted = GatedPhaseTransition(options)
    cut = data.draw(st.integers(0, len(steps)))
    for step, (ce, mbe) in enumerate(steps):
        if step == cut:
            row = {**parted.state.to_row(), "ce": 1.0}
            assert all(isinstance(value, float) for value in row.values())
            parted = GatedPhaseTransition(options, GateState.from_row(row))
        assert parted.update(step, ce, mbe) == whole.update(step, ce, mbe)
    assert columns(parted.state) == columns(whole.state)
    assert parted.phase == whole.phase


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_undetermined_ce_moves_nothing_but_the_step_count(bad):
    gate = GatedPhaseTransition(SHORT)
    feed(gate, [2.0] * 5)
    before = gate.state
    gate.update(5, bad, HIGH_MBE)
    assert gate.state == replace(before, last_step=5, num_steps=6)
    assert feed(gate, [bad] * 100, start=6) == []


def test_an_undetermined_mbe_leaves_the_last_one_in_force():
    gate = GatedPhaseTransition(SHORT)
    feed(gate, [2.0, 2.0], [1.5, math.nan])
    assert gate.state.mbe == 1.5


def test_negative_losses_gain_by_falling():
    gate = GatedPhaseTransition(replace(SHORT, ema=0.0))
    assert feed(gate, [-1.0 - 0.05 * i for i in range(60)]) == []
    (transition,) = feed(gate, [-3.95] * 10, start=60)
    assert transition.phase == "compress"
    assert feed(gate, [-3.5], start=90)[0].phase == "memorize"


def test_an_operator_s_phase_is_followed_without_a_transition():
    gate = GatedPhaseTransition(SHORT)
    feed(gate, [2.0] * 5)
    gate.force(5, "compress")
    assert gate.phase == "compress"
    assert gate.weight == SHORT.weight
    assert (gate.state.phase_since, gate.state.num_stale, gate.state.ce_best) == (5, 0, 2.0)
    state = gate.state
    gate.force(6, "compress")
    assert gate.state == state
    gate.force(6, "memorize")
    assert gate.weight == 0.0


def test_a_forced_compression_beyond_the_duty_is_ended_by_it():
    gate = GatedPhaseTransition(SHORT)
    gate.force(0, "compress")
    (transition,) = feed(gate, [2.0], start=0)
    assert transition.phase == "memorize"
    assert "duty" in transition.reason


@pytest.mark.parametrize("step", [3, 4])
def test_steps_must_rise(step):
    gate = GatedPhaseTransition()
    gate.update(4, 2.0)
    with pytest.raises(ValueError, match=f"expected a step after 4, found {step}"):
        gate.update(step, 2.0)


def test_patience_scales_with_the_run():
    options = GateOptions.for_total_steps(10_000)
    assert (options.memorize_patience, options.compress_patience) == (400, 240)
    assert GateOptions.for_total_steps(1).memorize_patience == 1
    unknown = GateOptions.for_total_steps(None)
    assert (unknown.memorize_patience, unknown.compress_patience) == (125, 75)
    with pytest.raises(ConfigError, match="total_steps: expected at least 1, found 0"):
        GateOptions.for_total_steps(0)


def test_defaults_are_those_of_the_preset():
    options = GateOptions()
    assert (options.tau_ce, options.tau_mbe, options.spike, options.spike_sd) == (0.01, 0.01, 0.1, 3)
    assert (options.duty, options.floor, options.weight, options.ema) == (0.5, 0.15, 0.03, 0.95)
    assert options.patch == PATCH_LENGTH


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tau_ce", 1),
        ("tau_mbe", -0.1),
        ("memorize_patience", 0),
        ("compress_patience", 0),
        ("spike", 0),
        ("spike_sd", math.nan),
        ("duty", 1.1),
        ("floor", -1),
        ("weight", 0),
        ("ema", 1),
        ("patch", 1),
    ],
)
def test_a_wrong_option_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected .*found {value}"):
        GateOptions(**{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_ce_ema": None}, "gate_ce_ema: expected a number, found None"),
        ({"gate_num_steps": 1.5}, "gate_num_steps: expected a whole number, found 1.5"),
        ({"gate_num_steps": math.nan}, "gate_num_steps: expected a whole number, found nan"),
        ({"gate_phase": 7.0}, "phase: expected 0 .memorize. or 1 .compress., found 7"),
    ],
)
def test_a_damaged_row_is_refused(change, message):
    row = {name: value for name, value in {**GateState().to_row(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        GateState.from_row(row)
