"""Compiled code on the CPU gives what PyTorch gives, and a token the same alone and among others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory, native
from knnmoe_hf.lookup.codecs import KeyEncoder
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.make import make_confidences
from knnmoe_hf.lookup.native_lookup import CompiledRecall
from knnmoe_hf.lookup.sequence import Recurrence, Tokens
from knnmoe_hf.lookup.torch_lookup import TorchLookup
from knnmoe_hf.lookup.values import ValueTable
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.search import Neighbors
from knnmoe_hf.search.exact import TorchSearch
from tests.builds import LEVELS, use_build_for
from tests.conftest import random_memory, tiny_model
from tests.support.stats import with_stats

STORED = [
    dict(value_dtype=dtype, value_experts=experts, key_dtype=keys)
    for dtype, experts, keys in (
        ("int8", 2, "int8"),
        ("int8", None, "float16"),
        ("float16", 3, "bfloat16"),
        ("float16", None, "int8"),
        ("float32", None, "float32"),
    )
]


HIDDEN = 38


class Carried:
    """Sequences that go on after sums that were at these values."""

    def carried(self, series):
        return torch.full((1, 1), self.carried_one(series))

    def carried_one(self, series):
        return 2.0 if series[0] is not None else 3.0


def lookups(rows: int, num_experts: int = 8, **options) -> list[TorchLookup]:
    """Of both layers of a memory with stats of all kinds; sizes are multiples of nothing."""
    model = tiny_model(
        "olmoe", hidden_size=HIDDEN, num_attention_heads=1, num_key_value_heads=1, num_experts=num_experts
    )
    gates = find_gates(model)
    generator = torch.Generator().manual_seed(3)
    x = {gate.layer: torch.randn(rows, gate.hidden_size, generator=generator) for gate in gates}
    values = {gate.layer: torch.randn(rows, gate.num_experts, generator=generator).abs() for gate in gates}
    config = KNNMoEConfig(key_dim=13, **options)
    memory = RoutingMemory.from_rows(config, x, values, model)
    drift = dict(
        reference_mean=0.9,
        background_mean=0.1,
        reference_drift=-0.1,
        background_drift=0.2,
        min_warmup=0.01,
        width=0.3,
        open_shift=0.05,
    )
    memory = with_stats(memory, {1: dict(weight=2.0)}, **drift)
    confidences = make_confidences(memory.layers, memory.config)
    asked = [(gate.layer, memory.layers[gate.layer], confidences[gate.layer]) for gate in gates]
    return [TorchLookup(*one, gate.rule, gate.top_k, memory.config) for one, gate in zip(asked, gates)]


def routed(layers, x, routes, tokens):
    return [lookup(x, routes, tokens) for lookup in layers]


@pytest.mark.parametrize("backend", ["torch", "ivf", "hnsw", "faiss"])
@pytest.mark.parametrize("confidence", ["rbf", "context", "calibrated"])
@pytest.mark.parametrize("stored", STORED, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("space", ["logits", "delta", "assignment"])
def test_one_token_is_routed_as_among_others(space, stored, confidence, backend):
    layers = lookups(1100, value_space=space, confidence=confidence, search_backend=backend, **stored)
    rule = layers[0].rule
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(5))
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(6))
    routes = (logits, *rule(logits, 2))
    pair = tuple(table.repeat(2, 1) for table in routes)
    one = routed(layers, x, routes, Tokens(1, 1, state=Carried()))
    tokens = Tokens(2, 1, state=Carried())
    both = routed(layers, x.repeat(2, 1), pair, tokens)
    for mine, theirs in zip(one, both):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine[0], theirs[0][:1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mine[1], theirs[1][:1], rtol=1e-5, atol=1e-5)
            assert torch.equal(mine[2], theirs[2][:1])


WIDTHS = [(space, width) for space in ("logits", "delta") for width in (None, 1, 6)]
WIDTHS += [("assignment", width) for width in (None, 1, 6, "union")]


@pytest.mark.parametrize("space, width", WIDTHS)
@pytest.mark.parametrize("backend", ["torch", "ivf"])
def test_routes_of_any_width_have_the_same_slots_alone_and_among_others(backend, space, width):
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model, value_space=space, routing_width=width, search_backend=backend))
    gate = find_gates(model)[0].module
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    far = torch.full((1, 32), 1e3)  # unlike all: keeps the gate's own route
    for together in (gate(x), gate(torch.cat([x, far]))):
        assert together[1].shape[1] == together[2].shape[1] == max(2, {None: 2, "union": 8}.get(width, width))
        for token in range(len(x)):
            logits, weights, ids = gate(x[token : token + 1])
            assert torch.equal(ids[0], together[2][token])
            assert torch.equal(weights[0] == 0, together[1][token] == 0)
            torch.testing.assert_close(weights[0], together[1][token], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(logits[0], together[0][token], rtol=1e-5, atol=1e-5)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def compiled_and_plain(monkeypatch, **options) -> tuple[TorchLookup, TorchLookup]:
    """The same lookup as it was compiled, and in PyTorch."""
    compiled = lookups(1100, confidence="rbf", gamma=0.1, search_backend="torch", **options)[0]
    monkeypatch.setattr(native, "kernels", None)
    plain = lookups(1100, confidence="rbf", gamma=0.1, search_backend="torch", **options)[0]
    assert compiled.compiled is not None and plain.compiled is None
    return compiled, plain


def assert_alike(compiled: TorchLookup, plain: TorchLookup, dtype: torch.dtype, experts: int = 8) -> None:
    generator = torch.Generator().manual_seed(5)
    x, logits = (torch.randn(21, size, generator=generator).to(dtype) for size in (HIDDEN, experts))
    for count in (1, 21):
        own = logits[:count]
        routes = (own, *plain.rule(own, 2))
        found, wanted = (lookup(x[:count], routes, Tokens(1, count)) for lookup in (compiled, plain))
        assert found[0].dtype == dtype and bool((found[0] != own).any() or (found[1] != routes[1]).any())
        torch.testing.assert_close(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", ["pca", "raw", "logits"])
@pytest.mark.parametrize("space", ["logits", "delta"])
def test_every_build_does_what_pytorch_does_with_every_dtype_and_codec(level, dtype, codec, space, monkeypatch):
    use_build_for(level, monkeypatch)
    assert_alike(*compiled_and_plain(monkeypatch, key_codec=codec, value_space=space), dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stored", STORED, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("space", ["logits", "delta", "assignment"])
def test_every_build_reads_every_form_of_values(level, stored, space, monkeypatch):
    use_build_for(level, monkeypatch)
    assert_alike(*compiled_and_plain(monkeypatch, value_space=space, **stored), torch.float32)


def test_experts_of_two_bytes_are_read(monkeypatch):
    compiled, plain = compiled_and_plain(monkeypatch, num_experts=300, value_experts=20)
    assert compiled.rows.values.experts.dtype == torch.int16
    assert_alike(compiled, plain, torch.float32, experts=300)


def test_what_lies_in_another_order_is_read_all_the_same(monkeypatch):
    compiled, _ = compiled_and_plain(monkeypatch)
    generator = torch.Generator().manual_seed(5)
    x, logits = (torch.randn(21, size, generator=generator) for size in (HIDDEN, 8))
    turned = [table.T.contiguous().T for table in (x, logits)]
    assert not turned[0].is_contiguous()
    for count in (1, 21):
        found, wanted = (
            compiled(x[:count], (own[:count], *compiled.rule(own[:count], 2)), Tokens(1, count))
            for x, own in (turned, (x, logits))
        )
        assert torch.equal(found[0], wanted[0])


def test_what_was_not_compiled_for_is_left_to_pytorch():
    compiled = lookups(50)[0].compiled
    x, logits = torch.zeros(2, HIDDEN), torch.zeros(2, 8)
    assert compiled.takes(x, logits)
    for odd in (x.double(), x[:, 1:], x.to("meta"), torch.nn.Parameter(x)):
        assert not compiled.takes(odd, logits)
    for odd in (logits.double(), logits[:, 1:], logits.to("meta"), torch.nn.Parameter(logits)):
        assert not compiled.takes(x, odd)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("codec", ["pca", "raw", "logits"])
@pytest.mark.parametrize("stored", STORED, ids=lambda options: "-".join(map(str, options.values())))
def test_tokens_get_the_same_bits_alone_and_among_others(level, codec, stored, monkeypatch, four_threads):
    use_build_for(level, monkeypatch)
    lookup = lookups(3000, search_backend="ivf", key_codec=codec, **stored)[0]
    generator = torch.Generator().manual_seed(5)
    x, logits = (torch.randn(93, size, generator=generator) for size in (HIDDEN, 8))

    def recalled(some: slice) -> tuple[torch.Tensor, ...]:
        query = lookup.compiled.query(x[some], logits[some])
        found = lookup.engine.search(query, 16)
        return query, *found, lookup.compiled.recall(found)

    together = recalled(slice(None))
    for token in range(93):
        only = slice(token, token + 1)
        for alone, among in zip(recalled(only), together):
            assert torch.equal(alone[0], among[token])
        step = lookup.compiled.recall_one(x[only], logits[only], 0.5)
        assert torch.equal(lookup.compiled.values_of_one(step)[0], together[3][token])
        assert step.similar == pytest.approx(torch.exp(-0.5 * together[1][token]).mean().item(), rel=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_memories_of_other_sizes_share_a_threads_room(level, monkeypatch):
    use_build_for(level, monkeypatch)
    asked = []
    for rows, experts in ((6000, 9), (9000, 5)):
        lookup = lookups(rows, experts, search_backend="ivf", key_codec="logits")[0]
        assert lookup.engine.sketch is not None
        logits = torch.randn(20, experts, generator=torch.Generator().manual_seed(5))
        found = lookup.engine.search(lookup.compiled.query(torch.zeros(20, HIDDEN), logits), 16)
        asked.append((lookup.compiled, logits, lookup.compiled.recall(found)))
    for token in range(20):
        for compiled, logits, together in asked:
            step = compiled.recall_one(torch.zeros(1, HIDDEN), logits[token : token + 1], 0.5)
            assert torch.equal(compiled.values_of_one(step)[0], together[token])


def test_numbers_are_rounded_as_pytorch_rounds_them():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.empty(1, 4096).uniform_(-9, 5.5, generator=generator)
    values = torch.randn(1, 4096, generator=generator) * 10**sizes
    values[0, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 65520.0])
    table = LayerRows(
        torch.zeros(3, 1), KeyEncoder(), ValueTable(4096, values.repeat(3, 1)), torch.zeros(0, 1), 1.0, 1
    )
    config = KNNMoEConfig(value_space="delta", num_neighbors=1)
    compiled = CompiledRecall(table, TorchSearch(table.stored_keys, config), config)
    for dtype in (torch.bfloat16, torch.float16):
        logits = torch.zeros(1, 4096, dtype=dtype)
        found = compiled.mix_one(compiled.recall_one(torch.zeros(1, 1), logits, 1.0), logits, 1.0)
        assert torch.equal(found.nan_to_num(7.0), values.to(dtype).nan_to_num(7.0))
        assert torch.equal(found.isnan(), values.to(dtype).isnan())


@pytest.mark.parametrize("count", [1, 5])
def test_gradients_pass(count):
    layers = lookups(50, confidence="rbf", gamma=0.1)
    logits = torch.zeros(count, 8, requires_grad=True)
    found = layers[0](torch.randn(count, HIDDEN), (logits, *layers[0].rule(logits, 2)), Tokens(1, count))
    found[1].sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [1, 200])
def test_an_expert_that_is_not_there_is_an_error(count, four_threads):
    layers = lookups(50, confidence="rbf", gamma=0.1, value_experts=2)
    layers[0].rows.table.experts.fill_(200)
    logits = torch.zeros(count, 8)
    with pytest.raises(IndexError, match="no such expert"):
        layers[0](torch.randn(count, HIDDEN), (logits, *layers[0].rule(logits, 2)), Tokens(1, count))


def test_too_few_candidates_are_an_error(monkeypatch):
    lookup = lookups(1100, search_backend="hnsw")[0]
    monkeypatch.setattr(lookup.engine, "propose", lambda query, k: np.arange(k - 1))
    logits = torch.zeros(1, 8)
    with pytest.raises(ValueError, match="fewer rows were found than are wanted"):
        lookup(torch.randn(1, HIDDEN), (logits, *lookup.rule(logits, 2)), Tokens(1, 1))


def test_values_that_are_not_of_the_keys_are_refused():
    lookup = lookups(50)[0]
    rows = replace(lookup.rows, values=lookup.rows.values.select(slice(10)))
    with pytest.raises(ValueError, match="10 values do not fit 50 keys"):
        CompiledRecall(rows, lookup.engine, lookup.config)


@pytest.mark.parametrize("experts", [None, 2], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", ["codes", "experts", "default_value", "step", "offset"])
def test_tables_of_tensors_that_do_not_fit_each_other_are_refused(name, experts):
    table = lookups(50, value_dtype="int8", value_experts=experts, num_experts=16)[0].rows.table
    tensors = table.tensors()
    if name not in tensors:
        with pytest.raises(
            ValueError, match="give step with offset, and default_value with experts|does not fit the rest"
        ):
            replace(table, **{name: torch.zeros(50, dtype=torch.float16)})
        return
    right = tensors[name]
    lengths = [right[: len(right) // 2], torch.cat([right, right])] if name != "codes" or experts else []
    widths = [right[:, :1].contiguous()] if right.dim() == 2 else []
    for wrong in (right[:, None], *lengths, *widths):
        with pytest.raises(ValueError, match="does not fit the rest of a ValueTable: make it"):
            replace(table, **{name: wrong})
    if name in ("step", "offset"):
        with pytest.raises(ValueError, match="give step with offset"):
            replace(table, **{name: None})


@pytest.mark.parametrize("name", ["weight", "bias", "mean", "step"])
def test_encoders_of_tensors_that_do_not_fit_each_other_are_refused(name):
    encoder = lookups(50, key_codec="pca", key_dtype="int8")[0].rows.encoder
    right = encoder.tensors()[name]
    for wrong in (right[:-1], torch.cat([right, right]), right[:, None]):
        with pytest.raises(ValueError, match="does not fit the rest of a KeyEncoder: make it"):
            replace(encoder, **{name: wrong})


@pytest.mark.parametrize("codec", ["pca", "logits"])
def test_queries_that_are_not_of_the_keys_width_are_refused(codec):
    lookup = lookups(50, key_codec=codec, key_dtype="float32")[0]
    shorter = {name: tensor[:7] for name, tensor in lookup.rows.encoder.tensors().items() if name != "mean"}
    rows = replace(lookup.rows, encoder=replace(lookup.rows.encoder, **shorter))
    with pytest.raises(ValueError, match="queries of 7 dimensions do not fit keys of"):
        CompiledRecall(rows, lookup.engine, lookup.config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_sums_of_another_dtype_are_left_to_pytorch(dtype):
    sums = Recurrence(torch.full((1, 6), 0.5))(torch.ones(1, 6, dtype=dtype))
    torch.testing.assert_close(sums.float(), torch.tensor([[1, 1.5, 1.75, 1.875, 1.9375, 1.96875]]), atol=1e-2, rtol=0)


def test_a_reach_without_lists_is_refused():
    index = native.kernels.Index(torch.zeros(3, 2), None)
    with pytest.raises(ValueError, match="call look_into first"):
        index.set_reach(5, 5)


def test_a_row_that_is_not_there_is_an_error():
    compiled = lookups(50)[0].compiled
    for row in (-1, 50):
        with pytest.raises(IndexError, match="no such row"):
            compiled.recall(Neighbors(torch.zeros(3, 1), torch.tensor([[0], [row], [49]])))


def test_padding_and_other_layouts_take_the_long_way():
    assert Tokens(1, 1).is_one and Tokens(1, 1, real=torch.ones(1, dtype=torch.bool)).is_one
    assert not Tokens(1, 1, real=torch.zeros(1, dtype=torch.bool)).is_one
    assert not Tokens(1, 2).is_one and not Tokens(2, 1).is_one


def test_where_nothing_is_similar_the_route_is_the_gates_own():
    layers = lookups(50, confidence="rbf", gamma=1e6)
    x, logits = torch.full((1, HIDDEN), 9.0), torch.zeros(1, 8)
    assert routed(layers, x, (logits, *layers[0].rule(logits, 2)), Tokens(1, 1)) == [None, None]


def test_steps_of_one_sequence_go_on_with_what_came_before():
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model, confidence="context"))
    tokens = torch.randint(96, (1, 14), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        steps = [model(input_ids=token, past_key_values=cache).logits for token in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)
