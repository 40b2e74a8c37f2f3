"""`NativeLookup` gives what `TorchLookup` gives, to rounding, and a token the same bits alone and among others."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory, native
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.make import Router, make_lookups
from knnmoe_hf.lookup.native_lookup import NativeLookup
from knnmoe_hf.lookup.observers import watching
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.lookup.torch_lookup import TorchLookup
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.search import Neighbors
from tests.builds import BUILDS, use_build_for
from tests.support.attaching import routed
from tests.support.models import random_memory, tiny_model
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

    def carried(self, key):
        return torch.full((1, 1), 2.0 if key[0] is not None else 3.0)


def memory_of(rows: int, num_experts: int = 8, **options) -> tuple[RoutingMemory, list]:
    """A memory with statistics of all kinds, and the model's gates; sizes are multiples of nothing."""
    model = tiny_model(
        "olmoe", hidden_size=HIDDEN, num_attention_heads=1, num_key_value_heads=1, num_experts=num_experts
    )
    gates = find_gates(model)
    generator = torch.Generator().manual_seed(3)
    x = {gate.layer: torch.randn(rows, gate.hidden_size, generator=generator) for gate in gates}
    values = {gate.layer: torch.randn(rows, gate.num_experts, generator=generator).abs() for gate in gates}
    memory = RoutingMemory.from_rows(KNNMoEConfig(key_dim=13, **options), x, values, model)
    drift = dict(reference_drift=-0.1, background_drift=0.2, min_warmup=0.01)
    level = dict(reference_mean=0.9, background_mean=0.1, width=0.3, open_shift=0.05, background_open_shift=0.02)
    return with_stats(memory, {1: dict(weight=2.0)}, **drift, **level), gates


def lookups(rows: int, num_experts: int = 8, **options) -> list[TorchLookup]:
    memory, gates = memory_of(rows, num_experts, **options)
    routers = {gate.layer: Router(gate.rule, gate.top_k) for gate in gates}
    return list(make_lookups(memory.layers, routers, memory.config.retrieval_options()).values())


def output_of(lookup, logits):
    return logits, *lookup.rule(logits, lookup.top_k)


@pytest.mark.parametrize("backend", ["torch", "ivf", "hnsw", "faiss"])
@pytest.mark.parametrize("confidence", ["rbf", "context", "calibrated"])
@pytest.mark.parametrize("space, stored", list(zip(["logits", "delta", "assignment"], STORED)))
def test_one_token_is_routed_as_among_others(space, stored, confidence, backend):
    layers = lookups(1100, value_space=space, confidence=confidence, search_backend=backend, **stored)
    assert all(type(lookup) is NativeLookup for lookup in layers)
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(5))
    own = output_of(layers[0], torch.randn(1, 8, generator=torch.Generator().manual_seed(6)))
    one, both = Tokens(1, 1, state=Carried()), Tokens(2, 1, state=Carried())
    for lookup in layers:
        mine = lookup(x, own, one)
        theirs = lookup(x.repeat(2, 1), tuple(table.repeat(2, 1) for table in own), both)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine[0], theirs[0][:1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mine[1], theirs[1][:1], rtol=1e-5, atol=1e-5)
            assert torch.equal(mine[2], theirs[2][:1])


WIDTHS = [(space, width) for space in ("logits", "delta") for width in (None, 1, 6)]
WIDTHS += [("assignment", width) for width in (None, 1, 6, "union")]


@pytest.mark.parametrize("space, width", WIDTHS)
def test_any_width_has_the_same_slots_alone_and_among_others(space, width):
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model, value_space=space, routing_width=width))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    far = torch.full((1, 32), 1e3)  # unlike all: keeps the gate's own
    for together in (routed(model, x), routed(model, torch.cat([x, far]))):
        assert together[1].shape[1] == together[2].shape[1] == max(2, {None: 2, "union": 8}.get(width, width))
        for token in range(len(x)):
            logits, weights, ids = routed(model, x[token : token + 1])
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


def native_and_torch(monkeypatch, **options) -> tuple[NativeLookup, TorchLookup]:
    options = dict(confidence="rbf", gamma=0.1, search_backend="torch") | options
    in_native = lookups(1100, **options)[0]
    monkeypatch.setattr(native, "kernels", None)
    in_torch = lookups(1100, **options)[0]
    assert type(in_native) is NativeLookup and type(in_torch) is TorchLookup
    return in_native, in_torch


