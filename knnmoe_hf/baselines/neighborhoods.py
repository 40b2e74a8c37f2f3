"""Which references are near a question: embeddings by the model itself, and Gaussian weights of the nearest."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knnmoe_hf.models.gates import find_decoder, find_gates
from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.models.offload import input_device


@torch.no_grad()
def embedded(model: nn.Module, sequences: Sequence[tuple[int, ...]]) -> Tensor:
    """The mean of the last hidden states over each sequence of token ids, (n, d) float32 on the CPU."""
    decoder, device = find_decoder(model, find_gates(model)), input_device(model)
    with evaluating(model):
        found = [
            decoder(input_ids=torch.tensor([ids], device=device), use_cache=False).last_hidden_state[0].float().mean(0)
            for ids in sequences
        ]
    return torch.stack(found).cpu()


class Neighborhood:
    """
    The nearest entries of a table, and how much each counts.

    Args:
        table: (n, d) float32.
        k: neighbours of a query; fewer if there are not as many.

    Attributes:
        sigma: of the Gaussian exp(-distance^2 / (2 sigma^2)): the median distance of an entry to its k nearest others.
    """

    def __init__(self, table: Tensor, k: int):
        self.table, self.k = table, k
        distances = torch.cdist(table, table).fill_diagonal_(float("inf"))
        nearest = distances.topk(min(k, len(table)), largest=False).values
        nearest = nearest[nearest.isfinite()]
        self.sigma = nearest.median().item() if len(nearest) else 1.0

    def of(
        self, query: Tensor, but: int | None = None, most_similar: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        The neighbours of a query.

        Args:
            query: (d,) float32.
            but: an entry that is none.
            most_similar: entries whose cosine is larger than this are none.

        Returns:
            Of up to k entries, the nearest first: their places int64, their Euclidean distances, and their Gaussian
            weights, which add up to 1.
        """
        distances = torch.cdist(query[None], self.table)[0]
        if but is not None:
            distances[but] = float("inf")
        if most_similar is not None:
            distances[F.cosine_similarity(query[None], self.table) > most_similar] = float("inf")
        near, places = distances.topk(min(self.k, len(distances)), largest=False)
        near, places = near[near.isfinite()], places[near.isfinite()]
        # softmax, so that the weights of far entries do not vanish together
        return places, near, torch.softmax(-near.square() / (2 * max(self.sigma, 1e-12) ** 2), dim=0)
