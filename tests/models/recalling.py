"""A memory that recalls next tokens, and the mixed distribution by its formula."""

from dataclasses import replace

import torch

from knnmoe_hf import attach_memory, detach_memory, disable_memory, set_memory, watch_lookups
from tests.support.caches import uncached

MIXED = dict(recall="both", next_token_weight=0.5, next_token_temperature=1.0, next_token_neighbors=6)


def mixed_by_hand(model, memory, tokens):
    """Log probabilities by the formula, in which the model's own are those of a memory that changes routing alone."""
    routing = replace(memory)
    routing.config.recall = "routing" if memory.config.recall == "both" else memory.config.recall
    seen = []
    if memory.config.recall == "both":
        attach_memory(model, routing, "routing")
        own = uncached(model, tokens)
        detach_memory(model, "routing")
        set_memory(model, "default")
    else:
        with disable_memory(model):
            own = uncached(model, tokens)
    with watch_lookups(model, seen.append):
        uncached(model, tokens)
    event = seen[-1]
    votes = torch.softmax(-event.voters.distances / memory.layers[event.layer].scale, dim=-1)
    own = own.view(-1, own.shape[-1]).softmax(-1)
    recalled = torch.zeros_like(own).scatter_add(1, memory.next_tokens[event.voters.rows].long(), votes)
    weight = memory.config.next_token_weight * event.confidence[:, None]
    return ((1 - weight) * own + weight * recalled).log().view(*tokens.shape, -1)
