"""The routing of single tokens, such as the last one of each prompt: reading it, and replacing it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.lookup.rules import GateOutput, RoutingRule
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.gates import Gate


def places(tokens: Tokens, device: torch.device) -> Tensor:
    """(B, S) int64: the number of real tokens of its sequence before each token, those in a KV cache included."""
    tokens.warmup(math.inf, torch.empty(0, device=device))  # a running sum that never decays counts the tokens
    return tokens.running_sums[None, math.inf].to(device).long() - 1


def at_place(tokens: Tokens, place: Tensor | int, device: torch.device, and_later: bool = False) -> Tensor:
    """
    (T,) bool: the tokens at a place of their sequence, none of which is padding.

    Args:
        tokens: of a call.
        place: counted from 0, of all sequences, or (B,) of each.
        device: of the result.
        and_later: all tokens behind that place too.
    """
    place = place[:, None].to(device) if isinstance(place, Tensor) else place
    found = places(tokens, device)
    found = (found >= place if and_later else found == place).flatten()
    return found if tokens.real is None else found & tokens.real.to(device)


def check_softmax(gates: Sequence[Gate]) -> None:
    """
    Checks that routing weights are parts of a softmax.

    Raises:
        UnsupportedModelError: for gates that score experts otherwise.
    """
    if other := [gate for gate in gates if gate.rule.scores != "softmax"]:
        raise UnsupportedModelError(
            f"{other[0].family.name} scores experts by {other[0].rule.scores}, and this method averages routing "
            "weights that sum to 1: use it on a model whose router has a softmax."
        )


def routed_by_weights(rule: RoutingRule, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    Expert weights and ids where not logits are given but what a softmax over them would be.

    The k largest are chosen, and weighted by the family's convention: as they are, or divided by their sum. With the
    softmax of a gate's own logits, this is what the gate does. Gradients pass, also at a weight of 0.

    Args:
        rule: with softmax scores.
        weights: (T, E) float32, each row at least 0 with sum 1.
        k: experts for each token.

    Returns:
        Weights (T, k) float32 and ids (T, k).
    """
    with torch.no_grad():
        _, ids = rule(weights.log(), k)
    chosen = weights.gather(1, ids)
    if rule.of_chosen:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    if rule.renormalized:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + rule.added_to_sum).clamp(min=rule.least_sum)
    return chosen * rule.factor, ids


class ReadWeights:
    """
    A `RoutingOverride` that changes nothing and keeps the softmax of the gate's logits at a place of each sequence.

    Args:
        place: (B,), see `at_place`.

    Attributes:
        found: (B, E) float32 on the CPU, of the last call.
    """

    def __init__(self, place: Tensor):
        self.place = place
        self.found: Tensor | None = None

    def __call__(self, x: Tensor, output: GateOutput, tokens: Tokens) -> None:
        logits = output[0][at_place(tokens, self.place, output[0].device)]
        self.found = torch.softmax(logits.detach().float(), dim=-1).cpu()


class PutWeights:
    """
    A `RoutingOverride` that routes single tokens by given weights, and all others as the gate does.

    Args:
        gate: of the layer.
        weights: (E,) float32, see `routed_by_weights`.
        place, and_later: which tokens, see `at_place`.
    """

    def __init__(self, gate: Gate, weights: Tensor, place: Tensor | int, and_later: bool = False):
        self.gate, self.weights, self.place, self.and_later = gate, weights, place, and_later

    def __call__(self, x: Tensor, output: GateOutput, tokens: Tokens) -> GateOutput | None:
        logits, own, ids = output
        device = own.device
        rows = at_place(tokens, self.place, device, self.and_later).nonzero().squeeze(1)
        if not len(rows):
            return None
        weights = self.weights.to(device)[None]
        put, chosen = routed_by_weights(self.gate.current_rule(), weights, ids.shape[1])
        shown = weights.detach().log().clamp(min=torch.finfo(logits.dtype).min).to(logits.dtype)
        return (
            logits.index_copy(0, rows, shown.expand(len(rows), -1)),
            own.index_copy(0, rows, put.to(own.dtype).expand(len(rows), -1)),
            ids.index_copy(0, rows, chosen.to(ids.dtype).expand(len(rows), -1)),
        )
