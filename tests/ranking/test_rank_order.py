import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_monitor.ranking import Estimate, ModelScore, rank_scores


def score(name, value, std_error):
    nothing = Estimate(0.0, 0.0)
    return ModelScore(
        name=name,
        num_tokens=8,
        soft_entropy=0.5,
        input_information=(nothing,) * 3,
        output_information=(nothing,) * 3,
        optimality=Estimate(value, std_error),
        distance=nothing,
        layers=(),
    )


def places(*figures):
    ranks = rank_scores([score(str(index), *figure) for index, figure in enumerate(figures)])
    return [(rank.score.name, rank.position, rank.tied) for rank in ranks]


def test_the_highest_optimality_comes_first():
    assert places((0.2, 0.01), (0.4, 0.01), (0.3, 0.01)) == [("1", 1, False), ("2", 2, False), ("0", 3, False)]


def test_what_two_errors_of_the_difference_cover_shares_a_rank_and_the_next_counts_all_before_it():
    assert places((0.30, 0.01), (0.28, 0.01), (0.20, 0.01)) == [("0", 1, True), ("1", 1, True), ("2", 3, False)]
    within, beyond = 2 * math.hypot(0.01, 0.02) - 1e-9, 2 * math.hypot(0.01, 0.02) + 1e-9
    assert [position for _, position, _ in places((0.5, 0.01), (0.5 - within, 0.02))] == [1, 1]
    assert [position for _, position, _ in places((0.5, 0.01), (0.5 - beyond, 0.02))] == [1, 2]


def test_ties_are_with_the_best_of_the_group_and_no_chain():
    # Each is within 2 errors of its neighbour, but the last is not of the first.
    assert [position for _, position, _ in places((0.30, 0.01), (0.28, 0.01), (0.26, 0.01))] == [1, 1, 3]


def test_equal_figures_without_error_tie():
    assert places((0.3, 0.0), (0.3, 0.0)) == [("0", 1, True), ("1", 1, True)]


def test_undetermined_models_have_no_rank_and_come_last():
    assert places((math.nan, math.nan), (0.1, 0.01)) == [("1", 1, False), ("0", None, False)]


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_a_figure_of_unknown_error_is_never_clearly_different(error):
    assert places((0.9, error), (0.1, 0.01), (0.2, error)) == [("1", 1, False), ("0", None, False), ("2", None, False)]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.3)), min_size=1, max_size=8), st.randoms())
def test_the_order_given_decides_nothing_but_the_order_of_equals(figures, random):
    shuffled = figures.copy()
    random.shuffle(shuffled)
    by_value = sorted(figures, reverse=True)
    if len({value for value, _ in figures}) == len(figures):
        assert [position for _, position, _ in places(*shuffled)] == [position for _, position, _ in places(*by_value)]
    positions = [position for _, position, _ in places(*figures)]
    assert positions == sorted(positions)
    assert positions[0] == 1


@pytest.mark.parametrize("count", [1, 3])
def test_every_model_gets_one_place(count):
    assert len(places(*[(0.1, 0.01)] * count)) == count
