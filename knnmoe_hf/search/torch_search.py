"""Exact search by blocks of a matrix product: the reference, the default, and the one that lives on any device."""

import torch
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.search.base import Neighbors, SearchEngine, StoredKeys, least_scores, rescore

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

    def __init__(self, keys: StoredKeys, config: KNNMoEConfig):
        super().__init__(keys, config)
        starts = range(0, len(keys), size := self._block(1))
        self.half_norms = torch.cat([keys.floats(slice(i, i + size)).square().sum(-1) / 2 for i in starts])
        self.longest = (2 * self.half_norms.max()).sqrt()

    def _block(self, columns: int) -> int:
        """Rows of the keys per block, for a score matrix of so many columns."""
        return max(1, self.max_bytes // (4 * max(columns, self.keys.width)))

    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        queries = queries.to(self.keys.codes.device)
        step = max(1, self.max_bytes // (4 * fetch * self.keys.width))  # rescoring gathers (step, fetch, d)
        found = [self._nearest(block, k, fetch) for block in queries.split(step)]
        return Neighbors(*(torch.cat(parts) for parts in zip(*found)))

    def _nearest(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        step = self._block(queries.shape[0])
        scores, rows = least_scores(queries, self.keys, self.half_norms, fetch, step)
        found = rescore(queries, self.keys, rows, k, self.max_bytes)
        if fetch == len(self.keys) or queries.device.type != "cpu":
            return found  # elsewhere the host would have to wait for the answer, in every layer
        unsure = scores[:, -1] - scores[:, k - 1] <= 2 * self._rounding(queries)
        if bool(unsure.any()):
            again = self._search(queries[unsure], k, min(_MORE * fetch, len(self.keys)))
            for table, better in zip(found, again):
                table[unsure] = better
        return found

    def _rounding(self, queries: Tensor) -> Tensor:
        """(T,) bound of the rounding errors in a query's scores."""
        unit = _INPUT_ROUNDING[torch.get_float32_matmul_precision()] + (self.keys.width**0.5 + 4) * 2**-23
        return unit * self.longest * (queries.norm(dim=-1) + self.longest / 2)

    @property
    def nbytes(self) -> int:
        return self.half_norms.nbytes
