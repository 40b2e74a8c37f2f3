"""The log-likelihoods that a model gives to the choices of items, computed as lm-evaluation-harness does."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knnmoe_hf.baselines.neighborhoods import padded
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
    batch = padded([item.prompt.tokens + choice for choice in item.choices], input_device(model))
    with evaluating(model):
        logits = model(**batch, use_cache=False).logits
    start = max(1, len(item.prompt.tokens))  # of the choices
    logits = logits[:, start - 1 : -1].float().transpose(1, 2).cpu()
    ids, mask = (batch[name][:, start:].cpu() for name in ("input_ids", "attention_mask"))
    return -(F.cross_entropy(logits, ids, reduction="none") * mask).sum(-1)


def answered_correctly(model: nn.Module, items: Sequence[Item]) -> list[bool]:
    """For each item, whether the right choice is the likeliest; True, without a forward, where there is one choice."""
    return [len(item.choices) == 1 or int(choice_scores(model, item).argmax()) == item.answer for item in items]
