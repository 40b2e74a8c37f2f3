"""Exact search by blocks of a matrix product: the reference, the default, and the one that lives on any device."""

import torch
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.search.base import Neighbors, SearchEngine, rescore


class TorchSearch(SearchEngine):
    """Exact neighbours; no temporary is larger than `config.search_max_bytes` (or what a single query needs)."""

    def __init__(self, keys: Tensor, config: KNNMoEConfig):
        super().__init__(keys, config)
        self.max_bytes = config.search_max_bytes
        self.half_norms = torch.cat([block.float().square().sum(-1) / 2 for block in keys.split(self._block(1))])

    def _block(self, columns: int) -> int:
        """Rows of the keys per block, for a score matrix of so many columns."""
        return max(1, self.max_bytes // (4 * max(columns, self.keys.shape[1])))

    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        queries = queries.to(self.keys.device)
        step = max(1, self.max_bytes // (4 * fetch * self.keys.shape[1]))  # rescoring gathers (step, fetch, d)
        found = [rescore(block, self.keys, self._candidates(block, fetch), k) for block in queries.split(step)]
        return Neighbors(*(torch.cat(parts) for parts in zip(*found)))

    def _candidates(self, queries: Tensor, fetch: int) -> Tensor:
        """Rows (T, fetch) with the least `|key|^2 / 2 - query . key`, block by block."""
        best, rows, size = None, None, self._block(queries.shape[0])
        for start in range(0, self.keys.shape[0], size):
            block = self.keys[start : start + size].float()
            scores = torch.addmm(self.half_norms[start : start + size], queries, block.T, alpha=-1)  # (T, n)
            values, ids = scores.topk(min(fetch, block.shape[0]), dim=-1, largest=False)
            ids = ids + start
            if best is not None:
                values, ids = torch.cat([best, values], dim=-1), torch.cat([rows, ids], dim=-1)
                values, order = values.topk(min(fetch, values.shape[1]), dim=-1, largest=False)
                ids = ids.gather(-1, order)
            best, rows = values, ids
        return rows

    @property
    def nbytes(self) -> int:
        return self.half_norms.nbytes
