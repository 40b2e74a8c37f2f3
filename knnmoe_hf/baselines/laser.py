"""LASER: where a token's scores are flat, its experts are the least loaded ones of those that score well."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from knnmoe_hf.baselines.base import Method, constant
from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.calls import Overrides, RoutingOverride
from knnmoe_hf.models.gates import Gate, find_gates, weights_of
from knnmoe_hf.models.hooks import in_force_for, using_overrides
from knnmoe_hf.tasks.items import Item, Prompt


@dataclass
class Laser(Method):
    """
    A policy after mixing: it keeps what is in force, a memory or nothing, and balances the load of the experts.

    A token whose top-k hold a share `confident` of its softmax scores keeps its experts. For another one, experts with
    at least `threshold` times the largest score are candidates, at most `candidates` times top-k of them, and no fewer
    than top-k; it gets the top-k least loaded ones, the higher score first where loads are equal, with the weights of
    the family's rule. Loads are how many tokens before it in the same forward, row by row, got each expert in this
    layer. So the number of experts never changes, but **results depend on the batch and its order**; what is gained
    is an even load, not accuracy.
    """

    source: ClassVar[str] = "arXiv 2510.03293"
    by_batch: ClassVar[bool] = True

    confident: float = constant(0.8, "Share of the scores in the top-k above which a token keeps them.", ours=True)
    threshold: float = constant(0.5, "Least score of a candidate, as a share of the largest.", ours=True)
    candidates: int = constant(2, "Most candidates, in multiples of top-k.", ours=True)

    def fit(self, model: nn.Module, references: Sequence[Item], seed: int = 0, tokenizer=None) -> None:
        """Learns nothing."""

    @contextmanager
    def apply(self, model: nn.Module, prompt: Prompt | None = None) -> Iterator[nn.Module]:
        """As `Method.apply`, on top of what is in force."""
        inner, _ = in_force_for(model)
        balanced = Overrides(
            {gate.layer: LeastLoaded(gate, inner.get(gate.layer), self) for gate in find_gates(model)}
        )
        if inner:
            balanced.owner, balanced.watches = inner.owner, inner.watches
            balanced.recalling_layer, balanced.logits = inner.recalling_layer, inner.logits
        with using_overrides(model, balanced):
            yield model


class LeastLoaded:
    """
    A `RoutingOverride`: see `Laser`.

    Args:
        gate: of the layer.
        inner: the override that mixes; None for none.
        constants: the policy.
    """

    def __init__(self, gate: Gate, inner: RoutingOverride | None, constants: Laser):
        self.gate, self.inner, self.constants = gate, inner, constants

    def __call__(self, x: Tensor, output: GateOutput, tokens: Tokens) -> GateOutput:
        mixed = None if self.inner is None else self.inner(x, output, tokens)
        logits, weights, ids = output if mixed is None else mixed
        k = ids.shape[1]
        if k != self.gate.top_k:
            raise ValueError(
                f"laser cannot balance {shown(k)} experts a token where the model chooses {self.gate.top_k}: use a "
                "memory with routing_width=None."
            )
        scores = logits.float().softmax(-1)
        flat = scores.gather(1, ids).sum(-1) < self.constants.confident
        if tokens.real is not None:
            flat &= tokens.real.to(flat.device)
        with weights_of(self.gate):
            rule = self.gate.current_rule().to(logits.device)
        if rule.groups is not None:  # experts of groups that are closed to a token are not candidates
            scores = scores.masked_fill(rule.ranks(logits) == rule.groups.closed_score, 0.0)
        chosen = self._balanced(scores, ids, flat, tokens.real).to(ids.device, ids.dtype)
        changed = rule.weights_of(logits, chosen).to(weights.dtype)
        return logits, torch.where(flat[:, None], changed, weights), torch.where(flat[:, None], chosen, ids)

    def _balanced(self, scores: Tensor, ids: Tensor, flat: Tensor, real: Tensor | None) -> Tensor:
        """Expert ids (T, k) of all tokens, found one after the other."""
        k = ids.shape[1]
        best, pool = scores.sort(dim=-1, descending=True, stable=True)
        sizes = (
            (best >= self.constants.threshold * best[:, :1]).sum(-1).clamp(k, max(k, self.constants.candidates * k))
        )
        pool, sizes, found, flat = (one.cpu().numpy() for one in (pool, sizes, ids.clone(), flat))
        loads = np.zeros(scores.shape[1], dtype=np.int64)
        for token in range(len(found)) if real is None else real.cpu().nonzero()[:, 0].tolist():
            if flat[token]:
                candidates = pool[token, : sizes[token]]
                found[token] = candidates[np.sort(np.argsort(loads[candidates], kind="stable")[:k])]
            loads[found[token]] += 1
        return torch.from_numpy(found)
