"""Random trees of tokens in the rows of a batch, their masks, and what each token's own past alone gives."""

import torch

from tests.support.caches import additive, uncached

PAD, NONE = -2, -1


def random_parents(rows: int, length: int, seed: int, padding: float = 0.2) -> torch.Tensor:
    """(B, L): the slot that each token goes on from, to the left of its own; NONE where a sequence begins, PAD."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.full((rows, length), PAD)
    for row in range(rows):
        real: list[int] = []
        for slot in range(length):
            if torch.rand((), generator=generator) < padding:
                continue
            kind = torch.rand((), generator=generator)
            if not real or kind < 0.1:
                parents[row, slot] = NONE
            elif kind < 0.6:
                parents[row, slot] = real[-1]
            else:
                parents[row, slot] = real[int(torch.randint(len(real), (), generator=generator))]
            real.append(slot)
    return parents


def path_to(parents: torch.Tensor, slot: int) -> list[int]:
    """The slots of a row from the beginning of a token's sequence to the token itself."""
    path = [slot]
    while parents[path[0]] >= 0:
        path.insert(0, int(parents[path[0]]))
    return path


def attended(parents: torch.Tensor) -> torch.Tensor:
    """(B, 1, L, L) bool: each token attends to its own past and to itself."""
    mask = torch.zeros(*parents.shape, parents.shape[1], dtype=torch.bool)
    for row, slot in (parents != PAD).nonzero().tolist():
        mask[row, slot, path_to(parents[row], slot)] = True
    return mask[:, None]


def depths(parents: torch.Tensor) -> torch.Tensor:
    """(B, L): how many tokens are before each in its own past; 0 for padding."""
    found = torch.zeros_like(parents)
    for row, slot in (parents != PAD).nonzero().tolist():
        found[row, slot] = len(path_to(parents[row], slot)) - 1
    return found


def mask_for(model, mask: torch.Tensor, boolean: bool):
    """A mask (B, 1, S, L) bool in the form that a model takes."""
    given = mask if boolean else additive(mask)
    if model.config.model_type == "gpt_oss":
        return {"full_attention": given, "sliding_attention": given}
    return given


def each_alone(model, ids: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """(B, L, vocabulary): the logits of each token after a pass over its own past alone; 0 for padding."""
    found = torch.zeros(*ids.shape, model.config.vocab_size)
    for row, slot in (parents != PAD).nonzero().tolist():
        found[row, slot] = uncached(model, ids[row, path_to(parents[row], slot)][None])[0, -1]
    return found


def running_means_by_hand(values: torch.Tensor, parents: torch.Tensor, half_life: float) -> torch.Tensor:
    """Running means (B, L) of values over each token's own past, one token after the other, in float64."""
    found = torch.zeros(values.shape, dtype=torch.float64)
    for row, slot in (parents != PAD).nonzero().tolist():
        total = weight = 0.0
        for place in path_to(parents[row], slot):
            total, weight = (part * 0.5 ** (1 / half_life) for part in (total, weight))
            total, weight = total + float(values[row, place]), weight + 1
        found[row, slot] = total / weight
    return found
