"""The formulas of confidence as pure functions, each against a plain loop, for tensors and for floats."""

import math

import pytest
import torch

from knnmoe_hf.lookup.confidence import CalibrationStats, Evidence, InContext, similarity
from knnmoe_hf.lookup.sequence import Tokens

T, K = 5, 4
STATS = CalibrationStats(
    reference_mean=0.7,
    background_mean=0.3,
    weight=2.0,
    threshold=0.6,
    width=0.1,
    scale=1.0,
    gamma=0.3,
    half_life=8.0,
    num_neighbors=4.0,
    reference_drift=0.1,
    background_drift=-0.2,
    min_warmup=0.05,
    open_shift=0.08,
    background_open_shift=0.02,
)


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def distances():
    return _random(T, K, seed=1).square() * 3


@pytest.mark.parametrize("scale, gamma", [(1.0, 1.0), (0.4, 0.2)])
def test_similarity_is_the_mean_over_the_neighbours(distances, scale, gamma):
    lam = similarity(distances, scale, gamma)
    for t in range(T):
        wanted = sum(math.exp(-gamma * d / scale) for d in distances[t].tolist()) / K
        assert lam[t].item() == pytest.approx(wanted, abs=1e-6)


def test_similarity_is_one_on_a_reference_and_zero_far_from_all():
    assert similarity(torch.zeros(1, K), 1.0, 1.0).item() == 1
    assert similarity(torch.full((1, K), 1e6), 1.0, 1.0).item() == 0


@pytest.mark.parametrize("gamma", [0.0, 1e-9, 0.3, 1e9])
def test_nothing_is_like_what_is_infinitely_far(gamma):
    found = similarity(torch.tensor([[math.inf] * 4, [0.0, 0.0, math.inf, math.inf]]), 123.0, gamma)
    assert found.tolist() == [0.0, 0.5]
    assert similarity(torch.full((1, 4), 1e6), 1e-3, 0.0).item() == 1.0


@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.4, 1.0])
def test_evidence_is_where_a_mean_lies_between_background_and_references(warmup):
    w = max(warmup, STATS.min_warmup)
    background, reference = 0.3 - 0.2 * w, 0.7 + 0.1 * w
    for mean, expected in ((background, 0.0), (reference, 1.0), ((background + reference) / 2, 0.5)):
        assert STATS.evidence(mean, warmup) == pytest.approx(expected, abs=1e-6)
        found = STATS.evidence(torch.tensor([mean]), torch.tensor([warmup]))
        assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("evidence", [-1e3, -1.0, 0.55, 0.6, 0.61, 3.0, 1e3])
@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_opening_is_a_sigmoid_around_the_threshold(evidence, weight):
    expected = 1 / (1 + math.exp(min(700.0, -(evidence - 0.6) / 0.1)))
    assert STATS.opening(evidence * weight, weight) == pytest.approx(expected, abs=1e-9)
    assert STATS.opening(torch.tensor(evidence * weight), weight).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("evidence, full", [(-3.0, 0.02), (0.0, 0.02), (0.5, 0.05), (1.0, 0.08), (2.5, 0.08)])
def test_the_shift_is_that_of_background_text_or_of_the_references_as_far_as_the_memory_is_open(evidence, full):
    assert STATS.shift(Evidence(3 * evidence, 3.0, 0.25)) == pytest.approx(full / 4, abs=1e-9)
    before = Evidence(torch.tensor([3 * evidence]), 3.0, torch.tensor([0.25]))
    assert STATS.shift(before).item() == pytest.approx(full / 4, abs=1e-6)
    assert STATS.shift(Evidence()) == 0.0  # of the first layer


def test_numbers_and_tensors_give_the_same_confidence_layer_after_layer():
    layers = [InContext(0, STATS, None), InContext(3, STATS, 0), InContext(4, STATS, 3)]
    for similar in (0.9, 0.62, 0.3, 0.0):
        one, many = Tokens(1, 1), Tokens(1, 1)
        for layer in layers:
            number, tensor = layer(similar, one), layer(torch.tensor([similar]), many)
            assert isinstance(number, float) and tensor.item() == pytest.approx(number, rel=1e-5, abs=1e-6)
            assert number == 0.0 or number > 1e-3
    mixed = Tokens(1, 1)  # layers on several devices: one computes with floats, the next with tensors
    found = [layer(x, mixed) for layer, x in zip(layers, (0.9, torch.tensor([0.9]), 0.9))]
    alone = Tokens(1, 1)
    assert [float(one) for one in found] == pytest.approx([layer(0.9, alone) for layer in layers], rel=1e-5)


def test_confidences_of_no_more_than_a_thousandth_are_zero():
    layer = InContext(0, STATS, None)
    found = layer(torch.linspace(0, 1, 400), Tokens(400, 1))
    assert (found == 0).any() and found[found > 0].min() > 1e-3 and (found > 0.1).any()
