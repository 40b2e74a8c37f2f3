"""DSMoE: a constant bonus for the few experts that work most on a domain's important tokens."""

import math
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from knnmoe_hf.baselines.base import FittedTensors, constant
from knnmoe_hf.baselines.constant_bias import added_biases
from knnmoe_hf.errors import shown
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.modes import frozen
from knnmoe_hf.models.offload import input_device
from knnmoe_hf.models.recording import gate_outputs
from knnmoe_hf.tasks.items import Item, Prompt

STOP_WORDS = (
    "a about after all also am an and any are as at be because been before but by can could did do does for from had "
    "has have he her him his how i if in into is it its just may me might more most must my no nor not of on one only "
    "or other our out over shall she should so some such than that the their them then there these they this those "
    "through to too under up us very was we were what when where which while who whom why will with would you your"
)
MODES = ("multiplicative", "additive")


@dataclass
class DSMoE(FittedTensors):
    """
    Adds a constant to the logits of the N experts, over all layers, with the highest score on the references.

    A token's importance is the norm of gradient times embedding, of the next-token loss on its own text; it is
    important if that is above the percentile of its text and it is neither a stop word nor punctuation. An expert's
    score is (n+ - n-) p: how often it is chosen for important tokens, less how often for others, times its share of
    all choices in all layers. No label is needed.
    """

    source: ClassVar[str] = "arXiv 2604.05267; giangdip2410/Domain-specific-Experts"

    percentile: float = constant(50.0, "Of the importance in a text; a token above it is important.")
    num_experts: int = constant(50, "Experts with a bonus, over all layers.")
    strength: float = constant(0.1, "How large the bonus is.")
    mode: str = constant("multiplicative", "Bonus: log(1 + strength) if multiplicative, strength if additive.")
    stop_words: str = constant(STOP_WORDS, "Tokens that are never important, besides punctuation.", ours=True)

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"mode={shown(self.mode)} is not allowed: choose one of {', '.join(MODES)}.")
        if self.percentile > 100:
            raise ValueError(f"percentile={shown(self.percentile)} is not allowed: use a number from 0 to 100.")

    def fit(self, model: nn.Module, references: Sequence[Item], seed: int = 0, tokenizer=None) -> None:
        """As `Method.fit`; without a tokenizer no token is taken for a stop word or punctuation."""
        if not references:
            raise ValueError("0 references are too few for DSMoE: give some.")
        words = set(self.stop_words.split())
        chosen = {gate.layer: torch.zeros(2, gate.num_experts) for gate in find_gates(model)}  # n-, n+
        with frozen(model, checkpointing=False):
            for item in references:
                importance, experts = _read(model, item.tokens)
                important = importance > torch.quantile(importance, self.percentile / 100)
                if tokenizer is not None:
                    important &= ~torch.tensor([is_filler(tokenizer.decode([one]), words) for one in item.tokens])
                for layer, ids in experts.items():
                    for group in (0, 1):
                        found = ids[important == bool(group)].flatten()
                        chosen[layer][group] += torch.bincount(found, minlength=chosen[layer].shape[1])
        self._found = self._bonus(scores_of(chosen))

    def _bonus(self, scores: Mapping[int, Tensor]) -> dict[str, Tensor]:
        bonus = math.log1p(self.strength) if self.mode == "multiplicative" else self.strength
        every = torch.cat(list(scores.values()))
        is_best = torch.zeros(len(every)).index_fill(0, every.topk(min(self.num_experts, len(every))).indices, bonus)
        parts = is_best.split([len(one) for one in scores.values()])
        return {str(layer): part.clone() for layer, part in zip(scores, parts)}

    @contextmanager
    def apply(self, model: nn.Module, prompt: Prompt | None = None) -> Iterator[nn.Module]:
        """As `Method.apply`; raises ValueError before `fit`."""
        with added_biases(model, self.state()):
            yield model


def is_filler(text: str, words: set[str]) -> bool:
    """Whether a token's text is a stop word or punctuation."""
    bare = text.strip()
    return bare.lower() in words or bool(bare) and all(sign in string.punctuation for sign in bare)


def scores_of(chosen: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """(n+ - n-) p of each expert (E,), by layer, from n- and n+: how often it was chosen, (2, E)."""
    total = sum(counts.sum() for counts in chosen.values())
    return {layer: (counts[1] - counts[0]) * counts.sum(0) / total for layer, counts in chosen.items()}


def _read(model: nn.Module, tokens: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The importance of each token of a text (S,) float32, and each layer's expert ids (S, k), on the CPU."""
    ids = torch.tensor([tokens], device=input_device(model))
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad(), gate_outputs(model) as outputs:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            (gradient,) = torch.autograd.grad(loss, kept[-1])
    finally:
        handle.remove()
    importance = (gradient.float() * kept[-1].detach().float()).norm(dim=-1)[0].cpu()
    return importance, {layer: output[2].detach().cpu() for layer, output in outputs.items()}
