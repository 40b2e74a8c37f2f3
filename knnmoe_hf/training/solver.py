"""Optimises the routing logits of one batch for the true next tokens, all layers jointly; weights are only read.

Every builder is a schedule of routing widths: how many experts are open at each step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knnmoe_hf.hooks import RoutingHooks
from knnmoe_hf.lookup import pad_slots
from knnmoe_hf.routing import Gate
from knnmoe_hf.training.data import target_mask


@dataclass(frozen=True)
class SolvedBatch:
    """
    One row for each of a batch's n targets.

    Attributes:
        keys: `{layer: (n, d)}`, gate inputs of the frozen pass, in the model's dtype.
        logits: `{layer: (n, E)}` float32, the gate's own.
        optimized: `{layer: (n, E)}` float32, those of each example's best step.
        example: (n,) int64, index in the batch.
        position: (n,) int64, the token of the example.
        nll_before, nll_after: (n,) float32, NLL of the target in nats, frozen and with the optimised logits.
        experts_changed: share of (target, layer) whose set of experts changed.
    """

    keys: dict[int, Tensor]
    logits: dict[int, Tensor]
    optimized: dict[int, Tensor]
    example: Tensor
    position: Tensor
    nll_before: Tensor
    nll_after: Tensor
    experts_changed: float


class _LayerRoute:
    """The `Route` of one layer during a build: first notes what the frozen gate sees, then routes by the leaf."""

    def __init__(self, gate: Gate):
        self.gate = gate
        self.rows = self.key = self.logits = self.leaf = self.width = None

    def __call__(self, x: Tensor, routes: tuple, real: Tensor | None) -> tuple | None:
        logits, weights, ids = routes
        rows = self.rows.to(x.device)
        if self.leaf is None:
            self.key, self.logits = x[rows], logits[rows].float()
            return None
        replaced = logits.index_copy(0, rows, self.leaf.to(logits.dtype))
        new_weights, new_ids = self.gate.rule(replaced, self.width)
        if self.width > self.gate.top_k:  # tokens that are no targets keep their own experts
            chosen = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device).index_fill(0, rows, True)
            new_weights = torch.where(chosen, new_weights, pad_slots(weights, self.width))
            new_ids = torch.where(chosen, new_ids, pad_slots(ids, self.width))
        return replaced, new_weights, new_ids


class Solver:
    """
    Args:
        model: the frozen model; its gates must be free of other routes.
        gates: those whose logits are optimised.
        steps: gradient steps per batch.
        candidates: experts open in the first `candidate_steps` steps, None for twice the gate's own top-k.
        candidate_steps: 0 is the paper's gradient descent through the hard top-k.
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
        self.model, self.steps, self.candidates, self.candidate_steps = model, steps, candidates, candidate_steps
        self.adam = dict(lr=learning_rate, betas=betas, eps=eps)
        self.routes = {gate.layer: _LayerRoute(gate) for gate in gates}
        self.hooks = RoutingHooks(model, gates)
        self.hooks.named["builder"] = self.routes

    def close(self) -> None:
        """Takes the solver's hooks off the model."""
        self.hooks.remove()

    def solve(self, inputs: Mapping[str, Tensor], labels: Tensor) -> SolvedBatch:
        """
        Args:
            inputs: arguments of the model's forward, with `input_ids` (B, S) and maybe `attention_mask` (B, S).
            labels: (B, S), -100 where there is no target; there must be at least one.
        """
        targets = target_mask(labels, inputs.get("attention_mask"))
        example, position = targets.nonzero(as_tuple=True)
        self.hooks.active = "builder"
        self.hooks.select()
        try:
            before = self._frozen_pass(inputs, labels, targets)
            best = {layer: route.logits.clone() for layer, route in self.routes.items()}
            after = self._descend(inputs, labels, targets, before, best)
        finally:
            self.hooks.active = None
            self.hooks.select()
        keys = {layer: route.key for layer, route in self.routes.items()}
        logits = {layer: route.logits for layer, route in self.routes.items()}
        changed = self._experts_changed(best)
        for route in self.routes.values():
            route.key = route.logits = route.leaf = None
        return SolvedBatch(keys, logits, best, example, position, before, after, changed)

    def _frozen_pass(self, inputs: Mapping[str, Tensor], labels: Tensor, targets: Tensor) -> Tensor:
        for route in self.routes.values():
            route.leaf, route.rows = None, targets.flatten().nonzero().squeeze(-1)
        with torch.no_grad():
            return self._nll(inputs, labels, targets)

    def _descend(
        self, inputs: Mapping[str, Tensor], labels: Tensor, targets: Tensor, before: Tensor, best: dict[int, Tensor]
    ) -> Tensor:
        """Runs the steps; leaves each example's best logits in `best` and returns their NLL (n,)."""
        example = targets.nonzero(as_tuple=True)[0]
        least, kept = self._per_example(before, example, len(labels)), before.clone()

        def keep(nll: Tensor) -> None:
            total = self._per_example(nll.detach(), example, len(labels))
            better = (total < least)[example]  # (n,)
            least.copy_(torch.minimum(total, least))
            kept.copy_(torch.where(better, nll.detach(), kept))
            for layer, route in self.routes.items():
                best[layer] = torch.where(better[:, None].to(route.leaf.device), route.leaf.detach(), best[layer])

        for route in self.routes.values():
            route.leaf = route.logits.clone().requires_grad_()
        leaves = [route.leaf for route in self.routes.values()]
        adam, units = torch.optim.Adam(leaves, **self.adam), {}
        for step in range(self.steps):
            self._open(wide=step < self.candidate_steps)
            with torch.enable_grad():
                nll = self._nll(inputs, labels, targets)
                # a sum, not a mean: an example's gradient then does not depend on its batch mates
                gradients = torch.autograd.grad(nll.sum(), leaves)
            if step >= max(self.candidate_steps, 1):
                keep(nll)
            for leaf, gradient in zip(leaves, gradients):
                leaf.grad = gradient / units.setdefault(leaf, _largest(gradient))
            adam.step()
        self._open(wide=False)
        with torch.no_grad():
            keep(self._nll(inputs, labels, targets))
        return kept

    def _open(self, wide: bool) -> None:
        for route in self.routes.values():
            gate = route.gate
            candidates = self.candidates or 2 * gate.top_k
            route.width = min(max(candidates, gate.top_k), gate.num_experts) if wide else gate.top_k

    def _nll(self, inputs: Mapping[str, Tensor], labels: Tensor, targets: Tensor) -> Tensor:
        """(n,) float32, NLL of every target in nats."""
        logits = self.model(**inputs, use_cache=False).logits
        following = labels.roll(-1, dims=1)
        return F.cross_entropy(logits[targets].float(), following[targets], reduction="none")

    @staticmethod
    def _per_example(nll: Tensor, example: Tensor, examples: int) -> Tensor:
        return torch.zeros(examples, device=nll.device).index_add(0, example, nll)

    def _experts_changed(self, best: dict[int, Tensor]) -> float:
        changed = [
            (_expert_set(route.gate, route.logits) != _expert_set(route.gate, best[layer])).any(dim=-1).float().mean()
            for layer, route in self.routes.items()
        ]
        return torch.stack([share.cpu() for share in changed]).mean().item()


def _largest(gradient: Tensor) -> Tensor:
    """
    Each token's largest gradient (n, 1), the unit in which Adam sees the gradients of that token.

    Adam's eps then says how small is nothing. Under rules that renormalise, an expert that is not open has a gradient
    of exactly 0, of which rounding leaves some 1e-8 of the largest: with an absolute eps, Adam would divide by that
    and make a full step of it, at random.
    """
    return gradient.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)


def _expert_set(gate: Gate, logits: Tensor) -> Tensor:
    return logits.topk(gate.top_k, dim=-1).indices.sort(dim=-1).values
