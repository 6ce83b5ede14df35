import pytest

from entropy_hooks.taps import find_taps
from entropy_monitor.errors import EntropyMonitorError
from entropy_monitor.ranking import RankOptions, find_source, read_text, score_model

from .hugging_face import save_tiny_gpt2

TEXT = "The quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture
def directory(tmp_path):
    save_tiny_gpt2(tmp_path / "gpt2", TEXT)
    return tmp_path / "gpt2"


def test_a_saved_model_is_loaded_with_its_tokenizer_and_measured(directory, tmp_path):
    loaded = find_source(str(directory)).load()
    (tmp_path / "text").write_text(TEXT)
    ids = read_text(tmp_path / "text", 4096).tokens(loaded.tokenize)
    assert len(ids) < len(TEXT) / 2, "byte pairs, not bytes"
    taps = find_taps(loaded.model, None)
    assert list(taps) == ["h.0", "h.1"]
    found = score_model("gpt2", loaded.model, taps, ids, RankOptions(max_tokens=4096, block=64))
    assert found.input_information[0].value > 0.3
    assert found.num_tokens == len(ids) // 64 * 64


def test_a_block_beyond_the_context_is_one_line(directory):
    loaded = find_source(str(directory)).load()
    ids = read_text(directory / "tokenizer.json", 4096).tokens(loaded.tokenize)
    with pytest.raises(
        EntropyMonitorError, match=r"to take ids of shape .*128.*a --block within its context"
    ) as raised:
        score_model("gpt2", loaded.model, find_taps(loaded.model, None), ids, RankOptions(max_tokens=4096, block=128))
    assert "\n" not in str(raised.value)


def test_a_directory_that_transformers_cannot_read_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(EntropyMonitorError, match=r"expected model and tokenizer in .*save_pretrained") as raised:
        find_source(str(tmp_path)).load()
    assert "\n" not in str(raised.value)
