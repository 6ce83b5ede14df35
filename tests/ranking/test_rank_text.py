import pytest
import torch

from entropy_monitor.errors import ConfigError, EntropyMonitorError
from entropy_monitor.ranking import read_text


def write(path, content):
    path.write_bytes(content)
    return path


def test_without_a_tokenizer_bytes_are_the_tokens(tmp_path):
    sample = read_text(write(tmp_path / "text", "né".encode() * 10), max_tokens=5)
    assert sample.tokens(None).tolist() == [ord("n"), 0xC3, 0xA9, ord("n"), 0xC3]


def test_a_tokenizer_is_given_text_and_its_ids_are_cut(tmp_path):
    sample = read_text(write(tmp_path / "text", b"the cat sat on the mat"), max_tokens=4)
    ids = sample.tokens(lambda text: [len(word) for word in text.split()])
    assert ids.tolist() == [3, 3, 3, 2]
    assert ids.dtype == torch.int64


def test_a_character_cut_by_the_end_of_the_sample_is_left_out(tmp_path):
    # 32 bytes a token are read: 63 letters and the first byte of a two-byte character.
    sample = read_text(write(tmp_path / "text", b"a" * 63 + "é".encode() * 10), max_tokens=2)
    seen = []
    sample.tokens(lambda text: seen.append(text) or [0])
    assert seen == ["a" * 63]


def test_no_more_is_read_than_is_needed(tmp_path):
    sample = read_text(write(tmp_path / "text", b"a" * 100_000), max_tokens=16)
    assert len(sample.content) < 1000


def raise_lines(text):
    raise ValueError("two\n lines")


@pytest.mark.parametrize(
    ("tokenize", "message"),
    [
        (lambda text: [0.5], "list of integers; found .*float"),
        (lambda text: [[1, 2]], r"list of integers; found shape \(1, 2\)"),
        (lambda text: 1 / 0, "the tokenizer raised ZeroDivisionError"),
        (lambda text: "words", "the tokenizer raised"),
        (lambda text: [], "the tokenizer gave none: correct it, or give another --text"),
        (raise_lines, "the tokenizer raised ValueError: two lines: correct it"),
    ],
)
def test_a_tokenizer_that_gives_something_else_is_named(tmp_path, tokenize, message):
    sample = read_text(write(tmp_path / "text", b"text"), max_tokens=16)
    with pytest.raises(EntropyMonitorError, match=message) as raised:
        sample.tokens(tokenize)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_needs_utf_8(tmp_path):
    sample = read_text(write(tmp_path / "text", b"caf\xe9 au lait"), max_tokens=16)
    assert len(sample.tokens(None)) == 12
    with pytest.raises(ConfigError, match="expected UTF-8 text"):
        sample.tokens(list)


def test_a_missing_or_empty_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a readable text file; .*nowhere.*--text"):
        read_text(tmp_path / "nowhere", 16)
    with pytest.raises(ConfigError, match="found an empty file"):
        read_text(write(tmp_path / "text", b""), 16)
    with pytest.raises(ConfigError, match="expected a readable text file"):
        read_text(tmp_path, 16)
