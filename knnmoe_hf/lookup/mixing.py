"""How retrieved routing is weighed and mixed with the gate's own: pure functions on tensors.

T tokens, K neighbours, E experts, N rows. Everything is computed in float32.
Sources: "v1" and "v2" are the two versions of the paper (arXiv 2601.02144); tau, gamma and the distance scale `s` of
a layer are in units that make them comparable between layers and models (see `knnmoe_hf.memory.scale`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf.lookup.rules import RoutingRule

NEGLIGIBLE = 1e-3
"""Confidences of no more than this are 0."""

_LEAST_GAMMA = 1e-30  # changes nothing that is near, but 0 times infinity is no number


def neighbor_weights(distances: Tensor, scale: float | Tensor, temperature: float) -> Tensor:
    """
    Weights of the neighbours, `w = softmax(-d / (tau * s))`.

    Args:
        distances: (T, K) float32, squared L2, nearest first.
        scale: the layer's median neighbour distance, positive.
        temperature: tau, positive.

    Returns:
        (T, K) float32, rows sum to 1.
    """
    nearest = distances[:, :1]  # a tiny tau would send every -d to minus infinity
    unit = max(temperature * scale, torch.finfo(torch.float32).tiny)
    return torch.softmax((nearest - distances) / unit, dim=-1)


def falloff(scale: float | Tensor, gamma: float) -> float | Tensor:
    """Of the similarity `exp(-falloff * d)`: `gamma / s`, never 0, so that what is infinitely far is like nothing."""
    return max(gamma, _LEAST_GAMMA) / scale


def similarity(distances: Tensor, scale: float | Tensor, gamma: float) -> Tensor:
    """
    Mean RBF similarity of the neighbours, `mean_i exp(-gamma * d_i / s)`; the paper's confidence (v2).

    Args:
        distances: (T, K) float32, squared L2.
        scale: the layer's median neighbour distance, positive.
        gamma: inverse width of the RBF, in units of `scale`.

    Returns:
        (T,) float32 in [0, 1]; 0 where nothing is similar, or all is infinitely far.
    """
    return torch.exp(distances * -falloff(scale, gamma)).mean(dim=-1)


def gated(similar: Tensor, opening: Tensor) -> Tensor:
    """
    Confidences `context` and `calibrated`: similarity, as far as the sequence so far looks like the references.

    Args:
        similar: (T,) float32, as `similarity` returns it.
        opening: (T,) float32 in [0, 1], how far the sequence so far opens the memory.

    Returns:
        (T,) float32 in [0, 1]; exactly 0 below a thousandth, so that such tokens route as without a memory.
    """
    return F.threshold(similar * opening, NEGLIGIBLE, 0.0)


def scatter_assignment(weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """Expert weights (T, k) at ids (T, k) as a dense assignment (T, E), float32, 0 for experts not named."""
    dense = torch.zeros(*ids.shape[:-1], num_experts, dtype=torch.float32, device=ids.device)
    return dense.scatter(-1, ids, weights.float())


def mix_logits(logits: Tensor, recalled: Tensor, lam: Tensor) -> Tensor:
    """
    Value space `logits` (v2): `(1 - lambda) z + lambda m`.

    Args:
        logits: (T, E), the gate's own, z.
        recalled: (T, E) float32, the neighbours' optimised logits, m.
        lam: (T,) float32, confidence.

    Returns:
        (T, E) float32, to be routed by the model's own rule.
    """
    return torch.lerp(logits.float(), recalled, lam[:, None])


def mix_delta(logits: Tensor, recalled: Tensor, lam: Tensor) -> Tensor:
    """Value space `delta` (ours): `z + lambda m`, m (T, E) being what optimisation added; else as `mix_logits`."""
    return logits.float() + lam[:, None] * recalled


def mix_assignment(weights: Tensor, ids: Tensor, recalled: Tensor, lam: Tensor) -> Tensor:
    """
    Value space `assignment` (v1): `(1 - lambda) a_gate + lambda m`.

    Args:
        weights, ids: (T, k), the gate's own route.
        recalled: (T, E) float32, the neighbours' optimised assignments, m.
        lam: (T,) float32, confidence.

    Returns:
        (T, E) float32, to be cut to a width by `top_width`.
    """
    return torch.lerp(scatter_assignment(weights, ids, recalled.shape[-1]), recalled, lam[:, None])


def top_width(assignment: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """
    The `width` widest experts of an assignment, scaled to carry all of its mass.

    Without the scaling a cut would shrink the layer's output, most of all where neighbours disagree.

    Args:
        assignment: (T, E) float32, not negative.
        width: experts kept, at most E.

    Returns:
        weights (T, width) float32 and expert ids (T, width) int64, widest first.
    """
    kept, ids = torch.topk(assignment, width, dim=-1)
    mass = kept.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
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