def assert_alike(in_native, in_torch, dtype: torch.dtype, experts: int = 8) -> None:
    generator = torch.Generator().manual_seed(5)
    x, logits = (torch.randn(21, size, generator=generator).to(dtype) for size in (HIDDEN, experts))
    for count in (1, 21):
        own = output_of(in_native, logits[:count])
        found, expected = (lookup(x[:count], own, Tokens(1, count)) for lookup in (in_native, in_torch))
        assert found[0].dtype == dtype and bool((found[0] != own[0]).any() or (found[1] != own[1]).any())
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", ["pca", "raw", "logits"])
def test_every_build_does_what_torch_does_with_every_dtype_and_codec(build, dtype, codec, monkeypatch):
    use_build_for(build, monkeypatch)
    assert_alike(*native_and_torch(monkeypatch, key_codec=codec), dtype)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("stored", STORED, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("space", ["logits", "delta", "assignment"])
def test_every_build_reads_every_form_of_values(build, stored, space, monkeypatch):
    use_build_for(build, monkeypatch)
    assert_alike(*native_and_torch(monkeypatch, value_space=space, **stored), torch.float32)


def test_expert_ids_of_two_bytes_are_read(monkeypatch):
    in_native, in_torch = native_and_torch(monkeypatch, num_experts=300, value_experts=20)
    assert in_native.rows.values.experts.dtype == torch.int16
    assert_alike(in_native, in_torch, torch.float32, experts=300)


def test_tensors_that_are_not_contiguous_are_read_all_the_same():
    lookup = lookups(1100, confidence="rbf", gamma=0.1)[0]
    generator = torch.Generator().manual_seed(5)
    x, logits = (torch.randn(21, size, generator=generator) for size in (HIDDEN, 8))
    turned = [table.T.contiguous().T for table in (x, logits)]
    assert not turned[0].is_contiguous()
    for count in (1, 21):
        found, expected = (
            lookup(x[:count], output_of(lookup, own[:count]), Tokens(1, count)) for x, own in (turned, (x, logits))
        )
        assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("odd", ["double input", "double logits", "parameter"])
def test_tensors_that_native_code_cannot_read_are_computed_in_torch(odd, monkeypatch):
    in_native, in_torch = native_and_torch(monkeypatch)
    x, logits = torch.zeros(3, HIDDEN), torch.zeros(3, 8)
    if odd == "parameter":
        x, logits = torch.nn.Parameter(x), torch.nn.Parameter(logits)
    else:
        x, logits = (x.double(), logits) if odd == "double input" else (x, logits.double())
    found, expected = (lookup(x, output_of(lookup, logits), Tokens(1, 3)) for lookup in (in_native, in_torch))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("codec, stored", list(zip(["pca", "raw", "logits", "pca", "raw"], STORED)))
def test_tokens_get_the_same_bits_alone_and_among_others(build, codec, stored, monkeypatch, four_threads):
    use_build_for(build, monkeypatch)
    lookup = lookups(3000, search_backend="ivf", key_codec=codec, **stored)[0]
    generator = torch.Generator().manual_seed(5)
    x, logits = (torch.randn(93, size, generator=generator) for size in (HIDDEN, 8))

    def steps(some: slice) -> tuple[torch.Tensor, ...]:
        queries = lookup.encode(x[some], logits[some])
        neighbors = lookup.search(queries)
        return queries, *neighbors, lookup.combine(neighbors)

    together = steps(slice(None))
    for token in range(93):
        for alone, among in zip(steps(slice(token, token + 1)), together):
            assert torch.equal(alone[0], among[token])


@pytest.mark.parametrize("count", [1, 5])
def test_gradients_pass_through_the_logits(count):
    lookup = lookups(50, confidence="rbf", gamma=0.1)[0]
    logits = torch.zeros(count, 8, requires_grad=True)
    lookup(torch.randn(count, HIDDEN), output_of(lookup, logits), Tokens(1, count))[1].sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [1, 200])
def test_an_expert_that_does_not_exist_is_an_error(count, four_threads):
    lookup = lookups(50, confidence="rbf", gamma=0.1, value_experts=2)[0]
    lookup.rows.values.experts.fill_(200)
    with pytest.raises(IndexError):
        lookup(torch.randn(count, HIDDEN), output_of(lookup, torch.zeros(count, 8)), Tokens(1, count))


def test_a_row_that_does_not_exist_is_an_error():
    lookup = lookups(50)[0]
    for row in (-1, 50):
        with pytest.raises(IndexError):
            lookup.combine(Neighbors(torch.zeros(3, 1), torch.tensor([[0], [row], [49]])))


