"""A cache that was changed, and running means by hand over the tokens that new ones go on from."""

import pytest
import torch
from transformers import DynamicCache

from tests.support.caches import fed
from tests.support.running_means import HALF_LIFE, put_on


def filled(model, ids, cache=None):
    return fed(model, DynamicCache() if cache is None else cache, ids, chunks=[ids.shape[1]])[1]


def layers_of(cache):
    return [layer for layer in cache.layers if layer.keys is not None]


def set_tensors(cache, change):
    """Gives each layer of a cache other keys and values, as code that evicts tokens or chooses rows does."""
    for layer in layers_of(cache):
        layer.keys, layer.values = change(layer.keys), change(layer.values)


def assert_goes_on(model, change, history, begun=8, positions=None, cache=None, atol=1e-5):
    """
    That tokens after a change of a cache of `begun` tokens have the means over `history`.

    Args:
        history: for each row of the changed cache, the earlier row and how many of its tokens the new ones go on from.
    """
    override = put_on(model)[1]
    ids = torch.randint(96, (3, begun), generator=torch.Generator().manual_seed(7))
    new = torch.randint(96, (len(history), 4), generator=torch.Generator().manual_seed(8))
    cache = filled(model, ids, cache)
    before = override.values[-1].view(3, begun)
    cache = change(cache) or cache
    override.values, override.means = [], []
    for part in (slice(0, 1), slice(1, 4)):
        options = {} if positions is None else dict(position_ids=positions[:, part].expand(len(history), -1))
        with torch.no_grad():
            model(new[:, part], past_key_values=cache, **options)
    values, means = (torch.cat([part.view(len(history), -1) for part in seen], 1) for seen in
                     (override.values, override.means))  # fmt: skip
    for row, (source, length) in enumerate(history):
        total = weight = 0.0
        for step, value in enumerate([*before[source, :length].tolist(), *values[row].tolist()]):
            decay = 0.5 ** (1 / HALF_LIFE)
            total, weight = total * decay + value, weight * decay + 1
            if step >= length:
                assert means[row, step - length].item() == pytest.approx(total / weight, abs=atol)


ALL = [(0, 8), (1, 8), (2, 8)]
