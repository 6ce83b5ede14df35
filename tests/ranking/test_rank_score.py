import math
import weakref

import pytest
import torch
from torch import nn

from entropy_monitor.demo.model import ByteGPT, GPTOptions
from entropy_monitor.errors import ConfigError, EntropyMonitorError
from entropy_monitor.estimators import SoftEntropyAccumulator, soft_entropy_estimate
from entropy_monitor.ranking import RankOptions, ngram_labels, score_model

OPTIONS = RankOptions(max_tokens=4096, block=64, batch=4)


def text(num_tokens=1000, alphabet=12, seed=0):
    """A Markov chain: what follows depends on what is here."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(alphabet, alphabet, generator=generator).pow(4)
    ids = [0]
    for _ in range(num_tokens - 1):
        ids.append(int(torch.multinomial(weights[ids[-1]], 1, generator=generator)))
    return torch.tensor(ids)


def byte_gpt():
    torch.manual_seed(0)
    return ByteGPT(GPTOptions(num_layers=2, width=32, num_heads=2, context=64, dropout=0.3))


class Blocks(nn.Module):
    """Any modules as residual blocks behind an embedding."""

    def __init__(self, *blocks, vocabulary=12, width=16):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, ids):
        z = self.embedding(ids)
        for block in self.blocks:
            z = block(z)
        return z


def taps(model):
    return {f"blocks.{index}": block for index, block in enumerate(model.blocks)}


def score(model, ids, options=OPTIONS, **chosen):
    return score_model("model", model, chosen.get("taps", taps(model)), ids, options)


def test_streaming_gives_what_all_activations_at_once_give():
    model, ids = byte_gpt(), text()
    found = score(model, ids)
    blocks = ids[: 15 * 64].reshape(-1, 64)
    kept = {}
    for name, block in taps(model).items():
        block.register_forward_hook(lambda _module, _arguments, output, name=name: kept.update({name: output}))
    with torch.no_grad():
        model.eval()(blocks)
    labels = ngram_labels(ids, 64)
    for layer in found.layers:
        z = kept[layer.layer].flatten(0, 1)
        entropy = soft_entropy_estimate(z, patch=8, normalize=True)
        assert layer.soft_entropy.value == pytest.approx(float(entropy.value), abs=1e-5)
        assert layer.soft_entropy.std_error == pytest.approx(float(entropy.std_error), rel=1e-3)
        at_once = SoftEntropyAccumulator(32, patch=8)
        at_once.update(z, labels)
        for order in (1, 2, 3):
            for side, estimates in (("input", layer.input_information), ("output", layer.output_information)):
                expected = at_once.mutual_information(f"{side}_{order}")
                assert estimates[order - 1].value == pytest.approx(float(expected), abs=1e-5)
                std_error = float(expected.std_error)
                assert estimates[order - 1].std_error == pytest.approx(std_error, abs=1e-5, nan_ok=True)
    assert found.num_tokens == 960


def test_the_batch_size_is_no_matter():
    model, ids = byte_gpt(), text()
    one, many = (score(model, ids, RankOptions(max_tokens=4096, block=64, batch=batch)) for batch in (1, 100))
    assert one.num_tokens == many.num_tokens
    for figure in ("soft_entropy", "optimality", "distance"):
        assert getattr(one, figure).value == pytest.approx(getattr(many, figure).value, abs=1e-5)


def test_a_code_of_the_token_tells_the_input_and_no_more_of_the_output_than_the_text_does():
    independent = torch.randint(12, (4096,), generator=torch.Generator().manual_seed(2))
    model = Blocks(nn.Identity())
    found = score(model, independent)
    assert found.input_information[0].value > 0.3
    # The next token is independent of this one: what is read about it is noise around zero.
    assert abs(found.output_information[0].value) < 4 * found.output_information[0].std_error + 0.01
    chain = score(model, text(4096))
    assert chain.output_information[0].value > found.output_information[0].value + 0.05
    assert chain.optimality.value > found.optimality.value
    assert chain.distance.value == pytest.approx(
        chain.input_information[0].value - chain.output_information[0].value, abs=1e-6
    )


def test_means_over_blocks_are_means():
    found = score(byte_gpt(), text())
    for index in range(3):
        values = [layer.input_information[index].value for layer in found.layers]
        assert found.input_information[index].value == pytest.approx(sum(values) / 2, abs=1e-9)
    for figure in ("value", "std_error"):
        means = [getattr(layer.soft_entropy, figure) for layer in found.layers]
        assert getattr(found.soft_entropy, figure) == pytest.approx(sum(means) / 2)
    ratio = found.output_information[0].value / found.input_information[0].value
    assert found.optimality.value == pytest.approx(ratio)


class Constant(nn.Module):
    def forward(self, z):
        return torch.ones_like(z)


def test_a_block_that_says_nothing_has_no_optimality():
    found = score(Blocks(Constant()), text())
    assert math.isnan(found.optimality.value)
    assert found.input_information[0].value == pytest.approx(0, abs=1e-5)


def test_a_model_whose_activations_are_all_zero_is_undetermined():
    found = score(Blocks(Loud(lambda z: 0 * z)), text())
    assert found.layers[0].num_undetermined == 960
    for estimate in (found.soft_entropy, *found.input_information, *found.output_information, found.optimality):
        assert math.isnan(estimate.value)
        assert not estimate.is_known


def test_one_patch_gives_no_optimality_as_its_error_is_unknown():
    found = score(Blocks(nn.Identity()), text(8), RankOptions(max_tokens=8, block=8))
    assert not found.optimality.is_known
    assert math.isnan(found.optimality.value)


def test_no_activation_outlives_its_forward_pass():
    model = Blocks(nn.Linear(16, 16))
    alive, most = [], 0

    def watch(_module, _arguments, output):
        nonlocal most
        alive.append(weakref.ref(output))
        most = max(most, sum(reference() is not None for reference in alive))

    model.blocks[0].register_forward_hook(watch)
    score(model, text(2000))
    assert len(alive) == 8
    assert most <= 2, "this pass's and the one that the loop still names"
    assert not any(reference() is not None for reference in alive)


def test_nothing_of_the_monitor_is_left_on_the_model_and_random_numbers_are_untouched():
    model = byte_gpt()
    before = torch.random.get_rng_state()
    score(model, text())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(module._forward_hooks for module in model.modules())


class Loud(nn.Module):
    """What some block puts out instead of an activation."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, z):
        return self.change(z)


