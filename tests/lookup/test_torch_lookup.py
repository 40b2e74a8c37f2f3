"""What a lookup does to the routes: the formulas by hand, and nothing at all where it should do nothing."""

import math
from dataclasses import replace
from statistics import mean

import pytest
import torch
from torch.nn import functional as F

from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory, detach_memory, disable_memory, native
from knnmoe_hf.lookup.options import KEY_CODECS
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.attach import watch_lookups
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import RoutingHooks
from tests.conftest import PLAIN, random_memory, tiny_model
from tests.support.attaching import routed

SETTINGS = [(space, width) for space in ("logits", "delta") for width in (None, 1, 6)]
SETTINGS += [("assignment", width) for width in (None, 1, 6, "union")]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def empty_memory(model, space: str) -> RoutingMemory:
    tables = {gate.layer: torch.zeros(0, gate.hidden_size) for gate in find_gates(model)}
    values = {gate.layer: torch.zeros(0, gate.num_experts) for gate in find_gates(model)}
    return RoutingMemory.from_rows(KNNMoEConfig(value_space=space), tables, values, model)


def with_options(memory: RoutingMemory, **options) -> RoutingMemory:
    for name, value in options.items():
        setattr(memory.config, name, value)
    return memory


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_where_the_memory_is_off_or_unsure_or_empty_the_model_is_bit_exact(family, implementation, dtype, tokens):
    model = tiny_model(family).to(dtype)
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    base = logits_of(model, tokens)
    for space in ("logits", "delta", "assignment"):
        memory = random_memory(model, value_space=space)
        for width in [width for name, width in SETTINGS if name == space]:
            attach_memory(model, with_options(memory, routing_width=width, gamma=0.3))
            assert not torch.equal(logits_of(model, tokens), base), (space, width)
            with disable_memory(model):
                assert torch.equal(logits_of(model, tokens), base), (space, width)
            detach_memory(model)
            attach_memory(model, with_options(memory, gamma=1e9))  # lambda is 0
            assert torch.equal(logits_of(model, tokens), base), (space, width)
            detach_memory(model)
        attach_memory(model, empty_memory(model, space))
        assert torch.equal(logits_of(model, tokens), base)
        detach_memory(model)


def test_a_token_that_is_sure_of_nothing_keeps_its_own_route_beside_one_that_is(family, dtype):
    """One key is one token's gate input: that token alone is rerouted; the others' routes are theirs to the bit."""
    model = tiny_model(family).to(dtype)
    gate = find_gates(model)[0]
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    own = gate.module(x)
    for space, width in SETTINGS:
        value = torch.arange(8.0)[None] / (28 if space == "assignment" else 1)
        config = KNNMoEConfig(value_space=space, num_neighbors=1, gamma=1e4, routing_width=width, **PLAIN)
        memory = RoutingMemory.from_rows(config, {0: x[2:3].float()}, {0: value}, model)
        attach_memory(model, memory)
        logits, weights, ids = routed(model, x)
        for token in (0, 1, 3, 4, 5):
            assert torch.equal(logits[token], own[0][token])
            assert torch.equal(weights[token, :2], own[1][token]) and torch.equal(ids[token, :2], own[2][token])
            assert not weights[token, 2:].any()
        assert not (torch.equal(weights[2, :2], own[1][2]) and torch.equal(ids[2, :2], own[2][2])), (space, width)
        detach_memory(model)


class Kept:
    """Sums that a token at a time carries on."""

    def __init__(self, tokens):
        self.sums = {key: torch.as_tensor(sums).view(1, 1) for key, sums in tokens.running_sums.items()}

    def carried(self, key):
        return self.sums[key]


def one_by_one(lookup, x, own):
    """GateOutput of a sequence that is decoded token by token; a token's own where the lookup leaves it alone."""
    found, state = [], None
    for part in range(len(x)):
        tokens, mine = Tokens(1, 1, state=state), tuple(table[part : part + 1] for table in own)
        found.append(lookup(x[part : part + 1], mine, tokens) or mine)
        state = Kept(tokens)
    return [torch.cat(parts) for parts in zip(*found)]