def test_neighbors_of_another_dtype_are_refused_before_their_addresses_are_used():
    lookup = lookups(50)[0]
    for distances, rows in (
        (torch.zeros(3, 1).double(), torch.zeros(3, 1).long()),
        (torch.zeros(3, 1), torch.zeros(3, 1).int()),
    ):
        with pytest.raises(TypeError, match="native code cannot read"):
            lookup.combine(Neighbors(distances, rows))


def test_inputs_of_another_shape_or_dtype_are_refused_before_their_addresses_are_used():
    lookup = lookups(50)[0]
    for x in (torch.zeros(2, 4), torch.zeros(2, HIDDEN).double(), torch.zeros(HIDDEN), torch.zeros(2, HIDDEN).int()):
        with pytest.raises(TypeError, match=f"give it rows of {HIDDEN} numbers in float32"):
            lookup.encode(x, torch.zeros(2, 8))


def as_made(lookup: NativeLookup, rows: LayerRows) -> NativeLookup:
    return NativeLookup(lookup.layer, rows, lookup.confidence, lookup.rule, lookup.top_k, lookup.options)


def test_values_and_encoders_that_do_not_fit_the_keys_are_refused():
    lookup = lookups(50)[0]
    with pytest.raises(ValueError, match="10 values do not fit 50 keys"):
        as_made(lookup, replace(lookup.rows, values=lookup.rows.values.select(slice(10))))
    for codec in ("pca", "logits"):
        lookup = lookups(50, key_codec=codec, key_dtype="float32")[0]
        shorter = {name: tensor[:7] for name, tensor in lookup.rows.encoder.tensors().items() if name != "mean"}
        with pytest.raises(ValueError):
            as_made(lookup, replace(lookup.rows, encoder=replace(lookup.rows.encoder, **shorter)))


@pytest.mark.parametrize("experts", [None, 2], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", ["codes", "experts", "default_value", "step", "offset"])
def test_tables_of_tensors_that_do_not_fit_each_other_are_refused(name, experts):
    table = lookups(50, value_dtype="int8", value_experts=experts, num_experts=16)[0].rows.values
    tensors = table.tensors()
    if name not in tensors:
        with pytest.raises(ValueError):
            replace(table, **{name: torch.zeros(50, dtype=torch.float16)})
        return
    right = tensors[name]
    lengths = [right[: len(right) // 2], torch.cat([right, right])] if name != "codes" or experts else []
    widths = [right[:, :1].contiguous()] if right.dim() == 2 else []
    for wrong in (right[:, None], *lengths, *widths):
        with pytest.raises(ValueError, match="ValueTable"):
            replace(table, **{name: wrong})
    if name in ("step", "offset"):
        with pytest.raises(ValueError, match="give step with offset"):
            replace(table, **{name: None})


@pytest.mark.parametrize("name", ["weight", "bias", "mean", "step"])
def test_encoders_of_tensors_that_do_not_fit_each_other_are_refused(name):
    encoder = lookups(50, key_codec="pca", key_dtype="int8")[0].rows.encoder
    right = encoder.tensors()[name]
    for wrong in (right[:-1], torch.cat([right, right]), right[:, None]):
        with pytest.raises(ValueError, match="KeyEncoder"):
            replace(encoder, **{name: wrong})


def test_where_nothing_is_similar_the_gates_own_stays():
    for lookup in lookups(50, confidence="rbf", gamma=1e6):
        x, logits = torch.full((1, HIDDEN), 9.0), torch.zeros(1, 8)
        assert lookup(x, output_of(lookup, logits), Tokens(1, 1)) is None


def test_steps_of_one_sequence_go_on_with_what_came_before():
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model, confidence="context"))
    tokens = torch.randint(96, (1, 14), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        steps = [model(input_ids=token, past_key_values=cache).logits for token in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_copies_and_pickles_compute_the_same_and_are_watched_alone():
    lookup = lookups(1100, search_backend="ivf", confidence="rbf", gamma=0.1)[0]
    x, logits = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)), torch.zeros(3, 8)
    expected, seen = lookup(x, output_of(lookup, logits), Tokens(1, 3)), []
    for twin in (
        copy.copy(lookup),
        pickle.loads(pickle.dumps(lookup)),
        lookup.with_confidence(lookup.confidence, lookup.options),
    ):
        with watching([lookup], seen.append):
            found = twin(x, output_of(twin, logits), Tokens(1, 3))
        assert all(torch.equal(one, other) for one, other in zip(found, expected))
    assert not seen
