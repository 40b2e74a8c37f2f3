"""Exact search by blocks of a matrix product: the reference for the others, and the one that lives on any device."""

import torch
from torch import Tensor

from knnmoe_hf.search.base import Neighbors, SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.fused import FUSED_GROUP, fused_minima
from knnmoe_hf.search.packed import packed, places_of
from knnmoe_hf.search.scores import half_norms, in_blocks, least_scores, nearest_of_all, rescore

_MORE = 8  # times as many candidates where so many were too few
# relative error of a product whose factors are rounded first: to TF32 on a GPU, to bfloat16
_INPUT_ROUNDING = {"highest": 0.0, "high": 2**-10, "medium": 2**-7}
_GROUP = 16
_ONE_THREAD = 2**20  # numbers of the keys, of more PyTorch makes a product on all threads
_TILE = 256  # queries of one product on an accelerator: a constant, so that graphs of any length are alike
_FEW = 32  # queries for which reading the keys again for each of them takes less time than writing scores


class TorchSearch(SearchEngine):
    """
    Exact neighbours; no temporary is larger than `options.search_max_bytes` (or what a single query needs).

    The rounding of a matrix product depends on its shape, and where many keys nearly coincide it exceeds their
    differences. On the CPU a query's candidates count only if the last of them scores worse than the k-th by more
    than rounding explains; otherwise it is asked again for more, and at last compared with all keys, one by one.

    On an accelerator the host would have to wait for that answer in every layer. There the shapes depend on nothing
    but the number of queries, nothing branches on data, and candidates of equal score are taken in the order of their
    rows; `SLACK` is all that stands between rounding and the answer. Where few queries are asked, a fused kernel
    takes the place of the product if Triton is installed (`knnmoe_hf.search.fused`).

    Attributes:
        traceable: whether the second way is taken. It works on the CPU too.
    """

    def __init__(self, keys: StoredKeys, options: SearchOptions):
        super().__init__(keys, options)
        self.half_norms = half_norms(keys, self.max_bytes)
        self.longest = (2 * self.half_norms.max()).sqrt()
        self.traceable = keys.codes.device.type != "cpu"
        self.minima = fused_minima(keys.codes.device, keys.codes.dtype)

    def _block(self, columns: int) -> int:
        """Rows of the keys per block, for a score matrix of so many columns."""
        return max(1, self.max_bytes // (4 * max(columns, self.keys.width)))

    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        queries = queries.to(self.keys.codes.device)
        if self.traceable:
            return in_blocks(lambda some: self._nearest_traced(some, k, fetch), queries, _TILE)
        return self._in_blocks(queries, k, fetch)

    def _in_blocks(self, queries: Tensor, k: int, fetch: int, again: bool = True) -> Neighbors:
        step = max(1, self.max_bytes // (4 * fetch * self.keys.width))  # rescoring gathers (step, fetch, d)
        return in_blocks(lambda some: self._nearest(some, k, fetch, again), queries, step)

    def _nearest(self, queries: Tensor, k: int, fetch: int, again: bool) -> Neighbors:
        step = self._block(queries.shape[0])
        scores, rows = least_scores(queries, self.keys, self.half_norms, fetch, step)
        found = rescore(queries, self.keys, rows, k, self.max_bytes)
        if fetch == len(self.keys):
            return found
        sure = scores[:, -1] - scores[:, k - 1] > 2 * self._rounding(queries)  # of what is no number nothing is
        if not bool(sure.all()):
            asked, wider = queries[~sure], _MORE * fetch
            if again and wider < len(self.keys):
                better = self._in_blocks(asked, k, wider, again=False)
            else:  # thousands of keys may be equal, as those of a token that every example begins with
                better = nearest_of_all(asked, self.keys, k, self.max_bytes)
            for table, new in zip(found, better):
                table[~sure] = new
        return found

    def _rounding(self, queries: Tensor) -> Tensor:
        """(T,) bound of the rounding errors in a query's scores."""
        unit = _INPUT_ROUNDING[_precision()] + (self.keys.width**0.5 + 4) * 2**-23
        return unit * self.longest * (queries.norm(dim=-1) + self.longest / 2)

    def _nearest_traced(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        """As `_nearest`, without a look at what is found."""
        asked = queries if self.keys.step is None else queries * self.keys.step  # to be multiplied with codes
        if self.minima is not None and queries.shape[0] <= _FEW and len(self.keys) // FUSED_GROUP > fetch:
            rows = self._fused_candidates(asked, fetch)
        else:
            rows = self._candidates(asked, fetch)
        return rescore(queries, self.keys, rows, k, self.max_bytes)

    def _fused_candidates(self, asked: Tensor, fetch: int) -> Tensor:
        """(T, C) all rows of the groups with the least minima, and those behind the last group."""
        minima = self.minima(asked, self.keys.codes, self.half_norms)  # (T, N // FUSED_GROUP)
        first = places_of(minima.topk(fetch, dim=-1, largest=False, sorted=False).values)
        rows = first[..., None] + torch.arange(FUSED_GROUP, device=asked.device)
        behind = torch.arange(minima.shape[1] * FUSED_GROUP, len(self.keys), device=asked.device)
        return torch.cat([rows.flatten(1), behind.expand(len(asked), -1)], dim=-1)

    def _candidates(self, asked: Tensor, fetch: int) -> Tensor:
        """(T, fetch) rows of the least scores, block by block."""
        asked, copies = _whole_factors(asked)
        best = None
        step = self._block(_TILE)
        for start in range(0, len(self.keys), step):
            block = slice(start, start + step)
            codes = self.keys.codes[block].float()
            table = torch.cat([codes] * copies, dim=1) if copies > 1 else codes  # (n, copies * c)
            with torch.autocast(asked.device.type, enabled=False):
                scores = torch.addmm(self.half_norms[block], asked, table.T, alpha=-1)
            found = _least_packed(scores, start, min(fetch, scores.shape[1]))
            if best is not None:
                found = torch.cat([best, found], dim=-1)
                found = found.topk(min(fetch, found.shape[1]), dim=-1, largest=False).values
            best = found
        return places_of(best)

    @property
    def scans_one(self) -> bool:
        return super().scans_one and self.keys.codes.numel() <= _ONE_THREAD

    @property
    def nbytes(self) -> int:
        return self.half_norms.nbytes


def _whole_factors(asked: Tensor) -> tuple[Tensor, int]:
    """
    Factors that a product may round without loss, side by side, and how many times the keys are to be repeated.

    Where products round to TF32, codes of at most 11 binary digits keep theirs; queries are taken apart into two
    numbers that do. Keys that are stored as float32 are rounded all the same.
    """
    if not _products_round():
        return asked, 1
    coarse = asked.bfloat16().float()
    return torch.cat([coarse, asked - coarse], dim=-1), 2


@torch.compiler.assume_constant_result  # compilers watch the setting, but cannot look it up
def _products_round() -> bool:
    return _precision() != "highest"


def _precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer `torch.backends.fp32_precision`, and this way of asking is closed
        return "high"


def _least_packed(scores: Tensor, first: int, k: int) -> Tensor:
    """(T, k) the least of scores (T, n), packed with their rows; column 0 is row `first`."""
    width = scores.shape[1] // _GROUP
    rows = torch.arange(first, first + scores.shape[1], device=scores.device).expand(len(scores), -1)
    if width > k:  # the k least lie in the k groups with the least minima, or behind the last group
        grouped, behind = scores[:, : width * _GROUP].unflatten(1, (width, _GROUP)), scores[:, width * _GROUP :]
        minima = packed(grouped.amin(dim=-1), torch.arange(width, device=scores.device))
        chosen = places_of(minima.topk(k, dim=-1, largest=False, sorted=False).values)[..., None]  # (T, k, 1)
        inside = first + chosen * _GROUP + torch.arange(_GROUP, device=scores.device)  # (T, k, _GROUP)
        rows = torch.cat([inside.flatten(1), rows[:, width * _GROUP :]], dim=-1)
        scores = torch.cat([grouped.gather(1, chosen.expand(-1, -1, _GROUP)).flatten(1), behind], dim=-1)
    return packed(scores, rows).topk(k, dim=-1, largest=False).values
