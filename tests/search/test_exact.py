"""Exact search: as brute force on the CPU, and in the way of accelerators, which branches on no data."""

import logging
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from knnmoe_hf.search import SearchOptions, StoredKeys
from knnmoe_hf.search.exact import FUSED_GROUP
from knnmoe_hf.search.scores import packed
from tests.search.helpers import (
    DTYPES,
    TORCH_IVF,
    K,
    assert_exact,
    clustered,
    engine,
    in_parts,
    random,
    same,
    stored_as,
)


def traced(keys, minima=None, backend="torch", **options):
    """An engine that searches on the CPU in the way of accelerators."""
    built = engine(keys, backend, **options)
    built.traceable = True
    built.group_minima = minima
    return built


def inexact_minima(scaled, codes, half_norms):
    """What the fused kernel returns, with a rounding of its own."""
    scores = half_norms * (1 + 1e-6) - (codes.float() * (scaled * (1 + 1e-6))[:, None]).sum(dim=-1)
    groups = len(codes) // FUSED_GROUP
    least = scores[:, : groups * FUSED_GROUP].unflatten(1, (groups, FUSED_GROUP)).amin(dim=-1)
    return packed(least, FUSED_GROUP * torch.arange(groups))


WAYS = {"cpu": engine, "traced": traced, "fused": lambda keys, **options: traced(keys, inexact_minima, **options)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, k", [(2003, 1), (2003, K), (300, 200), (1, 1)])
def test_it_equals_brute_force(way, rows, k, dtype):
    keys, queries = clustered(rows)
    stored = stored_as(keys, dtype)
    assert_exact(WAYS[way](stored).search(queries[:30], k), queries[:30], stored.floats(slice(None)), min(k, rows))


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_it_equals_brute_force_among_many_near_duplicates(noise):
    keys = clustered(30, spread=1.0)[0].repeat_interleave(60, dim=0) + noise * random(1800, 64, seed=5)
    keys = keys[torch.randperm(1800, generator=torch.Generator().manual_seed(0))]
    queries = keys[:100] + noise * random(100, 64, seed=6)
    assert_exact(engine(keys).search(queries, 4), queries, keys, 4)
    assert_exact(engine(keys).search(queries[:1], 4), queries[:1], keys, 4)


@pytest.mark.parametrize("way", WAYS)
def test_equal_distances_are_in_the_order_of_rows(way):
    keys = clustered(10)[0].repeat(400, 1)
    found = WAYS[way](keys).search(keys[:10], 5)
    assert torch.equal(found.rows, torch.arange(10)[:, None] + 10 * torch.arange(5))
    assert torch.equal(found.distances, torch.zeros(10, 5))
    found = WAYS[way](torch.ones(3000, 8)).search(torch.zeros(2, 8), K)
    assert torch.equal(found.rows, torch.arange(K).repeat(2, 1)) and bool((found.distances == 8).all())


@pytest.mark.parametrize("way, product", [("cpu", "mm"), ("traced", "addmm")])
def test_no_score_matrix_is_larger_than_the_bound(way, product, monkeypatch):
    sizes, real = [], getattr(torch, product)

    def recorded(*args, **kwargs):
        out = real(*args, **kwargs)
        sizes.append(out.nbytes)
        return out

    keys, queries = clustered(5000)
    monkeypatch.setattr(torch, product, recorded)
    found = WAYS[way](keys, search_max_bytes=2**16).search(queries, K)
    assert len(sizes) > 10 and max(sizes) <= 2**16
    assert torch.equal(found.rows, engine(keys).search(queries, K).rows)


def test_rescoring_gathers_no_more_than_the_bound(monkeypatch):
    sizes, square = [], torch.Tensor.square_
    keys, queries = clustered(1000)
    built = engine(keys, search_max_bytes=2**16)
    monkeypatch.setattr(torch.Tensor, "square_", lambda t: sizes.append(t.nbytes) or square(t))
    built.search(queries, K)
    assert sizes and max(sizes) <= 2**16


def test_a_query_finds_the_same_in_any_batch_without_a_look_at_data():
    keys, queries = clustered(1500)
    for stored in (keys, keys[:30].repeat(50, 1)):
        built = traced(stored)
        whole = built.search(queries, 6)
        for size in (1, 7):
            assert same(in_parts(built, queries, 6, size), whole)


def test_a_query_that_is_not_finite_stays_alone_without_a_look_at_data():
    keys, queries = clustered(500)
    queries[3], queries[4] = float("nan"), float("inf")
    found = traced(keys).search(queries, 4)
    others = torch.arange(300) > 4
    assert_exact(type(found)(*(t[others] for t in found)), queries[others], keys, 4)
    assert bool(((found.rows >= 0) & (found.rows < 500)).all()) and bool(found.distances[3:5].isposinf().all())


def test_autocast_and_lower_matmul_precision_change_nothing():
    keys, queries = clustered(2000, spread=0.05)
    built = engine(keys)
    wanted = built.search(queries, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(built.search(queries, K), wanted)
    try:
        torch.set_float32_matmul_precision("medium")
        assert same(built.search(queries, K), wanted)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_in_reduced_precision_find_the_same_rows(precision, monkeypatch):
    """Codes of few digits survive the rounding; here it is done by hand, whatever the processor does."""
    keys, queries = clustered(2000, spread=0.05)
    stored = stored_as(keys, torch.int8)
    wanted, addmm = engine(stored).search(queries, K), torch.addmm

    def rounded(start, left, right, **options):
        return addmm(start, left.bfloat16().float(), right.bfloat16().float(), **options)

    def share() -> float:
        return (traced(stored).search(queries, K).rows == wanted.rows).double().mean().item()

    monkeypatch.setattr("knnmoe_hf.search.exact.SLACK", 0)  # spare candidates would make up for it
    monkeypatch.setattr(torch, "addmm", rounded)
    careless = share()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert share() > 0.99 and careless < 0.95


def test_its_index_is_nothing():
    keys, queries = clustered(300)
    built = engine(keys)
    assert built.tensors() == {}
    again = type(built).from_tensors(StoredKeys(keys), SearchOptions(), {})
    assert same(again.search(queries, K), built.search(queries, K))


@pytest.fixture
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would collect it, slowly
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILERS = [
    "eager",
    pytest.param("aot_eager", marks=pytest.mark.slow),
    pytest.param(
        "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")]
    ),
]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("backend", ["torch", TORCH_IVF])
def test_it_compiles_into_one_graph_that_all_lengths_share(backend, compiler, fresh_compiler):
    keys, queries = clustered(8000, 24, clusters=200)
    built = traced(stored_as(keys, torch.int8), backend=backend)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(lambda asked: built.search(asked, K), backend=counter, fullgraph=True)
    queries[0] = float("nan")
    for length in (1, 5, 130):
        found, wanted = compiled(queries[:length]), built.search(queries[:length], K)
        torch.testing.assert_close(found.distances, wanted.distances)
        assert bool(found.distances[0].isposinf().all())
        assert (found.rows == wanted.rows).double().mean() > 0.999
    assert counter.frame_count <= 3  # a single query, the first length, all others


def test_a_precision_that_is_changed_later_compiles_again(fresh_compiler):
    keys, queries = clustered(1000)
    built, counter = traced(keys), CompileCounter()
    compiled = torch.compile(lambda asked: built.search(asked, K), backend=counter, fullgraph=True)
    wanted = compiled(queries)
    try:
        torch.set_float32_matmul_precision("high")
        found = compiled(queries)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.rows, wanted.rows) and counter.frame_count == 2
