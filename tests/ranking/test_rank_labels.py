import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.estimators import backoff_labels
from entropy_monitor.ranking import ngram_labels


def slow_windows(ids, block):
    """The tokens before and after each position, by lists; what cannot be seen is -1."""
    num_tokens = len(ids) // block * block
    inputs, outputs = [], []
    for position in range(num_tokens):
        start = position // block * block
        seen = ids[start : position + 1][::-1]
        inputs.append((seen + [-1] * 3)[:3])
        outputs.append((ids[position + 1 : position + 4] + [-1] * 3)[:3])
    return torch.tensor(inputs), torch.tensor(outputs)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 5), st.integers(3, 12))
@settings(deadline=None)
def test_windows_end_at_the_block_and_begin_after_the_token(seed, num_blocks, left_over, block):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (num_blocks * block + left_over,), generator=generator)
    inputs, outputs = slow_windows(ids.tolist(), block)
    labels = ngram_labels(ids, block)
    for side, windows in (("input", inputs), ("output", outputs)):
        for order, expected in enumerate(backoff_labels(windows), start=1):
            assert torch.equal(labels[f"{side}_{order}"], expected)
    assert len(labels) == 6
    assert len(labels["input_1"]) == len(ids) // block * block


def test_what_follows_the_last_block_is_an_output():
    labels = ngram_labels(torch.tensor([7, 7, 9]), block=2)
    assert labels["output_1"].tolist() == [0, 1]
    assert ngram_labels(torch.tensor([7, 7]), block=2)["output_1"].tolist() == [1, 0], "nothing is a token of its own"
