"""Questions of random tokens for tiny models, and what a model makes of them."""

import torch

from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.tasks.items import Item, Prompt

VOCABULARY = 96


def random_items(count: int = 6, length: int = 7, choices: int = 2, seed: int = 0) -> list[Item]:
    """Questions whose choices are of one and of two tokens; lengths differ by up to two tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCABULARY, (size,), generator=generator).tolist())

    return [
        Item(
            Prompt(f"random/{number}", ids(length + number % 3), f"question {number}"),
            tuple(ids(1 + number % 2) for _ in range(choices)),
            number % choices,
        )
        for number in range(count)
    ]


def logits_of(model, *sequences, pad_left: bool = False) -> list[torch.Tensor]:
    """The logits of each sequence's own tokens, (S, V), all computed in one padded batch."""
    longest = max(map(len, sequences))
    rows, masks = [], []
    for tokens in sequences:
        filler, ones = [0] * (longest - len(tokens)), [1] * len(tokens)
        rows.append(filler + list(tokens) if pad_left else list(tokens) + filler)
        masks.append(filler + ones if pad_left else ones + filler)
    mask = torch.tensor(masks)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(input_ids=torch.tensor(rows), attention_mask=mask, position_ids=positions).logits
    return [row[kept.bool()] for row, kept in zip(found, mask)]


def routes_of(model, tokens) -> dict[int, torch.Tensor]:
    """By layer, the weight of each expert that the blocks are given for each token, (S, E); 0 if it is not chosen."""
    found, handles = {}, []
    for gate in find_gates(model):

        def keep(_, args, output, layer=gate.layer):
            found[layer] = torch.zeros_like(output[0]).scatter_add(1, output[2], output[1]).detach()

        handles.append(gate.module.register_forward_hook(keep))
    logits_of(model, tokens)
    for handle in handles:
        handle.remove()
    return found
