"""Caches whose tensors other code assigns between two forwards: the running means follow, or the call is refused."""

import copy

import pytest
import torch

from tests.models.cache_changes.helpers import ALL, assert_goes_on, filled, layers_of, set_tensors
from tests.models.test_kv_state import assert_refused
from tests.support.models import tiny_model
from tests.support.running_means import HALF_LIFE, contextual_model, put_on


def rotated_again(cache):
    """Evicts tokens and moves the others' keys to new positions, as StreamingLLM does."""
    keep = [0, 3, 5, 7]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, keep].roll(1, -1), layer.values[:, :, keep]


def evicted_by_head(cache):
    """Each head keeps other tokens, but all keep the last two, as SnapKV does."""
    keep = torch.tensor([[0, 2, 6, 7], [1, 3, 6, 7]])[None, :, :, None]
    for layer in cache.layers:
        index = keep.expand(len(layer.keys), -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)


def evicted_in_any_order(cache):
    """Each head keeps the tokens with its best scores, in the order of the scores; only one keeps the last token."""
    keep = torch.tensor([[5, 2, 6, 0], [1, 7, 3, 6]])[None, :, :, None]
    for layer in cache.layers:
        index = keep.expand(len(layer.keys), -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)


HAND_MADE = {
    "cloned": (lambda cache: set_tensors(cache, torch.clone), ALL),
    "offloaded and fetched": (lambda cache: set_tensors(cache, lambda t: t.double().float()), ALL),
    "the first tokens evicted": (lambda cache: set_tensors(cache, lambda t: t[:, :, 3:]), ALL),
    "tokens evicted in between": (lambda cache: set_tensors(cache, lambda t: t[:, :, [0, 1, 5, 7]]), ALL),
    "evicted and rotated again": (rotated_again, ALL),
    "each head keeps other tokens": (evicted_by_head, ALL),
    "each head keeps other tokens in any order": (evicted_in_any_order, ALL),
    "cut": (lambda cache: set_tensors(cache, lambda t: t[:, :, :5]), [(0, 5), (1, 5), (2, 5)]),
    "evicted, then cut": (lambda cache: set_tensors(cache, lambda t: t[:, :, [0, 2, 5]]), [(0, 6), (1, 6), (2, 6)]),
    "rows chosen": (lambda cache: set_tensors(cache, lambda t: t[[2, 0]]), [(2, 8), (0, 8)]),
    "rows repeated": (
        lambda cache: set_tensors(cache, lambda t: t.repeat(2, 1, 1, 1)),
        ALL + ALL,
    ),
    "rows chosen and cut": (lambda cache: set_tensors(cache, lambda t: t[[1, 1, 0, 2], :, :4]),
                            [(1, 4), (1, 4), (0, 4), (2, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("way", HAND_MADE)
def test_tokens_after_a_change_by_hand_go_on_from_the_token_that_is_left(model, way):
    change, history = HAND_MADE[way]
    assert_goes_on(model, change, history)
    assert_goes_on(model, change, history, positions=torch.arange(8, 12)[None])  # where they were before an eviction


def test_changes_follow_each_other_and_methods_of_the_cache(model):
    def change(cache):
        set_tensors(cache, lambda t: t[[2, 1]])
        cache.batch_repeat_interleave(2)
        set_tensors(cache, lambda t: t[:, :, :6])
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        cache.crop(-1)

    assert_goes_on(model, change, [(1, 5), (2, 5), (2, 5), (1, 5)])


def test_with_one_layer_a_cut_and_an_eviction_of_repeated_tokens_are_told_apart():
    model = tiny_model("olmoe", num_hidden_layers=1)  # its values depend on each token alone
    override = put_on(model)[0]
    for kept, wanted in ((slice(0, 2), 2), (slice(4, 6), 6)):
        ids = torch.tensor([[5, 9, 5, 9, 5, 9]])
        override.values, override.means = [], []
        cache = filled(model, ids)
        set_tensors(cache, lambda t, kept=kept: t[:, :, kept])
        model(torch.tensor([[11]]), past_key_values=cache)
        values = torch.cat(override.values)
        history = values[[*range(wanted), 6]]
        decay = 0.5 ** (torch.arange(wanted, -1, -1) / HALF_LIFE)
        assert override.means[-1].item() == pytest.approx(float((history * decay).sum() / decay.sum()), abs=1e-5)


def noise(cache):
    set_tensors(cache, torch.randn_like)


def extended(cache):
    set_tensors(cache, lambda t: torch.cat([t, t[:, :, :1]], dim=2))


def changed_in_place(cache):
    layers_of(cache)[-1].values[0] = 0.0


def compacted_in_place(cache):
    """Moves accepted tokens of a tree to the front, then cuts, as Medusa does with its own tensors."""
    for layer in layers_of(cache):
        for tensor in (layer.keys, layer.values):
            tensor[:, :, 4:6] = tensor[:, :, [5, 7]]
        layer.keys, layer.values = layer.keys[:, :, :6], layer.values[:, :, :6]


@pytest.mark.parametrize("change", [noise, extended, changed_in_place, compacted_in_place])
def test_a_change_that_cannot_be_traced_is_refused(model, tokens, change):
    put_on(model)
    cache = filled(model, tokens[:, :8])
    change(cache)
    assert_refused(
        model,
        cache,
        tokens[:, 8:9],
        "a model without this memory, a call that failed, or other code added tokens to it or",
    )


def test_a_token_that_goes_on_from_one_whose_heads_were_evicted_apart_is_refused():
    model = contextual_model("olmoe", attn_implementation="eager")
    ids = torch.randint(96, (1, 8), generator=torch.Generator().manual_seed(0))
    cache = filled(model, ids)
    evicted_by_head(cache)
    mask = torch.zeros(1, 1, 1, 5)
    with torch.no_grad():
        model(ids[:, :1], mask.clone(), past_key_values=copy.deepcopy(cache))
    mask[..., 2:4] = torch.finfo(torch.float32).min
    with pytest.raises(ValueError, match="what other code left of it does not tell which token each of these goes on"):
        model(ids[:, :1], mask, past_key_values=cache)
