"""Search that branches on no data, as accelerators need it: exact all the same, and open to a compiler."""

import logging
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from knnmoe_hf.search.fused import reference_minima
from tests.search.test_search import UNCOMPILED, K, assert_exact, clustered, engine, stored_as

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
COMPILERS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")]
    ),
]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would collect it, slowly
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def traced(keys, minima=None, backend="torch", **options):
    """An engine that searches on the CPU as it does on an accelerator."""
    built = engine(keys, backend, **options)
    built.traceable = True
    built.minima = minima
    return built


def below_a_kernel(asked, codes, half_norms):
    """The fused kernel's contract, with a rounding of its own."""
    return reference_minima(asked * (1 + 1e-6), codes, half_norms * (1 + 1e-6))


@pytest.mark.parametrize("minima", [None, below_a_kernel], ids=["product", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, k", [(2000, 1), (2003, K), (300, 200), (1, 1), (7, K)])
def test_traced_search_equals_brute_force(rows, k, dtype, minima):
    keys, queries = clustered(rows)
    stored = stored_as(keys, dtype)
    assert_exact(
        traced(stored, minima).search(queries[:30], k), queries[:30], stored.floats(slice(None)), min(k, rows)
    )


@pytest.mark.parametrize("minima", [None, below_a_kernel], ids=["product", "fused"])
def test_equal_keys_are_taken_in_the_order_of_their_rows(minima):
    keys = clustered(10)[0].repeat(400, 1)
    found = traced(keys, minima).search(keys[:10], 5)
    assert torch.equal(found.rows, torch.arange(10)[:, None] + 10 * torch.arange(5))
    same = traced(torch.ones(3000, 8), minima).search(torch.zeros(2, 8), K)
    assert torch.equal(same.rows, torch.arange(K).repeat(2, 1))


@pytest.mark.parametrize("max_bytes", [2**16, 2**18, 2**26])
def test_no_score_matrix_of_it_is_larger_than_the_bound(max_bytes, monkeypatch):
    sizes, addmm = [], torch.addmm

    def recorded(*args, **kwargs):
        out = addmm(*args, **kwargs)
        sizes.append(out.nbytes)
        return out

    keys, queries = clustered(5000)
    queries = queries.repeat(4, 1)
    monkeypatch.setattr(torch, "addmm", recorded)
    found = traced(keys, search_max_bytes=max_bytes).search(queries, K)
    assert max(sizes) <= max_bytes
    assert torch.equal(found.rows, engine(keys).search(queries, K).rows)


def test_a_query_finds_the_same_whatever_it_is_asked_with():
    keys, queries = clustered(1500)
    for stored in (keys, keys[:30].repeat(50, 1)):
        built = traced(stored)
        whole = built.search(queries, 6)
        for size in (1, 7, 300):
            parts = [built.search(part, 6) for part in queries.split(size)]
            assert torch.equal(torch.cat([part.distances for part in parts]), whole.distances)
            assert torch.equal(torch.cat([part.rows for part in parts]), whole.rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_not_a_number_stays_alone(value):
    keys, queries = clustered(500)
    queries[3] = value
    found = traced(keys).search(queries, 4)
    others = torch.arange(300) != 3
    assert_exact(type(found)(*(t[others] for t in found)), queries[others], keys, 4)
    assert bool(((found.rows >= 0) & (found.rows < 500)).all())
    assert torch.equal(found.distances[3], torch.full((4,), float("inf")))


def share(found, wanted) -> float:
    return (found.rows == wanted.rows).double().mean().item()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_that_round_their_factors_find_the_same(precision, monkeypatch):
    """Codes of few digits survive the rounding as they are; here it is done by hand, whatever the processor does."""
    keys, queries = clustered(2000, spread=0.05)
    stored = stored_as(keys, torch.int8)
    wanted, addmm = engine(stored).search(queries, K), torch.addmm

    def rounded(start, left, right, **options):
        return addmm(start, left.bfloat16().float(), right.bfloat16().float(), **options)

    monkeypatch.setattr("knnmoe_hf.search.base.SLACK", 0)  # no candidate too many that could make good for it
    monkeypatch.setattr(torch, "addmm", rounded)
    careless = traced(stored).search(queries, K)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    found = traced(stored).search(queries, K)
    assert share(found, wanted) > 0.99 and share(careless, wanted) < 0.95


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("backend", ["torch", UNCOMPILED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_it_compiles_into_one_graph_and_lengths_share_it(backend, compiler, dtype):
    keys, queries = clustered(3000)
    built = traced(stored_as(keys, dtype), backend=backend)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(lambda asked: built.search(asked, K), backend=counter, fullgraph=True)
    queries[0] = float("nan")
    for length in (1, 5, 64, 130):
        found, wanted = compiled(queries[:length]), built.search(queries[:length], K)
        torch.testing.assert_close(found.distances, wanted.distances)
        assert bool(found.distances[0].isposinf().all())
        assert (found.rows == wanted.rows).double().mean() > 0.999
    assert counter.frame_count <= 3  # a single query, the first length, all others


def test_it_takes_a_precision_that_is_changed_later():
    keys, queries = clustered(1000)
    built = traced(keys)
    counter = CompileCounter()
    compiled = torch.compile(lambda asked: built.search(asked, K), backend=counter, fullgraph=True)
    wanted = compiled(queries)
    try:
        torch.set_float32_matmul_precision("high")
        found = compiled(queries)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.rows, wanted.rows)
    assert counter.frame_count == 2
