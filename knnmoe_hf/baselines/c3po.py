"""
C3PO (arXiv 2504.07964): the routing of a question's last token, moved towards that of similar questions.

Of references that the frozen model answers correctly, the routing weights w (L, E) of the prompt's last token in the
last five MoE layers are kept, softmaxes over all experts, with an embedding of the question. A new question's own w is
moved in one of three ways, or replaced as in the released code, and put in its place at the last token of the prompt.
Every other token is routed by the gates: also those that are generated, but not in the released code.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from knnmoe_hf.baselines.answers import answered_correctly
from knnmoe_hf.baselines.base import Cost, FittedTensors, constant, overriding
from knnmoe_hf.baselines.last_token import PutWeights, check_softmax
from knnmoe_hf.baselines.neighborhoods import Embedded, Neighbors, answer_nll, gaussian, read_prompts
from knnmoe_hf.errors import shown
from knnmoe_hf.models.gates import Gate, find_gates
from knnmoe_hf.models.hooks import hooked
from knnmoe_hf.models.modes import frozen
from knnmoe_hf.tasks.items import Item, Prompt

OPTIMIZERS = {"gd": torch.optim.SGD, "adam": torch.optim.Adam}


@dataclass(frozen=True)
class Question:
    """
    What the frozen model makes of a new question.

    Attributes:
        embedding: (d,).
        start: (L, E), its own routing weights.
    """

    embedding: Tensor
    start: Tensor


@dataclass
class _C3PO(FittedTensors):
    """What all forms share: the references, and where the weights are put."""

    source: ClassVar[str] = "arXiv 2504.07964"
    per_item: ClassVar[bool] = True
    also_later_tokens: ClassVar[bool] = False

    neighbors: int = constant(3, "References that a question's routing is moved towards.")
    most_similar: float = constant(0.95, "References whose similarity to the question is larger are left out.")
    layers: int = constant(5, "Last MoE layers whose routing is changed.")

    def fit(self, model: nn.Module, references: Sequence[Item], seed: int = 0, tokenizer=None) -> None:
        """
        Finds the references that the frozen model answers correctly, and reads their routing.

        Raises:
            ValueError: if there are fewer than `neighbors` of them.
            UnsupportedModelError: for a router without a softmax.
        """
        gates = self._gates(model)
        with overriding(model, {}):
            kept = [number for number, right in enumerate(answered_correctly(model, references)) if right]
        if len(kept) < self.neighbors:
            raise ValueError(
                f"C3PO needs {self.neighbors} references that the frozen model answers correctly, and there are "
                f"{len(kept)} of {len(references)}: give more references."
            )
        embeddings, pathways = read_prompts(model, [references[number].prompt.tokens for number in kept], gates)
        found = {"embeddings": embeddings, "pathways": pathways, "kept": torch.tensor(kept)}
        self.restore(model, references, found)

    def restore(self, model: nn.Module, references: Sequence[Item], state: Mapping[str, Tensor]) -> None:
        """As `Method.restore`; fits nothing."""
        super().restore(model, references, state)
        self._pathways = state["pathways"]
        self._embedded = Embedded(state["embeddings"], self.most_similar)
        self._references = [references[number] for number in state["kept"].tolist()]

    @property
    def fit_passes(self) -> float:
        """About two: one forward for the choices and one for the prompt, and none backward."""
        return 2.0

    @property
    def fit_key(self) -> str:
        """All forms keep the same references: their embeddings, routing weights and numbers."""
        return repr(("c3po", self.neighbors, self.layers))

    @contextmanager
    def apply(self, model: nn.Module, prompt: Prompt | None = None) -> Iterator[nn.Module]:
        """
        The model with the question's last token routed anew; as it is if every reference is too similar to it.

        Raises:
            ValueError: without a prompt, or before a fit.
        """
        self.state()
        if prompt is None:
            raise ValueError("C3PO adapts to each question, and was given none: pass the prompt.")
        gates = self._gates(model)
        with hooked(model):  # so that hooks are put on the model once
            with frozen(model, checkpointing=False):
                embeddings, pathways = read_prompts(model, [prompt.tokens], gates)
                weights = self._moved(model, gates, Question(embeddings[0], pathways[0]))
            place, later = len(prompt.tokens) - 1, self.also_later_tokens
            put = {} if weights is None else _put(gates, weights, place, later)
            with overriding(model, put):
                yield model

    @abstractmethod
    def _moved(self, model: nn.Module, gates: list[Gate], question: Question) -> Tensor | None:
        """The weights (L, E) to route by; None if no reference may be a neighbour."""

    def _gates(self, model: nn.Module) -> list[Gate]:
        gates = find_gates(model)[-self.layers :]
        check_softmax(gates)
        return gates

    @property
    def cost(self) -> Cost:
        """One pass that reads the question."""
        return Cost(forward=1)


@dataclass
class _Moves(_C3PO):
    """The forms of the paper, which move only the experts of the largest weights."""

    experts: int = constant(20, "Experts of each layer that may move: those of the largest weights at the start.")

    def _movable(self, start: Tensor) -> Tensor:
        """(L, E) bool."""
        largest = start.topk(min(self.experts, start.shape[-1]), dim=-1).indices
        return torch.zeros_like(start, dtype=torch.bool).scatter(-1, largest, True)


@dataclass
class ModeFinding(_Moves):
    """
    One step of mean shift: towards the references of the nearest routing weights, `a w + (1 - a) mean`.

    The mean is weighted by a Gaussian of the distance between routing weights (L E).
    """

    share: float = constant(0.5, "a: the share of the question's own weights.", ours=True)

    def _moved(self, model: nn.Module, gates: list[Gate], question: Question) -> Tensor | None:
        allowed, start = self._embedded.allowed(question.embedding), question.start
        if not len(allowed):
            return None
        squares = (self._pathways[allowed] - start).square().flatten(1).sum(-1)
        order = squares.argsort(stable=True)[: self.neighbors]
        mean = torch.einsum("n,nle->le", gaussian(squares[order]), self._pathways[allowed[order]])
        return on_simplex(self.share * start + (1 - self.share) * mean, start, self._movable(start))


@dataclass
class _Surrogate(_Moves):
    """Forms that try a question's weights on its neighbours, whose answers are known."""

    def _moved(self, model: nn.Module, gates: list[Gate], question: Question) -> Tensor | None:
        near = self._embedded.nearest(question.embedding, self.neighbors)
        return self._tried(model, gates, question.start, near) if len(near) else None

    @abstractmethod
    def _tried(self, model: nn.Module, gates: list[Gate], start: Tensor, near: Neighbors) -> Tensor:
        """The weights (L, E) to route by."""

    def _loss(self, model: nn.Module, gates: list[Gate], weights: Tensor, near: Neighbors) -> Tensor:
        """
        The surrogate loss: kernel-weighted mean of the neighbours' NLL per token of their right answers (ours), when
        these weights (L, E) are imposed on the last token of each neighbour's prompt. One pass of each neighbour.
        """
        items = [self._references[number] for number in near.indices.tolist()]
        places = torch.tensor([len(item.prompt.tokens) - 1 for item in items])
        with overriding(model, _put(gates, weights, places)):
            nll = answer_nll(model, [(item.prompt.tokens, item.choices[item.answer]) for item in items])
        lengths = torch.tensor([len(item.choices[item.answer]) for item in items], device=nll.device)
        return (near.kernel.to(nll.device) * nll / lengths).sum()

    @property
    def nbytes(self) -> int:
        """Of what was fitted and of the references' token ids, which must be at hand too (4 bytes each)."""
        return super().nbytes + 4 * sum(len(item.tokens) for item in self._references)


