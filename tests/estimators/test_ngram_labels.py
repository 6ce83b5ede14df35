from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from entropy_monitor.estimators import backoff_labels

TOKENS = arrays.arrays(np.int64, arrays.array_shapes(min_dims=2, max_dims=2, max_side=16), elements=st.integers(-1, 3))


def slow_runs(tokens, order, min_count):
    """The definition, read aloud: for each position the longest frequent run of its nearest tokens."""
    rows = [tuple(row) for row in tokens.tolist()]
    runs = []
    for row in rows:
        lengths = [j for j in range(2, order + 1) if sum(other[:j] == row[:j] for other in rows) >= min_count]
        runs.append(row[: max(lengths, default=1)])
    return runs


@settings(deadline=None)
@given(TOKENS, st.integers(1, 6))
def test_labels_are_the_longest_frequent_runs(tokens, min_count):
    for order, labels in enumerate(backoff_labels(tokens, min_count), start=1):
        runs = slow_runs(tokens, order, min_count)
        assert len(set(zip(runs, labels.tolist(), strict=True))) == len(set(runs)) == len(set(labels.tolist()))


@settings(deadline=None)
@given(TOKENS, st.integers(1, 6))
def test_each_order_refines_the_one_before_and_is_numbered_without_gaps(tokens, min_count):
    labels = backoff_labels(tokens, min_count)
    assert len(labels) == tokens.shape[1]
    for order in labels:
        assert order.unique().tolist() == list(range(int(order.max()) + 1))
    for coarse, fine in pairwise(labels):
        pairs = set(zip(fine.tolist(), coarse.tolist(), strict=True))
        assert len(pairs) == len({label for label, _ in pairs})


def test_large_token_ids_do_not_collide():
    tokens = torch.tensor([[2**62, 2**62], [2**62, -(2**62)], [0, 2**62], [2**62, 2**62]])
    assert [len(labels.unique()) for labels in backoff_labels(tokens, 1)] == [2, 3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_any_integers_are_tokens(dtype):
    assert backoff_labels(torch.tensor([[3], [1], [3]], dtype=dtype))[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("tokens", "min_count", "message"),
    [
        (torch.ones(4, 2), 8, r"tokens: expected integers of shape \[n, k\].*float32"),
        (torch.ones(4, dtype=torch.int64), 8, r"tokens: expected integers.*\(4,\)"),
        (torch.ones(0, 2, dtype=torch.int64), 8, r"none of them 0; found \(0, 2\)"),
        (torch.ones(4, 2, dtype=torch.int64), 0, "min_count: expected at least 1, found 0"),
    ],
)
def test_bad_tokens_are_refused(tokens, min_count, message):
    with pytest.raises(ValueError, match=message):
        backoff_labels(tokens, min_count)
