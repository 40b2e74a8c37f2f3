"""Builders by gradient: Adam on the routing logits, with a schedule of how many experts are open at each step."""

import torch
from torch import Tensor, nn

from knnmoe_hf.models.gates import Gate
from knnmoe_hf.training.builders.base import Batch, Best, Builder


class Descent(Builder):
    """
    Gradient descent on the logits of each batch.

    A closed expert has no gradient of its own under any of the routing rules. With `candidate_steps=0`, the paper's
    hard top-k, one comes in only when a selected one falls below it; open candidates show what they are worth.

    Args:
        model, gates, steps: as in `Builder`; a step is a forward and a backward pass.
        candidates: experts open in the first `candidate_steps` steps, None for twice the gate's own top-k.
        candidate_steps: fewer than `steps`; the others run the model's own top-k.
        learning_rate, betas, eps: Adam's; eps is relative to a token's largest gradient in the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: list[Gate],
        steps: int,
        candidates: int | None,
        candidate_steps: int,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
    ):
        super().__init__(model, gates, steps)
        self.candidates, self.candidate_steps = candidates, candidate_steps
        self.adam = dict(lr=learning_rate, betas=betas, eps=eps)

    def _improve(self, batch: Batch, best: Best) -> None:
        leaves = {index: layer.logits.clone().requires_grad_() for index, layer in self.layers.items()}
        adam, units = torch.optim.Adam(leaves.values(), **self.adam), {}
        for step in range(self.steps):
            wide = step < self.candidate_steps
            with torch.enable_grad():
                for index, layer in self.layers.items():
                    layer.forced, layer.width = leaves[index], self.width(layer.gate, wide)
                nll = batch.nll(self.model)
                # a sum, not a mean: an example's gradient then does not depend on its batch mates
                gradients = torch.autograd.grad(nll.sum(), list(leaves.values()))
            if step > 0 and not wide:
                best.keep(nll.detach(), leaves)
            for (layer, leaf), gradient in zip(leaves.items(), gradients):
                if step == 0:
                    units[layer] = _largest(gradient)
                leaf.grad = gradient.div_(units[layer])
            adam.step()
        best.keep(self._measure(batch, leaves), leaves)

    def width(self, gate: Gate, wide: bool) -> int:
        """How many experts a target has open."""
        if not wide:
            return gate.top_k
        return min(max(self.candidates or 2 * gate.top_k, gate.top_k), gate.num_experts)


def _largest(gradient: Tensor) -> Tensor:
    """
    Each token's largest gradient (n, 1), the unit in which Adam sees the gradients of that token.

    Adam's eps then says how small is nothing. Under rules that renormalise, an expert that is not open has a gradient
    of exactly 0, of which rounding leaves some 1e-8 of the largest: with an absolute eps, Adam would divide by that
    and make a full step of it, at random.
    """
    return gradient.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
