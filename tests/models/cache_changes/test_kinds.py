"""Caches of other kinds: subclasses, eight-bit, offloaded, sliding, static, reset, flattened, exported."""

import copy
import pickle

import pytest
import torch
from torch.utils import _pytree
from transformers import DynamicCache, GenerationConfig, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, MtpCache

from knnmoe_hf import disable_memory
from knnmoe_hf.models.sums import Sums, sums_beside
from tests.models.cache_changes.helpers import ALL, assert_goes_on, filled
from tests.models.test_kv_state import assert_refused
from tests.support.caches import CACHES, WIDE, close, fed, uncached
from tests.support.models import tiny_model
from tests.support.running_means import contextual_model


class OwnCache(DynamicCache):
    """Has its own form of some methods, and one that calls another."""

    def crop(self, tokens_to_remove):
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, :, :tokens_to_remove], layer.values[:, :, :tokens_to_remove]

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)


def test_a_subclass_with_methods_of_its_own_is_followed(model):
    def change(cache):
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([2, 2, 0]))

    assert_goes_on(model, change, [(2, 5), (2, 5), (0, 5)], cache=OwnCache())


class CacheWithLists(Cache):
    """Keeps tensors beside its layers, as caches of older libraries do."""

    is_compileable = False

    def __init__(self):
        super().__init__(layers=[])
        self.key_cache, self.value_cache = [], []

    def update(self, keys, values, layer_idx, *args, **kwargs):
        for cache, new in ((self.key_cache, keys), (self.value_cache, values)):
            if len(cache) <= layer_idx:
                cache.append(new)
            else:
                cache[layer_idx] = torch.cat([cache[layer_idx], new], dim=2)
        return self.key_cache[layer_idx], self.value_cache[layer_idx]

    def get_seq_length(self, layer_idx=0):
        return self.key_cache[0].shape[2] if self.key_cache else 0

    def get_mask_sizes(self, query_length, layer_idx):
        return self.get_seq_length() + query_length, 0

    def change(self, function):
        self.key_cache, self.value_cache = ([function(t) for t in ts] for ts in (self.key_cache, self.value_cache))

    def reorder_cache(self, beam_idx):
        self.change(lambda tensor: tensor[beam_idx])

    def crop(self, tokens_to_remove):
        self.change(lambda tensor: tensor[:, :, :tokens_to_remove])


def test_a_cache_with_a_storage_of_its_own_is_followed_or_refused(tokens):
    model = tiny_model("olmoe")

    def change(cache):
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([2, 2, 0]))

    assert_goes_on(model, lambda cache: None, ALL, cache=CacheWithLists())
    assert_goes_on(model, change, [(2, 5), (2, 5), (0, 5)], cache=CacheWithLists())
    for way in (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))):
        assert_goes_on(model, way, ALL, cache=CacheWithLists())
    cache = filled(model, tokens[:, :8], CacheWithLists())
    cache.change(lambda tensor: tensor[[1, 0, 2]])  # a way of its own to choose rows
    assert_refused(model, cache, tokens[:, 8:9], "a model without this memory, a call that failed, or other code")


def test_layers_in_eight_bit_floats_that_other_code_changes_are_refused(tokens):
    model = contextual_model("olmoe")
    cache = filled(model, tokens[:, :8], QuantizedCache("fp8", model.config))
    for layer in cache.layers:
        layer.reorder_cache(torch.tensor([1, 0, 2]))
    assert_refused(model, cache, tokens[:, 8:9], "a model without this memory, a call that failed, or other code")


def test_a_cache_in_eight_bit_floats_goes_on(model):
    if "gpt_oss" in model.config.model_type:
        return  # it has sliding layers, which such caches do not support
    assert_goes_on(model, lambda cache: None, ALL, cache=QuantizedCache("fp8", model.config))
    assert_goes_on(model, lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [(2, 8), (0, 8), (1, 8)],
                   cache=QuantizedCache("fp8", model.config))  # fmt: skip


@pytest.mark.parametrize("make", [MtpCache, DynamicCache], ids=lambda make: make.__name__)
def test_layers_that_are_offloaded_and_fetched_go_on(model, make):
    def change(cache):
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()

    assert_goes_on(model, change, ALL, cache=make())


