"""Exact search by blocks of a matrix product: the reference, the default, and the one that lives on any device."""

import torch
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.search.base import Neighbors, SearchEngine, rescore

_MORE = 8  # times as many candidates where so many were too few
# relative error of a product whose factors are rounded first: to TF32 on a GPU, to bfloat16
_INPUT_ROUNDING = {"highest": 0.0, "high": 2**-10, "medium": 2**-7}


class TorchSearch(SearchEngine):
    """
    Exact neighbours; no temporary is larger than `config.search_max_bytes` (or what a single query needs).

    The rounding of a matrix product depends on its shape, and where many keys nearly coincide it exceeds their
    differences. So a query's candidates count only if the last of them scores worse than the k-th by more than
    rounding explains; otherwise it is asked again for more.
    """

    def __init__(self, keys: Tensor, config: KNNMoEConfig):
        super().__init__(keys, config)
        self.half_norms = torch.cat([block.float().square().sum(-1) / 2 for block in keys.split(self._block(1))])
        self.longest = (2 * self.half_norms.max()).sqrt()

    def _block(self, columns: int) -> int:
        """Rows of the keys per block, for a score matrix of so many columns."""
        return max(1, self.max_bytes // (4 * max(columns, self.keys.shape[1])))

    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        queries = queries.to(self.keys.device)
        step = max(1, self.max_bytes // (4 * fetch * self.keys.shape[1]))  # rescoring gathers (step, fetch, d)
        found = [self._nearest(block, k, fetch) for block in queries.split(step)]
        return Neighbors(*(torch.cat(parts) for parts in zip(*found)))

    def _nearest(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        scores, rows = self._candidates(queries, fetch)
        found = rescore(queries, self.keys, rows, k, self.max_bytes)
        if fetch == self.keys.shape[0] or queries.device.type != "cpu":
            return found  # elsewhere the host would have to wait for the answer, in every layer
        unsure = scores[:, -1] - scores[:, k - 1] <= 2 * self._rounding(queries)
        if bool(unsure.any()):
            again = self._search(queries[unsure], k, min(_MORE * fetch, self.keys.shape[0]))
            for table, better in zip(found, again):
                table[unsure] = better
        return found

    def _rounding(self, queries: Tensor) -> Tensor:
        """(T,) bound of the rounding errors in a query's scores."""
        unit = _INPUT_ROUNDING[torch.get_float32_matmul_precision()] + (self.keys.shape[1] ** 0.5 + 4) * 2**-23
        return unit * self.longest * (queries.norm(dim=-1) + self.longest / 2)

    def _candidates(self, queries: Tensor, fetch: int) -> tuple[Tensor, Tensor]:
        """The least scores `|key|^2 / 2 - query . key` (T, fetch), ascending, and their rows, block by block."""
        best, rows, size = None, None, self._block(queries.shape[0])
        for start in range(0, self.keys.shape[0], size):
            block = self.keys[start : start + size].float()
            with torch.autocast(block.device.type, enabled=False):
                scores = torch.addmm(self.half_norms[start : start + size], queries, block.T, alpha=-1)  # (T, n)
            values, ids = scores.topk(min(fetch, block.shape[0]), dim=-1, largest=False)
            ids = ids + start
            if best is not None:
                values, ids = torch.cat([best, values], dim=-1), torch.cat([rows, ids], dim=-1)
                values, order = values.topk(min(fetch, values.shape[1]), dim=-1, largest=False)
                ids = ids.gather(-1, order)
            best, rows = values, ids
        return best, rows

    @property
    def nbytes(self) -> int:
        return self.half_norms.nbytes