@pytest.mark.parametrize("space", ["logits", "delta", "assignment"])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["torch", "hnsw", "faiss", "ivf", "nothing compiled", "ivf, nothing compiled"])
def test_a_token_that_is_no_number_keeps_its_own_route_and_is_like_nothing(backend, gamma, space, monkeypatch):
    """Tokens before, after and beside it find what they find where that token is merely very far off."""
    if "nothing compiled" in backend:
        monkeypatch.setattr(native, "kernels", None)
        backend = "ivf" if "ivf" in backend else "torch"
    model = tiny_model("olmoe")
    options = dict(search_backend=backend, value_space=space, gamma=gamma, confidence="context", half_life=4.0)
    attach_memory(model, random_memory(model, rows=1100, **options, context_threshold=0.5, context_width=0.2))
    gate, lookup = find_gates(model)[0], RoutingHooks.of(model).current[0]
    x = torch.cat([lookup.rows.decoded_keys[::100], lookup.rows.decoded_keys[50:60]])[:18] + 0.05
    for value in (float("nan"), float("inf")):
        found = {}
        for there in (value, 1e17):
            x[8] = there
            with disable_memory(model), torch.no_grad():
                own = gate.module(x)
                found[there] = lookup(x, own, Tokens(3, 6)), own, one_by_one(lookup, x[6:12], [t[6:12] for t in own])
        (routes, own, alone), (wanted, _, alone_wanted) = found.values()
        others = torch.arange(18) != 8
        assert not torch.equal(routes[1][9:12], own[1][9:12]) and not torch.equal(alone[1][3:], own[1][9:12])
        for mine, far, before, one, one_far in zip(routes, wanted, own, alone, alone_wanted):
            assert torch.equal(mine[others], far[others])
            assert torch.equal(one[[0, 1, 3, 4, 5]], one_far[[0, 1, 3, 4, 5]])
            for there in (mine[8], one[2]):
                assert bool(((there == before[8]) | (there.isnan() & before[8].isnan())).all())


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: -values[e])[:count]


def own_rule(z: list[float], width: int, family: str) -> dict[int, float]:
    ids = best(z, width)
    if family == "gpt_oss":
        return dict(zip(ids, softmax([z[e] for e in ids])))
    weights = {e: softmax(z)[e] for e in ids}
    total = sum(weights.values()) if family == "qwen3_moe" else 1.0
    return {e: w / total for e, w in weights.items()}


def retrieve(x: list[float], keys: list[list[float]], count: int, scale: float, tau: float, gamma: float):
    """Neighbours' rows, their weights, and the confidence."""
    distances = [sum((a - b) ** 2 for a, b in zip(x, key)) for key in keys]
    rows = best([-d for d in distances], count)
    weights = softmax([-distances[row] / (tau * scale) for row in rows])
    return rows, weights, mean(math.exp(-gamma * distances[row] / scale) for row in rows)


def expected_route(x, z, memory: RoutingMemory, layer: int, family: str) -> dict[int, float]:
    """One token's {expert: weight} by the formulas of the method, written out."""
    config, rows = memory.config, memory.layers[layer]
    found, weights, lam = retrieve(
        x, rows.decoded_keys.tolist(), config.num_neighbors, rows.scale, config.temperature, config.gamma
    )
    recalled = [sum(w * rows.decoded_values[row, e].item() for row, w in zip(found, weights)) for e in range(8)]
    width = config.routing_width or 2
    if config.value_space == "delta":
        return own_rule([a + lam * b for a, b in zip(z, recalled)], width, family)
    if config.value_space == "logits":
        return own_rule([(1 - lam) * a + lam * b for a, b in zip(z, recalled)], width, family)
    gate = own_rule(z, 2, family)
    mixed = [(1 - lam) * gate.get(e, 0.0) + lam * recalled[e] for e in range(8)]
    kept = best(mixed, 8 if width == "union" else width)
    return {e: mixed[e] * sum(mixed) / sum(mixed[k] for k in kept) for e in kept}


