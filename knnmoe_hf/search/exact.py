"""Exact search by blocked matrix products, on any device: the reference for all other engines."""

import importlib.util

import torch
from torch import Tensor

from knnmoe_hf.search.base import SLACK, Neighbors, SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.scores import (
    autocast_off,
    half_norms,
    in_blocks,
    least_packed,
    least_scores,
    nearest_of_all,
    places_of,
    rescore,
)

FUSED_GROUP = 32
"""Successive rows whose least score the fused kernel gives."""

_WIDER = 8  # times as many candidates for queries whose first ones were too close to call
# relative error of a product whose factors are rounded first: to TF32 on a GPU, or to bfloat16
_INPUT_ROUNDING = {"highest": 0.0, "high": 2**-10, "medium": 2**-7}
_TILE = 256  # queries of one product on an accelerator, always the same so that graphs of all lengths are alike
_FEW = 32  # queries for which the fused kernel, which reads the keys for each of them, is faster than a product


class TorchSearch(SearchEngine):
    """
    Exact neighbours; no temporary is larger than `options.search_max_bytes` (or what a single query needs).

    A matrix product rounds differently in batches of different size, and where many keys nearly coincide its rounding
    exceeds their differences. On the CPU a query's candidates are accepted only if the last of them scores worse than
    the k-th by more than rounding explains; otherwise more are fetched, and at last all keys are compared by exact
    distances.

    On an accelerator that check would synchronise with the host in every layer. There shapes depend on the number of
    queries only, nothing branches on data, and candidates of equal score are taken in the order of their rows; `SLACK`
    alone protects the answer from rounding. For few queries a fused kernel replaces the product where Triton is
    installed (`knnmoe_hf.search.cuda`).

    Attributes:
        traceable: whether the second way is taken, which the CPU can take too.
        group_minima: the fused kernel, or None.
    """

    def __init__(self, keys: StoredKeys, options: SearchOptions):
        super().__init__(keys, options)
        self.half_norms = half_norms(keys, self.max_bytes)
        self.longest = (2 * self.half_norms.max()).sqrt()
        self.traceable = keys.codes.device.type != "cpu"
        self.group_minima = None
        if keys.codes.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
            from knnmoe_hf.search.cuda import checked_group_minima

            self.group_minima = checked_group_minima(keys.codes.device, keys.codes.dtype)

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        queries, fetch = queries.to(self.keys.codes.device), min(k + SLACK, len(self.keys))
        if self.traceable:
            return in_blocks(lambda some: self._nearest_traced(some, k, fetch), queries, _TILE)
        return self._in_blocks(queries, k, fetch)

    def _block(self, columns: int) -> int:
        """Keys in a block, for a score matrix of so many columns."""
        return max(1, self.max_bytes // (4 * max(columns, self.keys.width)))

    def _in_blocks(self, queries: Tensor, k: int, fetch: int, again: bool = True) -> Neighbors:
        step = max(1, self.max_bytes // (4 * fetch * self.keys.width))  # `rescore` gathers (step, fetch, c)
        return in_blocks(lambda some: self._nearest(some, k, fetch, again), queries, step)

    def _nearest(self, queries: Tensor, k: int, fetch: int, again: bool) -> Neighbors:
        scores, rows = least_scores(queries, self.keys, self.half_norms, fetch, self._block(queries.shape[0]))
        found = rescore(queries, self.keys, rows, k, self.max_bytes)
        if fetch == len(self.keys):
            return found
        sure = scores[:, -1] - scores[:, k - 1] > 2 * self._rounding(queries)  # False where a score is NaN
        if not bool(sure.all()):
            unsure, wider = queries[~sure], _WIDER * fetch
            if again and wider < len(self.keys):
                better = self._in_blocks(unsure, k, wider, again=False)
            else:  # thousands of keys may be equal, such as those of a token that every example begins with
                better = nearest_of_all(unsure, self.keys, k, self.max_bytes)
            for table, new in zip(found, better):
                table[~sure] = new
        return found

    def _rounding(self, queries: Tensor) -> Tensor:
        """(T,) bound of the rounding errors in a query's scores."""
        unit = _INPUT_ROUNDING[_precision()] + (self.keys.width**0.5 + 4) * 2**-23
        return unit * self.longest * (queries.norm(dim=-1) + self.longest / 2)

    def _nearest_traced(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        """`_nearest` without branches on data."""
        scaled = queries if self.keys.step is None else queries * self.keys.step  # to be multiplied with codes
        if self.group_minima is not None and queries.shape[0] <= _FEW and len(self.keys) // FUSED_GROUP > fetch:
            rows = self._fused_candidates(scaled, fetch)
        else:
            rows = self._candidates(scaled, fetch)
        return rescore(queries, self.keys, rows, k, self.max_bytes)

    def _fused_candidates(self, scaled: Tensor, fetch: int) -> Tensor:
        """(T, C) all rows of the groups with the least minima, and those behind the last whole group."""
        minima = self.group_minima(scaled, self.keys.codes, self.half_norms)  # (T, N // FUSED_GROUP)
        first = places_of(minima.topk(fetch, dim=-1, largest=False, sorted=False).values)
        rows = first[..., None] + torch.arange(FUSED_GROUP, device=scaled.device)
        rest = torch.arange(minima.shape[1] * FUSED_GROUP, len(self.keys), device=scaled.device)
        return torch.cat([rows.flatten(1), rest.expand(len(scaled), -1)], dim=-1)

    def _candidates(self, scaled: Tensor, fetch: int) -> Tensor:
        """(T, fetch) rows of the least scores, block by block."""
        factors, copies = _exact_factors(scaled)
        best = None
        step = self._block(_TILE)
        for start in range(0, len(self.keys), step):
            block = slice(start, start + step)
            codes = self.keys.codes[block].float()
            table = torch.cat([codes] * copies, dim=1) if copies > 1 else codes  # (n, copies * c)
            with autocast_off(factors.device):
                scores = torch.addmm(self.half_norms[block], factors, table.T, alpha=-1)
            found = least_packed(scores, start, min(fetch, scores.shape[1]))
            if best is not None:
                found = torch.cat([best, found], dim=-1)
                found = found.topk(min(fetch, found.shape[1]), dim=-1, largest=False).values
            best = found
        return places_of(best)

    @property
    def nbytes(self) -> int:
        return self.half_norms.nbytes


def _exact_factors(scaled: Tensor) -> tuple[Tensor, int]:
    """
    Factors that a product may round without loss, side by side, and how often the keys are to be repeated for them.

    Where products round their factors to TF32, codes of up to 11 bits survive; queries are split into the sum of two
    numbers that do. Keys stored as float32 are rounded all the same.
    """
    if not _products_round():
        return scaled, 1
    coarse = scaled.bfloat16().float()
    return torch.cat([coarse, scaled - coarse], dim=-1), 2


@torch.compiler.assume_constant_result  # torch.compile guards on the setting, but cannot trace reading it
def _products_round() -> bool:
    return _precision() != "highest"


def _precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer `torch.backends.fp32_precision`, after which this getter refuses
        return "high"
