"""Runs the fused kernel in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.search.interpreted`."""

import sys

import torch

import knnmoe_hf
from knnmoe_hf.search.fused import FUSED_GROUP, is_right, reference_minima
from knnmoe_hf.search.packed import places_of
from tests.search.test_search import K, clustered, engine, stored_as

assert knnmoe_hf.__version__ and "knnmoe_hf.search.triton_search" not in sys.modules

from knnmoe_hf.search.triton_search import group_minima  # noqa: E402

SHAPES = ((32, 48, 1), (31, 48, 1), (1000, 48, 3), (517, 1, 2), (300, 200, 0), (300, 200, 2))
DTYPES = (torch.int8, torch.bfloat16, torch.float16, torch.float32)


def minima_are_those_of_torch() -> None:
    for dtype in DTYPES:
        assert is_right(group_minima, torch.device("cpu"), dtype), dtype
        for rows, width, tokens in SHAPES:
            keys, queries = clustered(rows, width)
            stored = stored_as(keys, dtype)
            half_norms = stored.floats(slice(None)).square().sum(-1) / 2
            asked = queries[:tokens] if stored.step is None else queries[:tokens] * stored.step
            found = group_minima(asked, stored.codes, half_norms)
            assert found.shape == (tokens, rows // FUSED_GROUP)
            wanted = reference_minima(asked, stored.codes, half_norms)
            assert torch.equal(places_of(found), places_of(wanted))
            assert bool(((found >> 32) - (wanted >> 32)).abs().max() < 2**10 if found.numel() else True), dtype


def a_search_with_it_finds_what_the_product_finds() -> None:
    keys, queries = clustered(1500, 48)
    for stored in (
        stored_as(keys, torch.int8),
        stored_as(keys, torch.bfloat16),
        stored_as(keys[:15].repeat(100, 1), torch.int8),
    ):
        product, fused = engine(stored), engine(stored)
        product.traceable = fused.traceable = True
        fused.minima = group_minima
        wanted, found = product.search(queries[:6], K), fused.search(queries[:6], K)
        assert torch.equal(found.rows, wanted.rows) and torch.equal(found.distances, wanted.distances)
        alone = fused.search(queries[2:3], K)
        assert torch.equal(alone.rows[0], found.rows[2]) and torch.equal(alone.distances[0], found.distances[2])


def it_compiles_into_one_graph() -> None:
    keys, queries = clustered(1500, 48)
    built = engine(stored_as(keys, torch.int8))
    built.traceable, built.minima = True, group_minima
    compiled = torch.compile(lambda asked: built.search(asked, K), backend="aot_eager", fullgraph=True)
    for length in (1, 4, 6):
        wanted, found = built.search(queries[:length], K), compiled(queries[:length])
        assert torch.equal(found.rows, wanted.rows)


if __name__ == "__main__":
    minima_are_those_of_torch()
    a_search_with_it_finds_what_the_product_finds()
    it_compiles_into_one_graph()
    print("as torch")