@pytest.mark.parametrize("space, width", SETTINGS)
def test_routes_are_what_the_formulas_say(family, space, width, tokens):
    model = tiny_model(family)
    options = dict(value_space=space, routing_width=width, num_neighbors=5, temperature=0.7, gamma=0.4)
    memory = random_memory(model, rows=30, **options)
    attach_memory(model, memory)
    seen = {}
    for gate in find_gates(model):
        gate.module.register_forward_hook(lambda _, args, out, i=gate.layer: seen.update({i: (args[0], out)}))
    logits_of(model, tokens)
    for gate in find_gates(model):
        x, (_, weights, ids) = seen[gate.layer]
        z = F.linear(x, gate.module.weight, getattr(gate.module, "bias", None))
        for token in range(0, len(x), 3):
            wanted = expected_route(x[token].tolist(), z[token].tolist(), memory, gate.layer, family)
            used = {}
            for expert, weight in zip(ids[token].tolist(), weights[token].tolist()):
                used[expert] = used.get(expert, 0.0) + weight
            used = {expert: weight for expert, weight in used.items() if weight}
            assert used == pytest.approx({e: w for e, w in wanted.items() if w}, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("space", ["logits", "delta"])
def test_the_logits_that_are_passed_on_are_the_mixed_ones(family, space):
    model = tiny_model(family)
    gate = find_gates(model)[0]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    z = gate.module(x)[0]
    config = KNNMoEConfig(value_space=space, num_neighbors=1, gamma=0.0, **PLAIN)  # lambda is 1
    memory = RoutingMemory.from_rows(config, {0: x}, {0: torch.arange(32.0).reshape(4, 8)}, model)
    attach_memory(model, memory)
    wanted = torch.arange(32.0).reshape(4, 8) + (z if space == "delta" else 0)
    torch.testing.assert_close(routed(model, x)[0], wanted)


def test_layers_without_rows_keep_the_gates_routing(model, tokens):
    memory = random_memory(model)
    attach_memory(model, replace(memory, layers={1: memory.layers[1]}))
    gate, other = find_gates(model)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    on = [gate.module(x), routed(model, x, layer=1)]
    with disable_memory(model):
        off = [gate.module(x), other.module(x)]
    assert torch.equal(on[0][0], off[0][0]) and not torch.equal(on[1][0], off[1][0])


def test_fewer_rows_than_neighbours_are_all_used(model, tokens):
    attach_memory(model, random_memory(model, rows=3, num_neighbors=16))
    assert logits_of(model, tokens).isfinite().all()


def test_gradients_reach_the_gate_through_the_mixture(model, tokens):
    for space in ("logits", "delta", "assignment"):
        attach_memory(model, random_memory(model, value_space=space), name=space)
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert all(gate.module.weight.grad.abs().sum() > 0 for gate in find_gates(model))
        detach_memory(model)


@pytest.mark.parametrize("codec", KEY_CODECS)
@pytest.mark.parametrize("key_dtype", ["float32", "int8"])
def test_tokens_are_looked_up_by_what_the_codec_makes_of_them(family, codec, key_dtype, tokens):
    model = tiny_model(family)
    memory = random_memory(model, key_codec=codec, key_dtype=key_dtype, key_dim=10)
    attach_memory(model, memory)
    inputs, found = {}, {}
    for gate in find_gates(model):
        gate.module.register_forward_pre_hook(lambda _, args, i=gate.layer: inputs.update({i: args[0]}))
    with watch_lookups(model, lambda event: found.update({event.layer: event.neighbors})):
        logits_of(model, tokens)
    for gate in find_gates(model):
        encoder, x = memory.layers[gate.layer].encoder, inputs[gate.layer]
        query = x if encoder.weight is None else x @ encoder.weight.T
        if codec == "logits":
            query = F.linear(x, gate.module.weight, getattr(gate.module, "bias", None))
        query = query if encoder.bias is None else query + encoder.bias
        keys = memory.layers[gate.layer].decoded_keys
        wanted = (query.double()[:, None] - keys.double()).square().sum(-1).sort(stable=True)
        neighbors = found[gate.layer]
        torch.testing.assert_close(neighbors.distances.double(), wanted.values[:, :4], rtol=1e-3, atol=1e-3)
        assert (neighbors.rows == wanted.indices[:, :4]).double().mean() > 0.95
