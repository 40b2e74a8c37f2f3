"""The builder without gradients: routes of the model's own width drawn around the best so far, forward passes only."""

import torch
from torch import Tensor, nn

from knnmoe_hf.models.gates import Gate
from knnmoe_hf.training.builders.base import Batch, Best, Builder


class Search(Builder):
    """
    Rounds of Gumbel-perturbed top-k routes (the search of arXiv 2605.07260), of which the lowest NLL is kept.

    A round draws around each example's best state and lets each token take the draw that lowered its own NLL most.
    Tokens act on each other, so what they took is run together before an example keeps it; the next round begins at
    what it kept.

    Args:
        model, gates: as in `Builder`; the model needs no backward pass.
        steps: forward passes beside the frozen one; the last of each `draws + 1` runs what the tokens took.
        seed: of the noise, which is an example's own: it does not depend on batch mates.
        noise: scale of the Gumbel noise, in units of logits.
        draws: passes of a round that draw.
    """

    def __init__(self, model: nn.Module, gates: list[Gate], steps: int, seed: int, noise: float = 0.3, draws: int = 3):
        super().__init__(model, gates, steps)
        self.seed, self.noise, self.draws = seed, noise, draws

    def _improve(self, batch: Batch, best: Best) -> None:
        generators = [torch.Generator().manual_seed(hash((self.seed, example))) for example in batch.example_ids]
        left = self.steps
        while left > 0:
            draws = min(self.draws, max(left - 1, 1))
            self._round(batch, best, generators, draws, together=left > draws)
            left -= draws + 1

    def _round(self, batch: Batch, best: Best, generators: list[torch.Generator], draws: int, together: bool) -> None:
        start, least, taken = dict(best.logits), best.nll, dict(best.logits)
        for _ in range(draws):
            drawn = {layer: table + self.noise * _gumbel(table, batch, generators) for layer, table in start.items()}
            nll = self._measure(batch, drawn)
            best.keep(nll, drawn)
            lower = nll < least
            least = torch.where(lower, nll, least)
            for layer, table in drawn.items():
                taken[layer] = torch.where(lower[:, None].to(table.device), table, taken[layer])
        if together:
            best.keep(self._measure(batch, taken), taken)


def _gumbel(like: Tensor, batch: Batch, generators: list[torch.Generator]) -> Tensor:
    """Standard Gumbel noise (n, E), drawn on the host; each example's rows come from a generator of its own."""
    counts = batch.example.bincount(minlength=len(generators)).tolist()
    uniform = torch.cat([torch.rand(rows, like.shape[1], generator=g) for rows, g in zip(counts, generators)])
    return uniform.clamp_min_(torch.finfo(uniform.dtype).tiny).log_().neg_().log_().neg_().to(like.device)
