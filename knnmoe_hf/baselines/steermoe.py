"""SteerMoE: experts that are chosen more for one kind of text than for another are forced on or off."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from knnmoe_hf.baselines.base import FittedTensors, constant, overriding, rerouted
from knnmoe_hf.calibration.background import machine_background
from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.gates import Gate, find_gates
from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.models.offload import input_device
from knnmoe_hf.models.recording import gate_outputs
from knnmoe_hf.tasks.items import Item, Prompt

_MARGIN = 0.01  # of the source, by which a forced expert is above, or below, all others


class ForcedExperts:
    """
    A `RoutingOverride`: experts that are forced on get the largest logit of the token and 0.01 more, those that are
    forced off the least and 0.01 less; then the model's own rule.

    The source takes log-softmax of the logits first. A softmax does not see the difference, and a sigmoid, which it
    has not, would. A correction bias or a limit on groups still decides where a family has them.

    Args:
        gate: of the layer.
        forced: (E,) 1 for on, -1 for off, 0 for neither.
    """

    def __init__(self, gate: Gate, forced: Tensor):
        self.gate, self.forced = gate, forced

    def __call__(self, x: Tensor, output: GateOutput, tokens: Tokens) -> GateOutput:
        logits, forced = output[0].float(), self.forced.to(output[0].device)
        above, below = logits.amax(-1, keepdim=True) + _MARGIN, logits.amin(-1, keepdim=True) - _MARGIN
        return rerouted(self.gate, output, logits.where(forced == 0, above.where(forced > 0, below)))


@dataclass
class SteerMoE(FittedTensors):
    """
    Forces experts on that references use more than ordinary text does, and off those that they use less.

    The difference is that of activation rates: in what share of the tokens an expert is among the chosen. Those with
    the largest differences over all layers are forced, at most top-k of a layer on.
    """

    source: ClassVar[str] = "arXiv 2509.09660; adobe-research/SteerMoE"

    share_on: float = constant(
        0.005, "Share of all experts that is forced on; 5 of 1,024 for safety there.", ours=True
    )
    share_off: float = constant(
        0.05, "Share of all experts that is forced off; 50 of 1,024 for faithfulness there.", ours=True
    )

    def fit(self, model: nn.Module, references: Sequence[Item], seed: int = 0, tokenizer=None) -> None:
        """
        As `Method.fit`; ordinary text is this machine's, as a calibration reads it.

        Raises:
            ValueError: without references or without a tokenizer.
        """
        if not references:
            raise ValueError("0 references are too few for SteerMoE: give some.")
        if tokenizer is None:
            raise ValueError("SteerMoE reads ordinary text beside the references: give the model's tokenizer.")
        kinds = machine_background(tokenizer, vocab_size=model.get_input_embeddings().weight.shape[0])
        ordinary = [row["input_ids"] for kind in kinds.values() for row in kind.rows]
        here, elsewhere = (rates(model, texts) for texts in ([item.tokens for item in references], ordinary))
        self._found = self._force({layer: here[layer] - elsewhere[layer] for layer in here}, find_gates(model))

    def _force(self, difference: Mapping[int, Tensor], gates: Sequence[Gate]) -> dict[str, Tensor]:
        """From differences of rates (E,) by layer to `ForcedExperts.forced`."""
        forced = {gate.layer: torch.zeros(gate.num_experts) for gate in gates}
        most = {gate.layer: gate.top_k for gate in gates}
        every = [(value, layer, at) for layer, one in difference.items() for at, value in enumerate(one.tolist())]
        counts = (round(share * len(every)) for share in (self.share_on, self.share_off))
        for sign, count in zip((1, -1), counts):
            ordered = sorted((one for one in every if sign * one[0] > 0), key=lambda one: -sign * one[0])
            for _, layer, at in ordered[:count]:
                if sign < 0 or (forced[layer] > 0).sum() < most[layer]:
                    forced[layer][at] = sign
        return {str(layer): one for layer, one in forced.items()}

    @contextmanager
    def apply(self, model: nn.Module, prompt: Prompt | None = None) -> Iterator[nn.Module]:
        """As `Method.apply`; raises ValueError before `fit`."""
        forced, gates = self.state(), {str(gate.layer): gate for gate in find_gates(model)}
        overrides = {gates[name].layer: ForcedExperts(gates[name], one) for name, one in forced.items() if one.any()}
        with overriding(model, overrides):
            yield model


@torch.no_grad()
def rates(model: nn.Module, texts: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """By layer, in what share of the tokens of some texts each expert is among the chosen: (E,) float32."""
    counts = {gate.layer: torch.zeros(gate.num_experts) for gate in find_gates(model)}
    device, total = input_device(model), sum(map(len, texts))
    with evaluating(model), gate_outputs(model) as outputs:
        for tokens in texts:
            model(input_ids=torch.tensor([list(tokens)], device=device), use_cache=False)
            for layer, output in outputs.items():
                counts[layer] += torch.bincount(output[2].flatten().cpu(), minlength=len(counts[layer]))
    return {layer: count / total for layer, count in counts.items()}
