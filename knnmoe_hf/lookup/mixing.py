"""How retrieved values are weighed and mixed with the gate's own routing: one function for each value space.

T tokens, K neighbours, E experts. Everything is computed in float32. Sources: "v1" and "v2" are the two versions of
arXiv 2601.02144; temperatures are in units of a layer's distance scale `s`, so that one number fits all layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from knnmoe_hf.lookup.rules import RoutingRule

_TINY = torch.finfo(torch.float32).tiny


def neighbor_weights(distances: Tensor, scale: float, temperature: float) -> Tensor:
    """
    Weights of the neighbours, `w = softmax(-d / (tau * s))`.

    Args:
        distances: (T, K) float32, squared L2, nearest first.
        scale: s, the layer's median neighbour distance, positive.
        temperature: tau, positive.

    Returns:
        (T, K) float32, rows sum to 1.
    """
    nearest = distances[:, :1]  # subtracted first: a tiny tau would otherwise send every -d to minus infinity
    return torch.softmax((nearest - distances) / max(temperature * scale, _TINY), dim=-1)


def mix_logits(logits: Tensor, combined: Tensor, lam: Tensor | float) -> Tensor:
    """
    Value space `logits` (v2): `(1 - lambda) z + lambda m`.

    Args:
        logits: (T, E), the gate's own, z.
        combined: (T, E) float32, the weighted mean of the neighbours' optimised logits, m.
        lam: confidence, (T,) float32, or a float for all tokens.

    Returns:
        (T, E) float32, to be routed by the model's own rule.
    """
    return torch.lerp(logits.float(), combined, _per_token(lam))


def mix_delta(logits: Tensor, combined: Tensor, lam: Tensor | float) -> Tensor:
    """Value space `delta` (ours): `z + lambda m`, where m is what optimisation added to logits; as `mix_logits`."""
    return logits.float() + _per_token(lam) * combined


def mix_assignment(weights: Tensor, ids: Tensor, combined: Tensor, lam: Tensor | float) -> Tensor:
    """
    Value space `assignment` (v1): `(1 - lambda) a_gate + lambda m`.

    Args:
        weights, ids: (T, k), the gate's own expert weights and ids.
        combined: (T, E) float32, the weighted mean of the neighbours' optimised assignments, m.
        lam: as in `mix_logits`.

    Returns:
        (T, E) float32, to be cut to a width by `top_width`.
    """
    return torch.lerp(scatter_assignment(weights, ids, combined.shape[-1]), combined, _per_token(lam))


LOGITS_MIXERS: dict[str, Callable[[Tensor, Tensor, Tensor | float], Tensor]] = {
    "logits": mix_logits,
    "delta": mix_delta,
}
"""The value spaces that mix logits before the model's own rule; `assignment` mixes what the rule returned."""


def _per_token(lam: Tensor | float) -> Tensor | float:
    return lam[:, None] if isinstance(lam, Tensor) else lam


def scatter_assignment(weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """Expert weights (T, k) at ids (T, k) as a dense assignment (T, E) float32, 0 for all other experts."""
    dense = torch.zeros(*ids.shape[:-1], num_experts, dtype=torch.float32, device=ids.device)
    return dense.scatter(-1, ids, weights.float())


def top_width(assignment: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """
    The `width` experts of largest weight, scaled to carry the whole mass of the assignment.

    Without the scaling a cut would shrink the layer's output, most of all where neighbours disagree.

    Args:
        assignment: (T, E) float32, not negative.
        width: experts kept, at most E.

    Returns:
        weights (T, width) float32 and expert ids (T, width) int64, largest first.
    """
    kept, ids = torch.topk(assignment, width, dim=-1)
    mass = kept.sum(dim=-1, keepdim=True).clamp_min(_TINY)
    return kept * (assignment.sum(dim=-1, keepdim=True) / mass), ids


def encode_value(value_space: str, optimized: Tensor, logits: Tensor, rule: RoutingRule, top_k: int) -> Tensor:
    """
    The value that a value space stores for optimised logits.

    Args:
        value_space: one of `knnmoe_hf.lookup.options.VALUE_SPACES`.
        optimized: (T, E), r*.
        logits: (T, E), the gate's own, z.
        rule, top_k: the model's routing rule and width.

    Returns:
        (T, E) float32: r* for `logits`, r* - z for `delta`, R(r*) scattered over the experts for `assignment`.
    """
    if value_space == "assignment":
        return scatter_assignment(*rule(optimized, top_k), optimized.shape[-1])
    return optimized.float() - logits.float() if value_space == "delta" else optimized.float()