@pytest.mark.parametrize("recording", [False, True])
def test_sliding_windows_go_on_past_their_end(recording):
    def make(model):
        cache = DynamicCache(config=model.config)
        if recording:
            cache.activate_past_recording()
        return cache

    models = [
        tiny_model("gpt_oss", sliding_window=4),
        tiny_model("qwen3_moe", use_sliding_window=True, sliding_window=4, max_window_layers=0),
    ]
    for model in models:
        assert any(isinstance(layer, DynamicSlidingWindowLayer) for layer in make(model).layers)
        assert_goes_on(model, lambda cache: None, ALL, cache=make(model))
        assert_goes_on(model, lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
                       [(1, 8), (1, 8), (0, 8)], cache=make(model))  # fmt: skip
        if recording:
            assert_goes_on(model, lambda cache: cache.crop(-2), [(0, 6), (1, 6), (2, 6)], cache=make(model))
            assert_goes_on(model, lambda cache: cache.crop(0), ALL, cache=make(model))


def test_a_static_cache_is_reordered_with_its_sums(family):
    model = tiny_model(family, **WIDE[family])
    assert_goes_on(model, lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [(2, 8), (0, 8), (0, 8)],
                   cache=StaticCache(config=model.config, max_cache_len=16))  # fmt: skip


def test_a_cache_whose_first_layers_are_no_attention_goes_on(tokens):
    from transformers.cache_utils import DummyLayer, LinearAttentionLayer

    class Shifted(DynamicCache):
        """Keeps a model's layers behind two that hold no keys, as hybrid models have them."""

        def __init__(self):
            super().__init__()
            self.layers, self.layer_class_to_replicate = [LinearAttentionLayer(), DummyLayer()], None
            self.layers += [DynamicLayer(), DynamicLayer()]

        def update(self, keys, values, layer_idx, *args, **kwargs):
            return super().update(keys, values, layer_idx + 2, *args, **kwargs)

    model = tiny_model("olmoe")
    assert_goes_on(model, lambda cache: None, ALL, cache=Shifted())
    assert_goes_on(model, lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [(1, 8), (1, 8), (0, 8)],
                   cache=Shifted())  # fmt: skip


@pytest.mark.parametrize("kind", CACHES)
def test_nothing_is_left_beside_a_cache_that_was_reset(family, tokens, kind):
    model = contextual_model(family)
    cache = filled(model, tokens, CACHES[kind](model) or DynamicCache(config=model.config))
    assert isinstance(sums_beside(cache), Sums)
    cache.reset()
    if kind != "static":
        assert sums_beside(cache) is None
    with disable_memory(model):
        cache = filled(model, tokens, cache)
    cache.reset()
    close(fed(model, cache, tokens, chunks=[5, 7])[0], uncached(model, tokens))


def test_a_flattened_cache_is_that_of_a_model_without_a_memory(tokens):
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    model = contextual_model("olmoe")
    cache = filled(model, tokens[:, :8])
    leaves, spec = _pytree.tree_flatten(cache)
    assert len(leaves) == 4
    twin = _pytree.tree_unflatten(leaves, spec)
    close(fed(model, twin, tokens[:, 8:], chunks=[4])[0], uncached(model, tokens)[:, 8:])


@pytest.mark.slow
def test_an_exported_program_refuses_to_go_on_and_the_module_that_is_exported_does_not(tokens):
    from transformers.integrations.executorch import (
        TorchExportableModuleWithStaticCache,
        convert_and_export_with_cache,
    )

    model = contextual_model("olmoe")
    model.set_experts_implementation("batched_mm")
    model.generation_config = GenerationConfig(
        cache_implementation="static", cache_config={"batch_size": 1, "max_cache_len": 16}, use_cache=True
    )
    module = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=16, device="cpu")
    steps = [dict(input_ids=tokens[:1, at : at + 1], cache_position=torch.tensor([at])) for at in range(3)]
    with torch.no_grad():
        found = torch.cat([module(**step) for step in steps], dim=1)
    close(found, uncached(model, tokens[:1, :3]))
    program = convert_and_export_with_cache(model).module()
    close(program(**steps[0]).detach(), found[:, :1])
    with pytest.raises(ValueError, match="a program of torch.export keeps no running means from one call to the next"):
        program(**steps[1])
