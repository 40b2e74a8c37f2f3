"""Runs the fused kernel in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.search.interpreted_kernel`."""

import torch

from knnmoe_hf.search.cuda import group_minima, is_right, reference_minima
from knnmoe_hf.search.exact import FUSED_GROUP
from knnmoe_hf.search.scores import places_of
from tests.search.helpers import DTYPES, K, clustered, engine, same, stored_as

if __name__ == "__main__":
    for dtype in DTYPES:
        assert is_right(group_minima, torch.device("cpu"), dtype), dtype
    for rows, width, tokens in ((517, 1, 2), (300, 200, 1), (300, 48, 0)):
        keys, queries = clustered(rows, width)
        stored = stored_as(keys, torch.int8)
        arguments = queries[:tokens] * stored.step, stored.codes, stored.floats(slice(None)).square().sum(-1) / 2
        found, wanted = group_minima(*arguments), reference_minima(*arguments)
        assert found.shape == (tokens, rows // FUSED_GROUP) and torch.equal(places_of(found), places_of(wanted))
    keys, queries = clustered(1500, 48)
    product, fused = (engine(stored_as(keys, torch.int8)) for _ in range(2))
    product.traceable = fused.traceable = True
    fused.group_minima = group_minima
    found = fused.search(queries[:3], K)
    assert same(found, product.search(queries[:3], K))
    compiled = torch.compile(lambda asked: fused.search(asked, K), backend="eager", fullgraph=True)
    assert torch.equal(compiled(queries[:3]).rows, found.rows)
    print("as torch")