@dataclass
class KernelRegression(_Surrogate):
    """`a w + (1 - a) w'` with w' the kernel-weighted mean of the neighbours, and the a of the least surrogate loss."""

    shares: int = constant(11, "Number of values of a that are tried, evenly from 0 to 1.", ours=True)

    @torch.no_grad()
    def _tried(self, model: nn.Module, gates: list[Gate], start: Tensor, near: Neighbors) -> Tensor:
        mean = torch.einsum("n,nle->le", near.kernel, self._pathways[near.indices])
        movable = self._movable(start)
        mixed = [on_simplex(a * start + (1 - a) * mean, start, movable) for a in torch.linspace(1, 0, self.shares)]
        losses = torch.stack([self._loss(model, gates, weights, near) for weights in mixed])
        return mixed[int(losses.argmin())]

    @property
    def cost(self) -> Cost:
        """The neighbours are run for each value of a."""
        return Cost(forward=1 + self.shares * self.neighbors)


@dataclass
class GradientDescent(_Surrogate):
    """
    Neighbourhood gradient descent: w falls along the gradient of the surrogate loss, from the question's own w.

    After each step w is cut at 0 and scaled to its sum before (ours). The equations are of plain gradient descent
    (`"gd"`); the released code of the method's predecessor R2-T2 (arXiv 2502.20395) uses Adam.

    Raises:
        ValueError: for an unknown optimiser.
    """

    steps: int = constant(10, "Steps of the descent.")
    rate: float = constant(1e-2, "Learning rate of the first step.")
    last_rate: float = constant(1e-5, "Learning rate of the last step; between them it falls as a cosine.")
    optimizer: str = constant("adam", "gd or adam.", ours=True)

    def __post_init__(self):
        super().__post_init__()
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={shown(self.optimizer)} is not allowed: choose one of gd, adam.")

    def _tried(self, model: nn.Module, gates: list[Gate], start: Tensor, near: Neighbors) -> Tensor:
        movable, weights = self._movable(start), start.clone().requires_grad_()
        optimizer = OPTIMIZERS[self.optimizer]([weights], lr=self.rate)
        for rate in cosine_rates(self.rate, self.last_rate, self.steps):
            with torch.enable_grad():
                (weights.grad,) = torch.autograd.grad(self._loss(model, gates, weights, near), weights)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            with torch.no_grad():
                weights.copy_(on_simplex(weights, start, movable))
        return weights.detach()

    @property
    def cost(self) -> Cost:
        """The neighbours are run forward and backward in each step."""
        runs = self.steps * self.neighbors
        return Cost(forward=1 + runs, backward=runs)


