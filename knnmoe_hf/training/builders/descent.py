"""The builders `"candidates"` and `"topk"`: Adam on the routing logits of each batch."""

import torch
from torch import Tensor, nn

from knnmoe_hf.models.gates import Gate
from knnmoe_hf.training.builders.base import Batch, Best, Builder


class Descent(Builder):
    """
    Gradient descent on the routing logits of each batch.

    No gradient says whether an expert that does not run would help. With the model's own top-k (`candidate_steps=0`,
    the paper's method) it is selected only when the logit of a selected expert falls below its logit. If the first
    steps run more experts per token, each of these candidates gets a gradient by its own output.

    Args:
        model, gates, steps: as in `Builder`; a step is a forward and a backward pass.
        candidates: experts per target in the first `candidate_steps` steps; twice the gate's own top-k if None, but
            no more than the gate's rule can choose among.
        candidate_steps: fewer than `steps`; the later steps run the model's own top-k.
        learning_rate, betas, eps: of Adam; eps is relative to a token's largest gradient in the first step.
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
                # a sum, not a mean, so that an example's gradient does not depend on the other examples of the batch
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
        """Experts per target: the candidates if `wide`, else the model's own top-k."""
        if not wide:
            return gate.top_k
        return min(max(self.candidates or 2 * gate.top_k, gate.top_k), gate.max_width)


def _largest(gradient: Tensor) -> Tensor:
    """
    Each token's largest absolute gradient (n, 1), by which its gradients are divided before Adam sees them.

    Adam's eps is then relative to it. With rules that renormalise, the gradient of an expert that does not run is 0
    except for rounding errors of about 1e-8 of the largest gradient; with an absolute eps below that, Adam would turn
    rounding errors into steps of full size.
    """
    return gradient.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
