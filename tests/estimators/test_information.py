import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.estimators import (
    mutual_information,
    reference_points,
    shuffled_information,
    soft_assign,
    soft_entropy,
    soft_entropy_estimate,
    soft_temperature,
)

from . import second_soft_entropy as second

NUM_DRAWS = 200
LOG_BINS = math.log(100)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def zipf(num_tokens, num_labels, source):
    return torch.multinomial(1 / torch.arange(1, num_labels + 1.0), num_tokens, replacement=True, generator=source)


class Population:
    """Gaussian tokens around a centre for each of many labels of Zipf frequency; the signal sets the information."""

    def __init__(self, signal, num_features=256, num_labels=50_000):
        self.signal, self.num_labels, self.source = signal, num_labels, generator(1234)
        self.centres = torch.randn(num_labels, num_features, generator=self.source)

    def labels(self, num_tokens):
        return zipf(num_tokens, self.num_labels, self.source)

    def tokens(self, labels, spread=0.0):
        own = torch.randn(len(labels), self.centres.shape[1], generator=self.source)
        shared = torch.randn(len(labels) // 8 + 1, self.centres.shape[1], generator=self.source)
        shared = shared.repeat_interleave(8, dim=0)[: len(labels)]
        return self.signal * self.centres[labels] + math.sqrt(1 - spread) * own + math.sqrt(spread) * shared

    def truth(self, num_labels, num_tokens):
        """H(Z) and the mean H(Z|x) from samples so large that the second-order correction is exact enough."""
        total = sum(soft_assign(self.tokens(self.labels(16384))).double().sum(0) for _ in range(6))
        share = total / total.sum()
        within = [
            soft_entropy_estimate(self.tokens(label.repeat(num_tokens)), patch=1).value
            for label in self.labels(num_labels)
        ]
        return float(-(share * share.log()).sum() - torch.stack(within).double().mean())


@pytest.mark.parametrize("signal", [0.0, 0.15, 0.3, 1.0])
def test_synthetic_truths_are_recovered_where_the_plug_in_is_useless(signal):
    population = Population(signal)
    truth = population.truth(300, 200) / LOG_BINS
    labels = population.labels(16384)
    z = population.tokens(labels)
    found = mutual_information(z, labels, normalize=True)
    assert abs(found.value - truth) < 0.015
    assert found.plug_in - truth > 0.1
    assert found.learned_from == "labels"
    assert abs(shuffled_information(z, labels, normalize=True).value) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plug_in_agrees_with_the_definition_read_aloud(dtype):
    labels = zipf(60, 12, generator())
    z = torch.randn(60, 5, generator=generator(1), dtype=dtype) + labels[:, None]
    p = second.assign(z, reference_points(5, 20), soft_temperature(5, 20))
    found = mutual_information(z, labels, num_bins=20, correction="none")
    assert found.value.dtype == dtype
    assert found.plug_in.item() == pytest.approx(second.information(p, labels), abs=1e-6)
    assert found.value == found.plug_in
    assert (found.bias, found.learned_from) == (0, "none")
    assert (found.num_samples, found.num_labels) == (60, len(labels.unique()))
    normal = mutual_information(z, labels, num_bins=20, correction="none", normalize=True)
    assert float(normal) == pytest.approx(float(found) / math.log(20), rel=1e-5)


def package_accumulator():
    """The public package's accumulator; its command-line module, which alone needs tqdm, is given a stand-in."""
    if "tqdm" not in sys.modules:
        sys.modules["tqdm"] = types.ModuleType("tqdm")
        sys.modules["tqdm.auto"] = types.ModuleType("tqdm.auto")
        sys.modules["tqdm.auto"].tqdm = iter
    return pytest.importorskip(
        "soft_entropy", reason="pip install --no-deps soft-entropy==0.1.5"
    ).SoftEntropyAccumulator


@pytest.mark.parametrize("num_features", [16, 256, 768])
def test_entropy_and_plug_in_agree_with_the_public_package(num_features):
    reference = package_accumulator()(num_features, 100, seed=0, backend="torch")
    population = Population(0.3, num_features, 2000)
    labels = population.labels(4096)
    z = population.tokens(labels)
    reference.update(z, {"x": labels})
    points = {"reference_points": reference.w.cpu(), "mode": "bounds", "normalize": True}
    assert soft_entropy(z, **points).item() == pytest.approx(reference.entropy(), abs=1e-6)
    found = mutual_information(z, labels, correction="none", **points)
    assert found.value.item() == pytest.approx(reference.mutual_information()["x"], abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_plug_in_lies_between_zero_and_both_entropies(num_tokens, num_labels, seed):
    labels = torch.randint(num_labels, (num_tokens,), generator=generator(seed))
    z = torch.randn(num_tokens, 6, generator=generator(seed + 1), dtype=torch.float64)
    found = mutual_information(z, labels, correction="none").value
    shares = torch.bincount(labels) / num_tokens
    assert -1e-9 < found <= soft_entropy(z) + 1e-9
    assert found <= torch.special.entr(shares).sum() + 1e-6
    renamed = mutual_information(z.flip(0), -7 * labels.flip(0), correction="none").value
    assert renamed.item() == pytest.approx(found.item(), abs=1e-9)


def test_leading_dimensions_share_the_labels_and_are_measured_apart():
    labels = zipf(512, 40, generator())
    z = torch.randn(2, 3, 512, 8, generator=generator(1), dtype=torch.float64)
    z[1, 2, 5] = 0
    found = mutual_information(z, labels)
    assert found.value.shape == (2, 3)
    assert found.value.isnan().tolist() == [[False] * 3, [False, False, True]]
    for i, j in ((0, 0), (1, 1)):
        alone = mutual_information(z[i, j], labels)
        for name in ("value", "std_error", "plug_in", "bias"):
            assert getattr(found, name)[i, j].item() == pytest.approx(getattr(alone, name).item(), abs=1e-9)


CASES = {
    "few labels": (0.7, 4, 1024, 1, 0.0),
    "frequent labels": (0.5, 20, 1024, 1, 0.0),
    "rare labels": (0.5, 200, 2048, 1, 0.0),
    "no information": (0.0, 500, 2048, 1, 0.0),
    "patches of like tokens": (0.5, 20, 2048, 8, 0.6),
}


@pytest.mark.parametrize("case", CASES)
def test_standard_errors_match_the_spread_of_draws(case):
    signal, num_labels, num_tokens, patch, spread = CASES[case]
    population = Population(signal, 32, num_labels)
    for correction in ("none", "rarefied"):
        draws = []
        for _ in range(NUM_DRAWS):
            labels = population.labels(num_tokens)
            z = population.tokens(labels, spread)
            found = mutual_information(z, labels, correction=correction, patch=patch)
            draws.append(torch.stack([found.value, found.std_error]))
        values, std_errors = torch.stack(draws).double().mT
        assert 0.7 < std_errors.square().mean().sqrt() / values.std() < 1.4


def test_plug_in_standard_error_is_the_formula_read_aloud():
    labels = zipf(44, 6, generator())
    z = torch.randn(44, 5, generator=generator(1), dtype=torch.float64)
    p = soft_assign(z)
    share = p.mean(0)
    psi = torch.stack([(p[i] * (p[labels == labels[i]].mean(0) / share).log()).sum() for i in range(44)])
    found = mutual_information(z, labels, correction="none", patch=8)
    assert psi.mean().item() == pytest.approx(found.value.item())
    blocks = [float((psi - psi.mean())[i : i + 8].sum()) ** 2 for i in range(0, 44, 8)]
    assert found.std_error.item() == pytest.approx(math.sqrt(sum(blocks)) / 44)


def test_the_bias_subtracted_is_that_of_small_samples():
    """Labels of 2 and of 200 tokens from one distribution: all of the plug-in is bias."""
    labels = torch.cat([torch.arange(1000).repeat_interleave(2), 1000 + torch.arange(20).repeat_interleave(200)])
    z = torch.randn(6000, 24, generator=generator())
    found = mutual_information(z, labels)
    assert found.plug_in > 0.5
    assert abs(found.value) < 3 * found.std_error
    assert abs(found.value) < 0.05 * found.plug_in


@pytest.mark.parametrize("correction", ["rarefied", "none"])
def test_a_single_label_says_exactly_nothing(correction):
    z = torch.randn(3, 256, 24, generator=generator())
    z[1, 7] = math.nan
    found = mutual_information(z, torch.full((256,), 4), correction=correction)
    for figure in found[:4]:
        assert figure[[0, 2]].tolist() == [0, 0]
        assert figure[1].isnan(), "the rows of this one have no entropy"
    assert found.learned_from == "none"


def test_labels_too_rare_to_learn_from_are_judged_by_pooled_groups():
    labels = torch.arange(1024) // 16
    z = torch.randn(1024, 24, generator=generator())
    found = mutual_information(z, labels)
    assert found.learned_from == "pooled groups"
    assert abs(found.value) < 0.05 * found.plug_in
    informed = mutual_information(z + 3 * torch.randn(64, 24, generator=generator(1))[labels], labels)
    assert found.value < informed.value < informed.plug_in


def test_fewer_than_32_tokens_are_undetermined_but_for_the_plug_in():
    found = mutual_information(torch.randn(31, 4, generator=generator()), torch.arange(31) % 2)
    assert found.value.isnan()
    assert found.std_error.isnan()
    assert found.plug_in > 0


def test_periodic_text_does_not_mislead_what_is_learned():
    """Every fourth token of a label is alike: rows taken at even distances would all be the same."""
    z = torch.eye(8).repeat(256, 1)
    labels = torch.arange(2048) // 1024
    found = mutual_information(z, labels)
    assert found.plug_in == pytest.approx(0, abs=1e-6)
    assert abs(found.value) < 0.02


def test_estimates_repeat_and_leave_the_global_generator_alone():
    labels, z = zipf(2048, 100, generator()), torch.randn(2048, 8, generator=generator(1))
    before = torch.random.get_rng_state()
    first, again = mutual_information(z, labels), mutual_information(z, labels)
    assert first == again
    assert shuffled_information(z, labels) == shuffled_information(z, labels)
    assert shuffled_information(z, labels) != shuffled_information(z, labels, shuffle_seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_numpy_and_any_integers_are_accepted():
    labels, z = zipf(64, 4, generator()), torch.randn(64, 8, generator=generator(1))
    expected = mutual_information(z, labels)
    assert mutual_information(z.numpy(), labels.int().numpy() - 100) == expected


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), {}, r"labels: expected 64 integers.*found \(5,\)"),
        (torch.zeros(64), {}, "labels: expected 64 integers.*float32"),
        (torch.zeros(64, dtype=torch.int64), {"correction": "miller"}, "correction: expected rarefied or none"),
        (torch.zeros(64, dtype=torch.int64), {"patch": 0}, "patch: expected at least 1 token"),
    ],
)
def test_bad_arguments_are_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        mutual_information(torch.ones(64, 4), labels, **options)