@pytest.mark.parametrize("wrap", [lambda z: (z, None), lambda z: {"hidden": z}, lambda z: [z]])
def test_the_activation_is_found_in_what_frameworks_return(wrap):
    model = Blocks(Loud(wrap))
    found = score(model, text())
    assert found.optimality == score(Blocks(nn.Identity()), text()).optimality


def run_twice(model):
    inner = model.blocks[0]
    model.blocks = nn.ModuleList([inner, inner])
    return model


def failing(z):
    raise IndexError("index out of range in self")


BAD = {
    "NaN": (lambda: Blocks(Loud(lambda z: z * math.nan)), "expected finite activations; blocks.0 puts out NaN"),
    "no activation": (lambda: Blocks(Loud(lambda z: "text")), "blocks.0 to put out .* found str: choose .*--layers"),
    "lost tokens": (lambda: Blocks(Loud(lambda z: z[:, 1:])), r"blocks.0 to put out \[4, 64, features\]; found shape"),
    "raises": (lambda: Blocks(Loud(failing)), "it raised IndexError: index out of range in self: a --block"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_measured_is_one_line(case):
    make, message = BAD[case]
    model = make()
    with pytest.raises(EntropyMonitorError, match=message) as raised:
        score(model, text())
    assert "\n" not in str(raised.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_that_runs_twice_in_a_pass_is_refused():
    model = run_twice(Blocks(nn.Identity()))
    with pytest.raises(EntropyMonitorError, match="run once in a forward pass; it ran 2 times"):
        score(model, text(), taps={"blocks.0": model.blocks[0]})


def test_a_module_that_never_runs_is_refused():
    model = Blocks(nn.Identity())
    with pytest.raises(EntropyMonitorError, match="idle to run once in a forward pass; it ran 0 times"):
        score(model, text(), taps={"idle": nn.Identity()})


@pytest.mark.parametrize("ids", [torch.full((64,), 12), torch.full((64,), -1)])
def test_ids_that_the_model_does_not_know_are_refused_before_it_runs(ids):
    with pytest.raises(ConfigError, match=r"expected ids from 0 to 11 for model; found .*\(module, tokenize\)"):
        score(Blocks(Loud(failing)), ids)


def test_a_text_shorter_than_a_block_is_refused():
    with pytest.raises(ConfigError, match="at least one block of 64 tokens for model; found 63: give a longer --text"):
        score(byte_gpt(), text(63))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block": 4}, "--block of at least 8; found 4"),
        ({"block": 100}, "multiple of 8; found 100"),
        ({"batch": 0}, "--batch of at least 1; found 0"),
        ({"bins": 1}, "--bins of at least 2; found 1"),
        ({"block": 512, "max_tokens": 511}, "--max-tokens of at least 512; found 511"),
    ],
)
def test_options_are_checked(wrong, message):
    with pytest.raises(ConfigError, match=message):
        RankOptions(**wrong)