@dataclass
class Released(_C3PO):
    """
    What the released code does: the mean of the neighbours' weights, by their similarity, replaces the question's own.

    There is no loss and no share of the question's own weights, and all experts take part. The code puts it in the
    place of the last token of every call, so that generated tokens get it too; here the tokens of an answer that is
    scored do as well, as if they had been generated.
    """

    source: ClassVar[str] = "github.com/tianyi-lab/C3PO (e4e064a)"
    also_later_tokens: ClassVar[bool] = True

    most_similar: float = constant(0.95, "As in the other forms; the released code leaves none out.", ours=True)

    def _moved(self, model: nn.Module, gates: list[Gate], question: Question) -> Tensor | None:
        near = self._embedded.nearest(question.embedding, self.neighbors)
        if not len(near):
            return None
        similarities = near.similarities.clamp(min=1e-6)  # ours: none is negative with the source's embeddings
        return torch.einsum("n,nle->le", similarities / similarities.sum(), self._pathways[near.indices])


def cosine_rates(first: float, last: float, steps: int) -> list[float]:
    """Learning rates that fall from the first to the last as half a cosine."""
    falls = (math.cos(math.pi * step / max(1, steps - 1)) for step in range(steps))
    return [last + (first - last) * (1 + fall) / 2 for fall in falls]


def on_simplex(weights: Tensor, start: Tensor, movable: Tensor) -> Tensor:
    """
    Weights that are at least 0 and have the same sum in each layer as at the start (ours).

    Args:
        weights: (L, E), moved.
        start: (L, E), as they were, which is how all others stay.
        movable: (L, E) bool; where all of these fell to 0, they are as they were.
    """
    moved, sums = weights.clamp(min=0) * movable, (start * movable).sum(-1, keepdim=True)
    total = moved.sum(-1, keepdim=True)
    scaled = moved * (sums / total.clamp(min=torch.finfo(moved.dtype).tiny))
    return torch.where(movable, torch.where(total > 0, scaled, start), start)


def _put(gates: list[Gate], weights: Tensor, place: Tensor | int, and_later: bool = False) -> dict[int, PutWeights]:
    return {gate.layer: PutWeights(gate, weights[number], place, and_later) for number, gate in enumerate(gates)}
