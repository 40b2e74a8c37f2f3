"""How retrieved values are weighed and mixed with the gate's own routing: one entry for each value space.

T tokens, K neighbours, E experts. Everything is computed in float32. Sources: "v1" and "v2" are the two versions of
arXiv 2601.02144; temperatures are in units of a layer's distance scale `s`, so that one number fits all layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from knnmoe_hf.lookup.rules import RoutingRule

TINY = torch.finfo(torch.float32).tiny
"""The least normal float32: what must not be 0, such as an argument of a logarithm, is at least this."""
BELOW_ONE = 1 - torch.finfo(torch.float32).eps / 2
"""The float32 before 1."""
_LARGEST_FLOAT16 = torch.finfo(torch.float16).max


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
    return torch.softmax((nearest - distances) / max(temperature * scale, TINY), dim=-1)


def interpolate(own: Tensor, combined: Tensor, lam: Tensor | float) -> Tensor:
    """
    Value spaces `logits` (v2) and `assignment` (v1): `(1 - lambda) own + lambda m`.

    Args:
        own: (T, E), the gate's own logits, or its assignment.
        combined: (T, E) float32, m, the weighted mean of the neighbours' values.
        lam: confidence, (T,) float32, or a float for all tokens.

    Returns:
        (T, E) float32: logits to be routed by the model's own rule, or an assignment to be cut by `top_width`.
    """
    return torch.lerp(own.float(), combined, _per_token(lam))


def add(own: Tensor, combined: Tensor, lam: Tensor | float) -> Tensor:
    """Value space `delta` (ours): `own + lambda m`, where m is what optimisation added to logits; as `interpolate`."""
    return own.float() + _per_token(lam) * combined


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
        assignment: (T, E) float32; numbers below 0, which rounding or a stranger's memory may give, count as 0.
        width: experts kept, at most E.

    Returns:
        weights (T, width) float32 and expert ids (T, width) int64, largest first.
    """
    assignment = assignment.clamp_min(0.0)
    kept, ids = torch.topk(assignment, width, dim=-1)
    mass = kept.sum(dim=-1, keepdim=True).clamp_min(TINY)
    return kept * (assignment.sum(dim=-1, keepdim=True) / mass), ids


def in_dtype(mixed: Tensor, dtype: torch.dtype) -> Tensor:
    """What was mixed in float32 in the gate's dtype; beyond the range of float16 its largest number, not inf."""
    if dtype == torch.float16:
        mixed = mixed.clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16)
    return mixed.to(dtype)


@dataclass(frozen=True)
class ValueSpace:
    """
    What the values of a memory are, and how they change a gate's routing. A new value space is one entry of `SPACES`.

    Attributes:
        encode: from optimised logits r* (T, E), the gate's own z (T, E), the model's routing rule and width to the
            values that are stored, (T, E) float32.
        mix: from the gate's own logits (or assignment) (T, E), the combined values (T, E) and lambda to the mixed
            logits (or assignment) (T, E) float32.
        of_logits: whether logits are mixed before the model's rule, or the assignment that the rule gives.
        importance: by which a sparse row keeps its largest values; the others count as 0.
        has_default: whether the others of a sparse row have a stored number in common instead of 0.
    """

    encode: Callable[[Tensor, Tensor, RoutingRule, int], Tensor]
    mix: Callable[[Tensor, Tensor, Tensor | float], Tensor]
    of_logits: bool = True
    importance: Callable[[Tensor], Tensor] = torch.Tensor.float
    has_default: bool = False


SPACES = {
    "assignment": ValueSpace(
        lambda optimized, logits, rule, top_k: scatter_assignment(*rule(optimized, top_k), optimized.shape[-1]),
        interpolate,
        of_logits=False,
    ),
    "logits": ValueSpace(lambda optimized, *_: optimized.float(), interpolate, has_default=True),
    "delta": ValueSpace(lambda optimized, logits, *_: optimized.float() - logits.float(), add, importance=torch.abs),
}
"""By name: `assignment` is v1, R(r*) scattered over the experts; `logits` is v2, r*; `delta` is ours, r* - z."""


def encode_value(value_space: str, optimized: Tensor, logits: Tensor, rule: RoutingRule, top_k: int) -> Tensor:
    """
    The value that a value space stores for optimised logits.

    Args:
        value_space: a key of `SPACES`.
        optimized: (T, E), r*.
        logits: (T, E), the gate's own, z.
        rule, top_k: the model's routing rule and width.

    Returns:
        (T, E) float32.
    """
    return SPACES[value_space].encode(optimized, logits, rule, top_k)
