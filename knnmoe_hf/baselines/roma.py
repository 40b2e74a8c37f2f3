"""RoMA, which trains gates so that questions answered alike are routed alike, and training the gates alone."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from knnmoe_hf.baselines.answers import answered_correctly
from knnmoe_hf.baselines.base import constant
from knnmoe_hf.baselines.neighborhoods import Embedded, read_prompts
from knnmoe_hf.baselines.tuning import RATES, Tuned, descend, next_token_loss, with_weights
from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.models.gates import Gate, find_gates
from knnmoe_hf.models.recording import gate_outputs
from knnmoe_hf.tasks.items import Item, rows_of


@dataclass
class RouterOnly(Tuned):
    """The gates' weights trained on the next-token loss, everything else frozen: RoMA with lambda 0, in all layers."""

    source: ClassVar[str] = "lambda 0 of RoMA, arXiv 2511.07419"
    keeps_weights: ClassVar[bool] = False

    learning_rates: Sequence[float] = constant([3e-3], RATES, ours=True)
    layers: int | None = constant(
        None, "How many of the last layers have their gates trained; null for all.", ours=True
    )

    def _gates(self, model: nn.Module) -> list[Gate]:
        gates = find_gates(model)
        return gates if self.layers is None else gates[-self.layers :]

    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of the trained gates, by name."""
        return {
            f"{gate.name}.{name}": parameter
            for gate in self._gates(model)
            for name, parameter in gate.module.named_parameters()
        }

    def _train(self, model: nn.Module, items: Sequence[Item], seed: int, rate: float) -> dict[str, Tensor]:
        return self._descend(model, items, seed, rate, next_token_loss(model, rows_of(items, self.answer_only)))

    def _descend(self, model: nn.Module, items: Sequence[Item], seed: int, rate: float, loss, **how) -> dict:
        weights = self._weights(model)
        values = {name: weight.detach().clone() for name, weight in weights.items()}
        with with_weights(weights, values):
            trained = list(weights.values())
            descend(trained, len(items), loss, rate, self.epochs, self.examples_per_step, seed, **how)
        return values

    @contextmanager
    def _with(self, model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        with with_weights(self._weights(model), state):
            yield model


@dataclass
class RoMA(RouterOnly):
    """
    Routing manifold alignment: the loss of the answer, and how far a question's routing is from its neighbours'.

    L_i = CE_i + lambda sum_j W_ij ||r_i - r_j||^2, with r the softmax of the gates' logits at the last token of the
    prompt, of all trained layers one after the other. The neighbours j are those references near question i that the
    model answers correctly; W_ij are Gaussian weights that add up to 1; no gradient passes to r_j. Who answers
    correctly, and r_j, are found again at the beginning of each epoch, as the gates change.
    """

    source: ClassVar[str] = "arXiv 2511.07419"

    learning_rates: Sequence[float] = constant([1e-4, 5e-4], RATES, ours=True)
    lambdas: Sequence[float] = constant(
        [0.1, 1.0, 10.0], "Weights of the second term; the best on held-out references is taken.", ours=True
    )
    answer_only: bool = constant(True, "Whether only answers are targets, not questions.")
    layers: int | None = constant(5, "How many of the last layers have their gates trained; null for all.")
    neighbors: int = constant(3, "Correctly answered references that a question is drawn to.")

    def candidates(self) -> list[dict[str, Any]]:
        """Every rate with every lambda."""
        return [{"rate": rate, "lam": lam} for rate, lam in itertools.product(self.learning_rates, self.lambdas)]

    def _train(self, model: nn.Module, items: Sequence[Item], seed: int, rate: float, lam: float) -> dict[str, Tensor]:
        manifold = _Manifold(model, items, self._gates(model), self.neighbors)
        next_token = next_token_loss(model, rows_of(items, self.answer_only))

        def loss(places: list[int]) -> Tensor:
            with gate_outputs(model) as outputs:
                answers = next_token(places)
            return answers + lam * manifold.distance(places, manifold.routing(outputs, places))

        return self._descend(model, items, seed, rate, loss, before_epoch=manifold.look_again)


class _Manifold:
    """The routing of the questions that are answered correctly, and how far from it that of a batch is."""

    def __init__(self, model: nn.Module, items: Sequence[Item], gates: Sequence[Gate], neighbors: int):
        self.model, self.items, self.gates, self.neighbors = model, items, gates, neighbors
        self.questions = [item.prompt.tokens or item.tokens for item in items]  # a text without a question is its own
        self.embeddings, _ = read_prompts(model, self.questions)

    def look_again(self) -> None:
        """
        Finds who is answered correctly now, and how they are routed.

        Raises:
            ValueError: if there are not two of them.
        """
        self.right = [place for place, right in enumerate(answered_correctly(self.model, self.items)) if right]
        if len(self.right) < 2:
            raise ValueError(
                f"RoMA needs two references that the model answers correctly and found {len(self.right)} among "
                f"{len(self.items)}: give more references, or use router_only."
            )
        self.near = Embedded(self.embeddings[self.right])
        self.targets = read_prompts(self.model, [self.questions[place] for place in self.right], self.gates)[1]

    def routing(self, outputs: Mapping[int, GateOutput], places: Sequence[int]) -> Tensor:
        """(n, layers, E) float32: the softmax at the last token of each question of a batch padded on the right."""
        rows = torch.arange(len(places))
        last = torch.tensor([len(self.questions[place]) - 1 for place in places])
        logits = (outputs[gate.layer][0].float().unflatten(0, (len(places), -1))[rows, last] for gate in self.gates)
        return torch.stack([one.softmax(-1) for one in logits], dim=1)

    def distance(self, places: Sequence[int], routing: Tensor) -> Tensor:
        """sum_j W_ij ||r_i - r_j||^2 for r_i (n, layers, E), the mean over the n questions at these places."""
        found = []
        for place, own in zip(places, routing):
            itself = self.right.index(place) if place in self.right else None
            near = self.near.nearest(self.embeddings[place], self.neighbors, itself)
            squares = (own - self.targets[near.indices].to(own.device)).square().sum((-2, -1))
            found.append(near.kernel.to(own.device) @ squares)
        return torch.stack(found).mean()
