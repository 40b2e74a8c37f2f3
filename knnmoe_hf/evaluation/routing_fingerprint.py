"""
A fingerprint of how a model routes some text, in the style of RouteMark, and whether a memory's model routes like it.

The fingerprint that every memory has (`knnmoe_hf.memory.fingerprint`) is of the gates' weights. A model whose gates
are the same may still route otherwise, as after fine-tuning its attention: only running text shows that.

RouteMark (arXiv 2508.01784) compares, for each expert, its mean score on probe texts and which of them it prefers. How
the two are compared and weighed is ours.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knnmoe_hf.data.batches import as_list
from knnmoe_hf.evaluation.routing_measures import jensen_shannon
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.gates import Gate, find_gates, gate_logits
from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.models.offload import input_device
from knnmoe_hf.models.recording import gate_outputs

LEAST_SIMILARITY = 0.9
"""The least similarity with which a memory is said to fit (ours)."""
EXAMPLES = 16
"""How many of a memory's references are run."""


@dataclass(frozen=True)
class RoutingFingerprint:
    """
    How n texts are routed.

    Attributes:
        scores: `{layer: (E,)}`, each expert's mean logit over all tokens, minus the mean over experts, on which no
            softmax depends.
        preferences: `{layer: (E, n)}`, the share of all choices that is this expert's in this text; sums to 1.
    """

    scores: Mapping[int, Tensor]
    preferences: Mapping[int, Tensor]

    @classmethod
    def of(cls, model: nn.Module, rows: Sequence[Mapping]) -> "RoutingFingerprint":
        """Of a model without any memory, on rows with `input_ids`, each run alone."""
        texts = [as_list(row["input_ids"]) for row in rows]
        return cls.of_logits(find_gates(model), _logits(model, texts))

    @classmethod
    def of_logits(cls, gates: Sequence[Gate], texts: Iterable[Mapping[int, Tensor]]) -> "RoutingFingerprint":
        """From the logits of each text, `{layer: (tokens, E)}`, and the gates that choose by them."""
        sums = {gate.layer: torch.zeros(gate.num_experts) for gate in gates}
        choices: dict[int, list[Tensor]] = {gate.layer: [] for gate in gates}
        for logits in texts:
            for gate in gates:
                found = logits[gate.layer].float().cpu()
                ids = gate.rule.to("cpu")(found, gate.top_k)[1]
                sums[gate.layer] += found.sum(0)
                choices[gate.layer].append(torch.bincount(ids.flatten(), minlength=gate.num_experts).float())
        counts = {layer: torch.stack(of_texts, dim=1) for layer, of_texts in choices.items()}
        preferences = {layer: table / table.sum() for layer, table in counts.items()}
        return cls({layer: total - total.mean() for layer, total in sums.items()}, preferences)

    def similarity(self, other: "RoutingFingerprint") -> float:
        """
        From 0 to 1, the mean over layers of two measures: the cosine of the scores, at least 0, and 1 less the
        Jensen-Shannon divergence of the preferences in bits.

        Raises:
            ValueError: for a fingerprint of other layers, experts or texts.
        """
        shapes = [{layer: table.shape for layer, table in one.preferences.items()} for one in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError("the fingerprints are of other layers, experts or texts: make both of the same rows.")
        found = []
        for layer, preferences in self.preferences.items():
            tables = (one.flatten()[None] for one in (preferences, other.preferences[layer]))
            cosine = F.cosine_similarity(self.scores[layer], other.scores[layer], dim=0).clamp(min=0)
            found.append((cosine + 1 - jensen_shannon(*tables)[0] / math.log(2)) / 2)
        return torch.stack(found).mean().item()


@dataclass(frozen=True)
class RoutingCheck:
    """
    Whether a model routes a memory's references as the model did that it was built for.

    Attributes:
        similarity: from 0 to 1, see `RoutingFingerprint.similarity`.
        examples: how many references were run.
    """

    similarity: float
    examples: int

    @property
    def fits(self) -> bool:
        """Whether the similarity is at least `LEAST_SIMILARITY`."""
        return self.similarity >= LEAST_SIMILARITY

    def sentence(self) -> str:
        """The result as a sentence."""
        what = "fits: the model routes" if self.fits else "may not fit: the model does not route"
        end = "" if self.fits else ", so build it anew for this model"
        return (
            f"The memory {what} {self.examples} of its references as they were routed when it was built "
            f"(similarity {self.similarity:.2f}, {LEAST_SIMILARITY:.2f} needed){end}."
        )


def check_routing(memory: RoutingMemory, model: nn.Module, examples: int = EXAMPLES) -> RoutingCheck:
    """
    Runs some of a memory's references through a model, and compares its logits with those of the memory's keys.

    A key is the gate's input in the model that the memory was built for, as far as the key codec kept it. So the gates
    of `model`, which must be those of the memory, give the logits of that model for it.

    Args:
        memory: with the text of its references.
        model: whose gates are those of the memory, which is not checked here.
        examples: at most so many references are run.

    Raises:
        ValueError: if the memory does not keep its references' text, or nothing of it has rows.
    """
    texts, provenance = memory.provenance.tokens() if memory.provenance is not None else {}, memory.provenance
    places = {}
    for example in texts:
        rows = ((provenance.example_ids == example) & (provenance.positions >= 0)).nonzero()[:, 0]
        if len(rows):
            places[example] = rows
    places = dict(list(places.items())[:examples])
    if not places:
        raise ValueError(
            "the memory does not keep its references' text, which this check runs: build it with its text."
        )
    gates = [gate for gate in find_gates(model) if gate.layer in memory.layers]
    now = _logits(model, [texts[example].tolist() for example in places])
    at_rows = (
        {layer: table[provenance.positions[rows].long()] for layer, table in logits.items()}
        for rows, logits in zip(places.values(), now)
    )
    then = ({gate.layer: _logits_of_keys(memory, gate, rows) for gate in gates} for rows in places.values())
    one, other = (RoutingFingerprint.of_logits(gates, logits) for logits in (at_rows, then))
    return RoutingCheck(one.similarity(other), len(places))


def _logits_of_keys(memory: RoutingMemory, gate: Gate, rows: Tensor) -> Tensor:
    layer = memory.layers[gate.layer]
    inputs = layer.encoder.inputs(layer.key_codes[rows])
    return inputs if layer.encoder.of_logits else gate_logits(gate, inputs.to(gate.weight.device)).cpu()


@torch.no_grad()
def _logits(model: nn.Module, texts: Sequence[Sequence[int]]) -> list[dict[int, Tensor]]:
    """Of each text, `{layer: (tokens, E)}` on the CPU, of the model without any memory."""
    device, found = input_device(model), []
    with evaluating(model), gate_outputs(model) as outputs:
        for ids in texts:
            model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
            found.append({layer: output[0].float().cpu() for layer, output in outputs.items()})
    return found
