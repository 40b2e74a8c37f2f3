"""The models' own rules from routing logits to expert weights and ids: one function for each rule."""

from collections.abc import Callable

import torch
from torch import Tensor

GateOutput = tuple[Tensor, Tensor, Tensor]
"""What a gate returns: logits (T, E), expert weights (T, k), expert ids (T, k)."""

RoutingRule = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From logits (T, E) and k to expert weights (T, k), in the logits' dtype, and expert ids (T, k), int64."""


def softmax_topk(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in float32, then the top k; weights do not sum to 1 (OLMoE)."""
    weights, ids = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float), top_k, dim=-1)
    return weights.to(logits.dtype), ids


def softmax_topk_renormalized(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in float32, then the top k, scaled to sum to 1 (Qwen3-MoE as released)."""
    weights, ids = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float), top_k, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype), ids


def topk_softmax(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The top k logits, then a softmax over them in their own dtype (GPT-OSS)."""
    top, ids = torch.topk(logits, top_k, dim=-1)
    return torch.softmax(top, dim=-1, dtype=top.dtype), ids


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
