"""What was tried beside the library's builders and did not make it into the package.

Both are `Descent` with another route: what changes is which experts run and what gradient their weights pass on.
"""

import torch
from torch import Tensor

from knnmoe_hf.lookup.rules import softmax_topk
from knnmoe_hf.lookup.torch_lookup import pad_slots
from knnmoe_hf.models.gates import Gate
from knnmoe_hf.training.builders.base import ForcedRouting
from knnmoe_hf.training.builders.descent import Descent


class StraightThroughRoute(ForcedRouting):
    """The model's own top-k in the forward pass; in the backward pass, the gradient of the open candidates."""

    def experts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates' ids; weights that are 0 beyond the top-k and have the gradient of the candidates' own."""
        soft, ids = self.gate.rule(logits, self.width)
        hard, _ = self.gate.rule(logits, self.gate.top_k)  # both begin with the widest
        return soft + (pad_slots(hard, self.width) - soft).detach(), ids


class StraightThrough(Descent):
    """Adam on straight-through gradients; every step runs the routing that is stored if the step is the best."""

    route = StraightThroughRoute

    def width(self, gate: Gate, wide: bool) -> int:
        """The candidates are open in every step, to the gradient alone."""
        return super().width(gate, wide=True)


class MidPointRoute(ForcedRouting):
    """
    SparseMixer's estimate (arXiv 2310.00811, version 2's backward) for any top-k.

    In the first steps, the experts are drawn by Gumbel-top-k among the open candidates. (SparseMixer draws among those
    within 20 % of the largest logit; beyond the top-k there are next to none.) A drawn one that is not among the
    model's own top-k counts in full for one token in two and for half in the others, which the gradient of its weight
    does not see: half of the gradients are taken at the mid-point between it and nothing.
    """

    def __init__(self, gate: Gate):
        super().__init__(gate)
        self.generator = torch.Generator().manual_seed(gate.layer)

    def experts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Drawn experts while more than the top-k are open, the model's own afterwards; (n, k) either way."""
        top_k = self.gate.top_k
        if self.width == top_k:
            return super().experts(logits)
        top_width, candidates = logits.detach().topk(self.width, dim=-1)
        gumbel = -torch.empty_like(top_width).exponential_(generator=self.generator).log()
        drawn = (top_width + gumbel).topk(top_k, dim=-1).indices  # places among the candidates
        weights = logits.softmax(dim=-1, dtype=torch.float).gather(1, candidates.gather(1, drawn))
        if self.gate.rule is not softmax_topk:  # the other rules make the chosen ones sum to 1
            weights = weights / weights.sum(dim=-1, keepdim=True)
        full = (drawn < top_k) | (torch.rand(drawn.shape, generator=self.generator) > 0.5)
        seen = torch.where(full, weights, weights / 2)
        return (weights + (seen - weights).detach()).to(logits.dtype), candidates.gather(1, drawn)


class MidPoint(Descent):
    """Adam on SparseMixer's gradients in the first `candidate_steps`, then on those of the model's own top-k."""

    route = MidPointRoute
