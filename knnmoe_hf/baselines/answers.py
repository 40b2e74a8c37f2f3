"""The log-likelihoods that a model gives to the choices of items, computed as lm-evaluation-harness does."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.models.offload import input_device
from knnmoe_hf.tasks.items import Item


@torch.no_grad()
def choice_scores(model: nn.Module, item: Item) -> Tensor:
    """
    The log-likelihood of each choice after the prompt, in nats: (choices,) float32.

    One forward of all choices in one batch, padded on the right; a choice after an empty prompt is scored from its
    second token on.
    """
    rows = [item.prompt.tokens + choice for choice in item.choices]
    length, device = max(map(len, rows)), input_device(model)
    ids, mask = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(2))
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = torch.tensor(row), 1
    with evaluating(model):
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    start = max(1, len(item.prompt.tokens))  # of the choices
    logits = logits[:, start - 1 : -1].float().transpose(1, 2).cpu()
    return -(F.cross_entropy(logits, ids[:, start:], reduction="none") * mask[:, start:]).sum(-1)


def answered_correctly(model: nn.Module, items: Sequence[Item]) -> list[bool]:
    """For each item, whether the right choice is the likeliest; True, without a forward, where there is one choice."""
    return [len(item.choices) == 1 or int(choice_scores(model, item).argmax()) == item.answer for item in items]
