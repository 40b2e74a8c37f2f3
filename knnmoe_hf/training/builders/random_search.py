"""The builder `"search"`: random changes of the best logits so far, evaluated with forward passes only."""

import torch
from torch import Tensor, nn

from knnmoe_hf.models.gates import Gate
from knnmoe_hf.training.builders.base import Batch, Best, Builder


class RandomSearch(Builder):
    """
    Random search by adding Gumbel noise to routing logits (the search of arXiv 2605.07260).

    A round starts from each example's best logits. `draws` forward passes each add new noise to them, and every token
    picks the draw that lowered its own NLL most. One more pass runs all picked draws together, because the tokens of
    an example influence each other. The example keeps the best logits of all these passes for the next round.

    Args:
        model, gates: as in `Builder`; the model needs no backward pass.
        steps: forward passes after the frozen one; a round takes `draws + 1` of them.
        seed: random seed; each example has its own noise, which does not depend on the other examples of the batch.
        noise: scale of the Gumbel noise, in units of logits.
        draws: draws in each round.
    """

    def __init__(self, model: nn.Module, gates: list[Gate], steps: int, seed: int, noise: float = 0.3, draws: int = 3):
        super().__init__(model, gates, steps)
        self.seed, self.noise, self.draws = seed, noise, draws

    def _improve(self, batch: Batch, best: Best) -> None:
        # On 64-bit CPython the hash of a tuple of ints is the same in every run: PYTHONHASHSEED affects only str and
        # bytes. Another way to seed would change the bytes of the memories.
        generators = [torch.Generator().manual_seed(hash((self.seed, example))) for example in batch.example_ids]
        left = self.steps
        while left > 0:
            draws = min(self.draws, max(left - 1, 1))
            self._round(batch, best, generators, draws, together=left > draws)
            left -= draws + 1

    def _round(self, batch: Batch, best: Best, generators: list[torch.Generator], draws: int, together: bool) -> None:
        start, lowest, picked = dict(best.logits), best.nll, dict(best.logits)
        for _ in range(draws):
            drawn = {layer: table + self.noise * _gumbel(table, batch, generators) for layer, table in start.items()}
            nll = self._measure(batch, drawn)
            best.keep(nll, drawn)
            lower = nll < lowest
            lowest = torch.where(lower, nll, lowest)
            for layer, table in drawn.items():
                picked[layer] = torch.where(lower[:, None].to(table.device), table, picked[layer])
        if together:
            best.keep(self._measure(batch, picked), picked)


def _gumbel(like: Tensor, batch: Batch, generators: list[torch.Generator]) -> Tensor:
    """Standard Gumbel noise (n, E), drawn on the CPU; each example's rows are drawn from its own generator."""
    counts = batch.example.bincount(minlength=len(generators)).tolist()
    uniform = torch.cat([torch.rand(rows, like.shape[1], generator=g) for rows, g in zip(counts, generators)])
    return uniform.clamp_min_(torch.finfo(uniform.dtype).tiny).log_().neg_().log_().neg_().to(like.device)
