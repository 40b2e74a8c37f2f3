"""Answered references before the question, as the harness's few-shot prompts have them."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from knnmoe_hf.baselines.base import Cost, FittedTensors, constant, overriding
from knnmoe_hf.baselines.neighborhoods import Embedded, read_prompts
from knnmoe_hf.tasks.items import Item, Prompt

SEPARATOR = "\n\n"
"""Between examples, and between the last one and the question, as in the harness."""


@dataclass
class _InContext(FittedTensors):
    """
    What both forms share: how examples are put before a prompt.

    An example is a reference's prompt and its right choice; each is followed by the separator, tokenised by itself.
    Whole examples are left out where not all fit into the model's context window beside the prompt and the longest
    choice of any reference: the last drawn, or the least similar, first.
    """

    acts_on: ClassVar[tuple[str, ...]] = ("prompt",)

    examples: int = constant(5, "References put before each question.", ours=True)

    def fit(self, model: nn.Module, references: Sequence[Item], seed: int = 0, tokenizer=None) -> None:
        """
        Chooses the examples, or makes references ready to be chosen.

        Raises:
            ValueError: for fewer references than `examples`, or without a tokenizer.
        """
        if len(references) < self.examples:
            raise ValueError(
                f"{self.examples} examples need as many references, and there are {len(references)}: give more, or "
                "use fewer examples."
            )
        if tokenizer is None:
            raise ValueError("examples are separated by an empty line, which no tokenizer was given for: pass one.")
        separator = torch.tensor(tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"])
        self.restore(model, references, {"separator": separator, **self._learned(model, references, seed)})

    def restore(self, model: nn.Module, references: Sequence[Item], state: Mapping[str, Tensor]) -> None:
        """As `Method.restore`; fits nothing."""
        super().restore(model, references, state)
        self._model = model
        separator = tuple(state["separator"].tolist())
        self._texts = [item.tokens + separator for item in references]
        longest = max(len(choice) for item in references for choice in item.choices)
        self._room = model.config.get_text_config().max_position_embeddings - longest

    @contextmanager
    def apply(self, model: nn.Module, prompt: Prompt | None = None) -> Iterator[nn.Module]:
        """The frozen model: all that changes is the prompt."""
        with overriding(model, {}):
            yield model

    def prepend(self, prompt: Prompt) -> tuple[int, ...]:
        """
        The examples for this prompt.

        Raises:
            ValueError: before a fit.
        """
        self.state()
        kept, left = [], self._room - len(prompt.tokens)
        for text in (self._texts[number] for number in self._chosen(prompt)):
            left -= len(text)
            if left < 0:
                break
            kept.append(text)
        return tuple(token for text in self._in_order(kept) for token in text)

    @property
    def fit_passes(self) -> float:
        """At most one forward pass."""
        return 0.3

    @property
    def nbytes(self) -> int:
        """Bytes of the references' token ids, 4 each, and of what `fit` found."""
        return 4 * sum(len(self._texts[number]) for number in self._at_hand()) + super().nbytes

    @abstractmethod
    def _learned(self, model: nn.Module, references: Sequence[Item], seed: int) -> Mapping[str, Tensor]:
        """What `fit` finds."""

    @abstractmethod
    def _chosen(self, prompt: Prompt) -> list[int]:
        """Indices of the references for a prompt; where not all fit, the last ones are left out."""

    @abstractmethod
    def _at_hand(self) -> Sequence[int]:
        """Numbers of the references that are chosen from."""

    def _in_order(self, texts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return texts


@dataclass
class InContextFixed(_InContext):
    """The same references before every question, drawn at random by the seed."""

    source: ClassVar[str] = "arXiv 2005.14165"

    def _learned(self, model: nn.Module, references: Sequence[Item], seed: int) -> Mapping[str, Tensor]:
        drawn = torch.randperm(len(references), generator=torch.Generator().manual_seed(seed))
        return {"drawn": drawn[: self.examples]}

    def _chosen(self, prompt: Prompt) -> list[int]:
        return self._at_hand()

    def _at_hand(self) -> list[int]:
        return self.state()["drawn"].tolist()

    @property
    def cost(self) -> Cost:
        """The tokens of the examples; as if there were none before a fit."""
        if self._found is None:
            return Cost()
        return Cost(prompt_tokens=sum(len(self._texts[number]) for number in self._at_hand()))


@dataclass
class InContextRetrieved(_InContext):
    """
    The references nearest to each question, the nearest right before it (ours).

    References are near if their means of last hidden states are (ours; see
    `knnmoe_hf.baselines.neighborhoods.Embedded`).
    """

    source: ClassVar[str] = "arXiv 2101.06804"

    def restore(self, model: nn.Module, references: Sequence[Item], state: Mapping[str, Tensor]) -> None:
        """As `Method.restore`; fits nothing."""
        super().restore(model, references, state)
        self._embedded = Embedded(state["embeddings"])

    def _learned(self, model: nn.Module, references: Sequence[Item], seed: int) -> Mapping[str, Tensor]:
        return {"embeddings": read_prompts(model, [item.prompt.tokens for item in references])[0]}

    def _chosen(self, prompt: Prompt) -> list[int]:
        (embedding,), _ = read_prompts(self._model, [prompt.tokens])
        return self._embedded.nearest(embedding, self.examples).indices.tolist()

    def _at_hand(self) -> Sequence[int]:
        return range(len(self._texts))

    def _in_order(self, texts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return texts[::-1]

    @property
    def cost(self) -> Cost:
        """One pass that embeds the question; tokens of as many references of mean length, once they are known."""
        if self._found is None:
            return Cost(forward=1)
        mean = sum(map(len, self._texts)) / len(self._texts)
        return Cost(forward=1, prompt_tokens=self.examples * mean)
