"""What the frozen model computes of questions, and which references are near to one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knnmoe_hf.baselines.base import overriding
from knnmoe_hf.baselines.last_token import ReadWeights
from knnmoe_hf.data.batches import as_list
from knnmoe_hf.models.gates import Gate, find_decoder, find_gates
from knnmoe_hf.models.offload import input_device

BATCH = 8
"""Sequences in a forward pass of a fit."""


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, S) of token ids, padded on the right with id 0."""
    longest = max(map(len, sequences))
    ids = [as_list(tokens) + [0] * (longest - len(tokens)) for tokens in sequences]
    mask = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in sequences]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


@torch.no_grad()
def read_prompts(
    model: nn.Module, prompts: Sequence[Sequence[int]], gates: Sequence[Gate] = ()
) -> tuple[Tensor, Tensor]:
    """
    What the frozen model computes of prompts, in one forward pass each.

    Args:
        model: frozen, in eval mode; nothing that is attached to it is in force here.
        prompts: token ids of n prompts.
        gates: of L layers, all with as many experts.

    Returns:
        Their embeddings (n, d), which are mean last hidden states, and the routing weights of their last tokens
        (n, L, E), softmaxes over all experts; float32 on the CPU.

    Raises:
        ValueError: for a prompt without tokens.
    """
    if not all(map(len, prompts)):
        raise ValueError("a question has no tokens, by which its neighbours are found: leave texts without one out.")
    decoder = find_decoder(model, find_gates(model))
    embeddings, weights = [], []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        readers = {gate.layer: ReadWeights(torch.tensor([len(prompt) - 1 for prompt in part])) for gate in gates}
        batch = padded(part, input_device(model))
        with overriding(model, readers):
            hidden = decoder(**batch, use_cache=False).last_hidden_state.float()
        mask = batch["attention_mask"].to(hidden.device)[..., None]
        embeddings.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
        weights.append(torch.stack([readers[gate.layer].found for gate in gates], dim=1) if gates else torch.zeros(0))
    return torch.cat(embeddings), torch.cat(weights)


def answer_nll(model: nn.Module, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """
    The negative log-likelihood of each of B answers after its prompt, in nats, in one forward pass of B examples.

    Args:
        model: with whatever is in force.
        sequences: pairs of token ids, a prompt and its answer.

    Returns:
        (B,) float32, summed over the answer's tokens; gradients pass.
    """
    batch = padded([[*prompt, *answer] for prompt, answer in sequences], input_device(model))
    first = min(len(prompt) for prompt, _ in sequences) - 1  # no logits are needed before
    kept = batch["input_ids"].shape[1] - first
    logits = model(**batch, use_cache=False, logits_to_keep=kept).logits.float()
    targets = torch.full(logits.shape[:2], -100)
    for row, (prompt, answer) in enumerate(sequences):
        begin = len(prompt) - 1 - first
        targets[row, begin : begin + len(answer)] = torch.tensor(list(answer))
    return F.cross_entropy(logits.transpose(1, 2), targets.to(logits.device), reduction="none").sum(1)


@dataclass(frozen=True)
class Neighbors:
    """
    The references nearest to a question.

    Attributes:
        indices: (k,) which they are.
        kernel: (k,) their weights, positive with sum 1.
        similarities: (k,) cosines with the question.
    """

    indices: Tensor
    kernel: Tensor
    similarities: Tensor

    def __len__(self) -> int:
        return len(self.indices)


class Embedded:
    """
    Embeddings of n references, for finding the nearest.

    Embeddings are centred at the references' mean and scaled to length 1 (ours): without that, all mean hidden states
    of a language model are alike, and so are all prompts of one template.

    Args:
        embeddings: (n, d) as `read_prompts` returns them.
        limit: references whose cosine with a question is larger are not its neighbours.
    """

    def __init__(self, embeddings: Tensor, limit: float = math.inf):
        self.center, self.limit = embeddings.mean(0), limit
        self.units = self._scaled(embeddings)

    def similarities(self, embedding: Tensor) -> Tensor:
        """(n,) cosines of the references with a question's embedding (d,)."""
        return self.units @ self._scaled(embedding)

    def allowed(self, embedding: Tensor, itself: int | None = None) -> Tensor:
        """(m,) indices of the references that may be neighbours of a question; `itself` is its index, if it is one."""
        allowed = self.similarities(embedding) <= self.limit
        if itself is not None:
            allowed[itself] = False
        return allowed.nonzero().squeeze(1)

    def nearest(self, embedding: Tensor, k: int, itself: int | None = None) -> Neighbors:
        """At most k neighbours, nearest first, weighted by a Gaussian of their distance; `itself` as in `allowed`."""
        similarities, allowed = self.similarities(embedding), self.allowed(embedding, itself)
        order = similarities[allowed].argsort(descending=True, stable=True)[:k]
        near = allowed[order]
        squares = 2 - 2 * similarities[near]  # of the distance between vectors of length 1
        return Neighbors(near, gaussian(squares), similarities[near])

    def _scaled(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings - self.center, dim=-1)


def gaussian(squares: Tensor) -> Tensor:
    """exp(-d^2 / (2 sigma^2)), divided by its sum, for squared distances (k,); sigma is their median (ours)."""
    if not len(squares):
        return squares
    squares = squares.clamp(min=0)
    return torch.softmax(-squares / (2 * squares.median().clamp(min=1e-12)), dim=0)
