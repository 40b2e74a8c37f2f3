"""Weighing and mixing as pure functions, each against a plain loop."""

import math

import pytest
import torch

from knnmoe_hf.lookup import mixing
from knnmoe_hf.lookup.rules import softmax_topk, softmax_topk_renormalized, topk_softmax

T, K, E, TOP = 5, 4, 8, 2


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def distances():
    return _random(T, K, seed=1).square() * 3


@pytest.fixture
def lam():
    return torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])


@pytest.mark.parametrize("scale, temperature", [(1.0, 1.0), (2.5, 0.3)])
def test_neighbor_weights_are_a_softmax_of_scaled_negative_distances(distances, scale, temperature):
    weights = mixing.neighbor_weights(distances, scale, temperature)
    for t in range(T):
        raw = [math.exp(-d / (temperature * scale)) for d in distances[t].tolist()]
        assert weights[t].tolist() == pytest.approx([r / sum(raw) for r in raw], abs=1e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30])
def test_a_tiny_temperature_leaves_the_nearest_alone(temperature):
    weights = mixing.neighbor_weights(torch.tensor([[3e9, 5e9, 7e9], [2.0, 2.0, 9.0]]), 1.0, temperature)
    assert torch.equal(weights, torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]]))


def test_logits_are_interpolated_and_deltas_added(lam):
    z, m = _random(T, E), _random(T, E, seed=4)
    logits, delta = mixing.interpolate(z, m, lam), mixing.add(z, m, lam)
    for t in range(T):
        for e in range(E):
            a, b, c = z[t, e].item(), m[t, e].item(), lam[t].item()
            assert logits[t, e].item() == pytest.approx((1 - c) * a + c * b, abs=1e-6)
            assert delta[t, e].item() == pytest.approx(a + c * b, abs=1e-6)


@pytest.mark.parametrize("mix", [mixing.interpolate, mixing.add])
def test_mixing_is_in_float32_and_without_confidence_is_the_gate_s_own(mix):
    z = _random(T, E).bfloat16()
    mixed = mix(z, _random(T, E, seed=4), torch.zeros(T))
    assert mixed.dtype == torch.float32 and torch.equal(mixed.bfloat16(), z)


def test_assignments_are_scattered_and_interpolated(lam):
    weights, ids = softmax_topk(_random(T, E), TOP)
    m = _random(T, E, seed=5).softmax(-1)
    mixed = mixing.interpolate(mixing.scatter_assignment(weights, ids, E), m, lam)
    for t in range(T):
        own = [0.0] * E
        for weight, expert in zip(weights[t].tolist(), ids[t].tolist()):
            own[expert] += weight
        c = lam[t].item()
        wanted = [(1 - c) * a + c * b for a, b in zip(own, m[t].tolist())]
        assert mixed[t].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("width", [1, 3, E])
def test_widest_keeps_the_widest_experts_and_the_whole_mass(width):
    assignment = _random(T, E).softmax(-1) * torch.tensor([[0.3], [1.0], [0.7], [2.0], [1e-3]])
    weights, ids = mixing.top_width(assignment, width)
    for t in range(T):
        order = sorted(range(E), key=lambda e: -assignment[t, e].item())[:width]
        assert ids[t].tolist() == order
        kept = [assignment[t, e].item() for e in order]
        mass = assignment[t].sum().item()
        assert weights[t].tolist() == pytest.approx([w * mass / sum(kept) for w in kept], rel=1e-5)
        assert weights[t].sum().item() == pytest.approx(mass, rel=1e-5)


def test_widest_of_an_empty_assignment_is_empty_and_finite():
    weights, _ = mixing.top_width(torch.zeros(2, E), TOP)
    assert torch.equal(weights, torch.zeros(2, TOP))


@pytest.mark.parametrize("rule", [softmax_topk, softmax_topk_renormalized, topk_softmax])
def test_each_space_stores_its_value(rule):
    optimized, z = _random(T, E, seed=6), _random(T, E)
    assert torch.equal(mixing.encode_value("logits", optimized, z, rule, TOP), optimized)
    assert torch.equal(mixing.encode_value("delta", optimized, z, rule, TOP), optimized - z)
    weights, ids = rule(optimized, TOP)
    assignment = mixing.encode_value("assignment", optimized, z, rule, TOP)
    assert assignment.dtype == torch.float32 and int((assignment > 0).sum()) == T * TOP
    for t in range(T):
        for weight, expert in zip(weights[t], ids[t]):
            assert assignment[t, expert] == weight


@pytest.mark.parametrize("space, mix", [("logits", mixing.interpolate), ("delta", mixing.add)])
def test_full_confidence_in_one_neighbour_gives_its_optimised_logits(space, mix):
    z, optimized = _random(1, E), _random(1, E, seed=7)
    value = mixing.encode_value(space, optimized, z, topk_softmax, TOP)
    torch.testing.assert_close(mix(z, value, torch.ones(1)), optimized)
