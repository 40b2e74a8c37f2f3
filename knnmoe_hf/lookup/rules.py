"""The models' own rules from routing logits to expert weights and ids, as data."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

GateOutput = tuple[Tensor, Tensor, Tensor]
"""What a gate returns: logits (T, E), expert weights (T, k), expert ids (T, k)."""

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


@dataclass(frozen=True)
class ExpertGroups:
    """
    Groups of consecutive experts; a token chooses among the experts of its best groups only.

    Attributes:
        size: experts in a group.
        open: groups whose experts a token may choose.
        judged_by: how many of a group's largest scores are added up to compare it with the others.
        closed_score: the score by which the experts of all other groups take part in the choice.
        closes_weights: whether such an expert, if it is chosen all the same, also weighs `closed_score`; if not, it
            weighs as in an open group.
    """

    size: int
    open: int
    judged_by: int = 2
    closed_score: float = float("-inf")
    closes_weights: bool = False

    def closed(self, scores: Tensor, in_order: bool) -> Tensor:
        """The scores (T, E), replaced by `closed_score` for the experts outside of each token's best groups."""
        grouped = scores.view(len(scores), -1, self.size)
        best = grouped.topk(self.judged_by, dim=-1).values.sum(dim=-1).topk(self.open, dim=-1, sorted=in_order).indices
        is_open = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
        return grouped.masked_fill(~is_open[..., None], self.closed_score).flatten(1)


@dataclass(frozen=True)
class RoutingRule:
    """
    How a gate turns logits into experts and their weights: scores, a choice by them, and what becomes of the chosen.

    Called as `rule(logits, k)`, it does with the same operations in the same order what the gate does, so that results
    equal the gate's own to the bit.

    Attributes:
        scores: name of the function from logits to scores, one of `SCORES`.
        of_chosen: whether experts are chosen by their logits, and only the k logits of the chosen are scored.
        float32: whether logits are cast to float32 before they are scored; a gate without this cast may still compute
            float32 logits, but in half precision under autocast.
        in_order: whether the chosen experts are sorted, best first.
        renormalized: whether weights are divided by their sum (plus `added_to_sum`, and at least `least_sum`).
        factor: by which weights are multiplied at the end.
        groups: limits the choice to some experts; None if all take part.
        bias: (E,), the correction bias: added to the scores for the choice only; None if there is none. It does not
            count when rules are compared.

    Raises:
        ValueError: for scores that are not in `SCORES`.
    """

    scores: str = "softmax"
    of_chosen: bool = False
    float32: bool = True
    in_order: bool = True
    renormalized: bool = False
    added_to_sum: float = 0.0
    least_sum: float = 0.0
    factor: float = 1.0
    groups: ExpertGroups | None = None
    bias: Tensor | None = field(default=None, compare=False)

    def __post_init__(self):
        if self.scores not in SCORES:
            raise ValueError(f"scores={self.scores!r} is not allowed: use one of {', '.join(SCORES)}.")

    def __call__(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """
        The experts that logits (T, E) choose.

        Args:
            logits: of any float dtype.
            k: experts for each token; see `widest`.

        Returns:
            Weights (T, k), in the dtype in which the gate computes them before it casts them, and ids (T, k) int64.
        """
        scores = logits if self.of_chosen else self._scored(logits)
        ranks = self._ranks(scores)
        top, ids = torch.topk(ranks, k, dim=-1, sorted=self.in_order)
        ranks_weigh = self.bias is None and (self.groups is None or self.groups.closes_weights)
        return self._weighed(top if ranks_weigh else scores.gather(1, ids)), ids

    def weights_of(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The weights (T, k) of experts (T, k) that were chosen in another way than by their logits (T, E)."""
        return self._weighed((logits if self.of_chosen else self._scored(logits)).gather(1, ids))

    def _weighed(self, chosen: Tensor) -> Tensor:
        weights = self._scored(chosen) if self.of_chosen else chosen
        if self.renormalized:
            weights = (weights / self._divisor(weights)).to(weights.dtype)  # in place in most gates: autocast or not
        return weights if self.factor == 1.0 else weights * self.factor

    def ranks(self, logits: Tensor) -> Tensor:
        """
        What experts are chosen by, (T, E): a token gets those with the largest numbers.

        These are the logits (T, E) themselves, as float32, where neither a bias nor groups take part.
        """
        return logits.float() if self.ranks_logits else self._ranks(logits if self.of_chosen else self._scored(logits))

    def routed(self, logits: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a call returns, with the weights cast to this dtype: that of the gate's own expert weights."""
        weights, ids = self(logits, k)
        return weights.to(dtype), ids

    def _ranks(self, scores: Tensor) -> Tensor:
        ranks = scores if self.bias is None else scores + self.bias
        return ranks if self.groups is None else self.groups.closed(ranks, self.in_order)

    def _scored(self, logits: Tensor) -> Tensor:
        if self.scores == "softmax":
            return (
                torch.softmax(logits, dim=-1, dtype=torch.float32) if self.float32 else torch.softmax(logits, dim=-1)
            )
        logits = logits.float() if self.float32 else logits
        return torch.sigmoid(logits) if self.scores == "sigmoid" else F.softplus(logits).sqrt()

    def _divisor(self, weights: Tensor) -> Tensor:
        total = weights.sum(dim=-1, keepdim=True)
        if self.added_to_sum:
            total = total + self.added_to_sum
        if not self.least_sum and self.scores != "softmax":  # of mixed logits, all scores may be 0
            return total.clamp_min(torch.finfo(total.dtype).tiny)
        return total.clamp(min=self.least_sum) if self.least_sum else total

    @property
    def ranks_logits(self) -> bool:
        """Whether the experts of the largest logits are chosen: no correction bias, no groups."""
        return self.bias is None and self.groups is None

    def widest(self, top_k: int, num_experts: int) -> int:
        """The most experts that a token of a gate with this top-k can be given: those in its open groups."""
        return num_experts if self.groups is None else max(top_k, self.groups.open * self.groups.size)

    @property
    def name(self) -> str:
        """A short name, such as `softmax_topk_renormalized`, without the sizes and factors of the rule."""
        parts = ["topk", self.scores] if self.of_chosen else [self.scores, "topk"]
        more = {
            "biased": self.bias is not None,
            "grouped": self.groups is not None,
            "renormalized": self.renormalized,
            "scaled": self.factor != 1.0,
        }
        return "_".join(parts + [part for part, there in more.items() if there])

    def to(self, device: torch.device | str) -> "RoutingRule":
        """The same rule with its correction bias on this device, where the logits are."""
        return self if self.bias is None else replace(self, bias=self.bias.to(device))


softmax_topk = RoutingRule()  # weights do not sum to 1 (OLMoE)
softmax_topk_renormalized = RoutingRule(renormalized=True)  # Qwen3-MoE as released
topk_softmax = RoutingRule(of_chosen=True, float32=False)  # GPT-OSS


class Router(NamedTuple):
    """How one layer of the model routes by itself."""

    rule: RoutingRule
    top_k: int


def pad_slots(table: Tensor, slots: int) -> Tensor:
    """
    Expert weights or ids (T, k) as (T, slots): the added slots have weight 0 and the id of the token's first expert.

    An id of its own is needed because every experts kernel reads all slots.
    """
    missing = slots - table.shape[1]
    if missing == 0:
        return table
    filler = torch.zeros_like(table[:, :1]) if table.is_floating_point() else table[:, :1]
    return torch.cat([table, filler.expand(-1, missing)], dim=-1)
