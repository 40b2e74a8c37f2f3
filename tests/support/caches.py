"""The ways in which the same tokens reach a model: padded, packed, in chunks, through each kind of cache."""

import torch
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

LENGTHS = (12, 7, 4)
"""Real tokens of each row of a padded batch."""

WIDE = dict(olmoe={}, qwen3_moe={}, gpt_oss=dict(sliding_window=64))
"""Options of a tiny model in whose sliding window padding does not take the place of tokens."""

CACHES = {
    "the model's": lambda model: None,
    "dynamic": lambda model: DynamicCache(config=model.config),
    "lazy": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=16),
}
"""Each kind of cache for up to 16 tokens of a model."""


def close(one, other, atol: float = 5e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-4)


def logits_of(model, ids, mask=None, **options):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **options).logits


def uncached(model, ids, mask=None, **options):
    return logits_of(model, ids, mask, use_cache=False, **options)


def padded(tokens, side: str, pad_id: int = 0):
    """The first `LENGTHS` tokens of each row, padded, and their mask."""
    width = max(LENGTHS)
    ids, mask = torch.full((len(LENGTHS), width), pad_id), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = tokens[row, :length], 1
    return ids, mask


def additive(mask):
    """A boolean mask in the form that is added to attention scores."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def packed_calls(tokens, boolean):
    """Arguments that pack the first `LENGTHS` tokens of each row into one."""
    ids = torch.cat([tokens[row, :length] for row, length in enumerate(LENGTHS)])[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    number = torch.cat([torch.full((length,), row) for row, length in enumerate(LENGTHS)])
    square = ((number[:, None] == number) & torch.ones(len(number), len(number)).tril().bool())[None, None]
    bounds = dict(cu_seq_lens_q=torch.tensor([0, 12, 19, 23], dtype=torch.int32))
    yield "positions", dict(input_ids=ids, position_ids=positions)
    for form in [square, additive(square)][not boolean :]:
        yield "mask", dict(input_ids=ids, position_ids=positions, attention_mask=form)
        yield "bounds", dict(input_ids=ids, attention_mask=form, **bounds)
        yield "both", dict(input_ids=ids, position_ids=positions, attention_mask=form, **bounds)


def fed(model, cache, ids, mask=None, chunks=(1,) * 12, spare=0, position_ids=None):
    """Logits of ids fed in chunks, and the cache that holds them."""
    parts, start = [], 0
    for size in chunks:
        new = slice(start, start + size)
        options = {} if position_ids is None else dict(position_ids=position_ids[:, new])
        if mask is not None:
            options["attention_mask"] = F.pad(mask[:, : new.stop], (0, spare))
        with torch.no_grad():
            out = model(input_ids=ids[:, new], past_key_values=cache, use_cache=True, **options)
        cache, start = out.past_key_values, new.stop
        parts.append(out.logits)
    return torch.cat(parts, 1), cache


def running_mean_by_hand(values, real, restarts, half_life):
    """`Tokens.running_mean` of values (B, S) in Python, token by token, in float64."""
    found = torch.zeros(values.shape, dtype=torch.float64)
    for row in range(len(values)):
        total = weight = 0.0
        for t in range(values.shape[1]):
            if restarts[row, t]:
                total = weight = 0.0
            if real[row, t]:
                decay = 0.5 ** (1 / half_life)
                total, weight = total * decay + float(values[row, t]), weight * decay + 1
            found[row, t] = total / max(weight, 1e-30)
    return found


def gradients(model, batches, reentrant: bool | None):
    """Loss of all (ids, mask) batches and its gradients; gradient checkpointing is on unless `reentrant` is None."""
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    model.train()
    model.zero_grad()
    calls = [(ids, mask, ids.masked_fill(mask == 0, -100)) for ids, mask in batches]
    loss = sum(model(input_ids=ids, attention_mask=mask, labels=labels).loss for ids, mask, labels in calls)
    loss.backward()
    model.eval()
    model.activation_checkpointing_disable()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
