"""The log-probability of each traced token, with the memory and without it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from knnmoe_hf.explain.tokens import TracedTokens
from knnmoe_hf.models.attach import disable_memory, use_memory
from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.models.offload import input_device

_TOKENS = 4096  # of a batch, padding included


@torch.no_grad()
def log_probs(model: nn.Module, name: str, tokens: TracedTokens) -> tuple[Tensor, Tensor]:
    """
    Runs each traced sequence again, once with a memory and once without, in eval mode and without a cache.

    Args:
        model: the model.
        name: of the memory, which is attached to it.
        tokens: that were traced.

    Returns:
        With the memory and without, (n,) float32 each: the log-probability of each token after the tokens that it goes
        on from, in nats; NaN for the first token of a sequence, and where the sequence is not known.
    """
    ids, device = tokens.ids, input_device(model)
    found = torch.full((2, len(ids)), torch.nan)
    with evaluating(model):
        for sequences in _batches(tokens.sequences()):
            lengths = torch.tensor([len(sequence) for sequence in sequences])
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            batch = torch.zeros(mask.shape, dtype=torch.int64)
            batch[mask] = ids[torch.cat(sequences)]
            call = dict(input_ids=batch.to(device), attention_mask=mask.long().to(device), use_cache=False)
            for values, mode in zip(found, (use_memory(model, name), disable_memory(model))):
                with mode:
                    logits = model(**call).logits
                for row, sequence in zip(logits, sequences):
                    following = ids[sequence[1:]].to(row.device)[:, None]
                    values[sequence[1:]] = _of_tokens(row[: len(following)], following).cpu()
    return found[0], found[1]


def _of_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    """(T,) float32, the log-probability of ids (T, 1) by logits (T, V)."""
    logits = logits.float()
    return (logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)).squeeze(-1)


def _batches(sequences: list[Tensor]) -> Iterator[list[Tensor]]:
    """Sequences of two tokens and more, those of similar length together."""
    batch: list[Tensor] = []
    for sequence in sorted((one for one in sequences if len(one) > 1), key=len):
        if batch and (len(batch) + 1) * len(sequence) > _TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
