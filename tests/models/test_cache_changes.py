"""Caches that other code changes between two forwards: the running means follow, or the call is refused.

What a changed cache gives is compared with running means by hand, over the tokens that the new ones go on from.
"""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree
from transformers import DynamicCache, GenerationConfig, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, MtpCache

from knnmoe_hf import RoutingMemory, attach_memory, disable_memory
from knnmoe_hf.models.sums import Sums, sums_beside
from tests.models.test_kv_state import assert_refused
from tests.support.caches import CACHES, WIDE, close, fed, uncached
from tests.support.models import random_memory, tiny_model
from tests.support.running_means import HALF_LIFE, contextual_model, put_on


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


@pytest.fixture
def model(family):
    return tiny_model(family, **WIDE[family])


# code that assigns a layer's tensors


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


# copies


COPIES = {
    "deepcopy": copy.deepcopy,
    "shallow, with its own list of layers": lambda cache: shallow(cache),
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": lambda cache: saved_and_loaded(cache),
}


def shallow(cache):
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def saved_and_loaded(cache):
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_cache_go_on_by_themselves(model, tokens, way):
    put_on(model)
    cache = filled(model, tokens[:, :6])
    first, _ = fed(model, cache, tokens[:, 6:7], chunks=[1])
    one, two = COPIES[way](cache), COPIES[way](cache)
    other = tokens.flip(0)[:, 7:]
    one_found, _ = fed(model, one, tokens[:, 7:], chunks=[1, 1, 3])
    two_found, _ = fed(model, two, other, chunks=[1, 1, 3])
    own, _ = fed(model, cache, other, chunks=[2, 3])
    close(torch.cat([first, one_found], 1), uncached(model, tokens)[:, 6:])
    wanted = uncached(model, torch.cat([tokens[:, :7], other], 1))[:, 7:]
    close(two_found, wanted)
    close(own, wanted)


ANOTHER_PROCESS = """
import sys, torch
from knnmoe_hf import RoutingMemory, attach_memory
from tests.support.models import tiny_model
model = tiny_model("olmoe")
attach_memory(model, RoutingMemory.from_pretrained(sys.argv[1]))
cache = torch.load(sys.argv[2], weights_only=False)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[3]), past_key_values=cache).logits, sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.parametrize("confidence", ["context", "calibrated"])
def test_a_prompt_cache_saved_to_disk_goes_on_in_another_process(tmp_path, tokens, confidence):
    model = tiny_model("olmoe")
    random_memory(model, confidence=confidence).save_pretrained(tmp_path / "memory")
    random_memory(model, seed=5, confidence=confidence).save_pretrained(tmp_path / "other")
    attach_memory(model, RoutingMemory.from_pretrained(tmp_path / "memory"))
    torch.save(filled(model, tokens[:, :8]), tmp_path / "cache.pt")
    torch.save(tokens[:, 8:], tmp_path / "ids.pt")

    def run(memory):
        names = [str(tmp_path / name) for name in (memory, "cache.pt", "ids.pt", "found.pt")]
        return subprocess.run([sys.executable, "-c", ANOTHER_PROCESS, *names], capture_output=True, text=True)

    done = run("memory")
    assert done.returncode == 0, done.stderr
    close(torch.load(tmp_path / "found.pt"), uncached(model, tokens)[:, 8:])
    done = run("other")
    assert (
        "it was filled with another memory, or other options, in force than is now attached as 'default'"
        in done.stderr
    )


@pytest.mark.parametrize("confidence", ["context", "calibrated"])
def test_the_same_memory_attached_again_goes_on_and_one_with_other_options_does_not(tokens, confidence):
    model, twin = tiny_model("olmoe"), tiny_model("olmoe")
    attach_memory(model, random_memory(model, confidence=confidence))
    attach_memory(twin, random_memory(twin, confidence=confidence, search_max_bytes=2**20))
    cache = filled(model, tokens[:, :8])
    close(fed(twin, copy.deepcopy(cache), tokens[:, 8:], chunks=[3, 1])[0], uncached(twin, tokens)[:, 8:])
    for options in (dict(gamma=0.4), dict(temperature=2.0), dict(seed=3), dict(rows=41)):
        (name,) = options
        attach_memory(twin, random_memory(twin, **({"confidence": confidence} | options)), name)
        assert_refused(
            twin, copy.deepcopy(cache), tokens[:, 8:], f"it was filled with 'default' in force, not with '{name}'"
        )


def test_a_memory_that_was_saved_in_the_meantime_goes_on_and_another_does_not(tmp_path, tokens):
    model, twin = tiny_model("olmoe"), tiny_model("olmoe")
    memory = random_memory(model, confidence="context")
    attach_memory(model, memory)
    cache = filled(model, tokens[:, :8])
    memory.save_pretrained(tmp_path / "memory")
    attach_memory(twin, RoutingMemory.from_pretrained(tmp_path / "memory"))
    close(fed(twin, copy.deepcopy(cache), tokens[:, 8:], chunks=[3, 1])[0], uncached(twin, tokens)[:, 8:])
    saved = filled(twin, tokens[:, :8])
    random_memory(model, rows=41, confidence="context").save_pretrained(tmp_path / "other")
    attach_memory(twin, RoutingMemory.from_pretrained(tmp_path / "other"), "other")
    for one in (cache, saved):
        assert_refused(twin, one, tokens[:, 8:9], "it was filled with 'default' in force, not with 'other'")


# caches made from the tensors of others


def rebuilt(cache):
    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


@pytest.mark.parametrize("kind", ["the model's", "dynamic", "lazy"])
def test_code_that_walks_a_cache_finds_what_it_finds_without_a_memory(family, tokens, kind):
    model = tiny_model(family)
    plain = filled(model, tokens, CACHES[kind](model))
    put_on(model)
    cache = filled(model, tokens, CACHES[kind](model))
    assert len(cache) == len(plain) == len(list(cache)) and cache.is_compileable == plain.is_compileable
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in plain.layers]
    assert repr(cache) == repr(plain)


def test_a_cache_that_was_rebuilt_is_refused_unless_the_original_still_tells(model, tokens):
    put_on(model)
    cache = filled(model, tokens[:, :8])
    twin = rebuilt(cache)
    close(fed(model, twin, tokens[:, 8:], chunks=[3, 1])[0], uncached(model, tokens)[:, 8:])
    with disable_memory(model):
        cache = filled(model, tokens[:, :8])
    assert_refused(
        model, rebuilt(cache), tokens[:, 8:9], "other code filled it, or made it from the tensors of another"
    )


def of_tensors(*caches, change=lambda tensors: torch.cat(tensors)):
    """A new cache of tensors that are made from those of others."""
    layers = zip(*(cache.layers for cache in caches))
    return DynamicCache([tuple(change([getattr(one, name) for one in parts]) for name in ("keys", "values"))
                         for parts in layers])  # fmt: skip


def test_a_cache_made_from_rows_of_others_goes_on_from_them(model, tokens):
    put_on(model)
    wanted = uncached(model, tokens)[:, 8:]
    one, two = filled(model, tokens[:1, :8]), filled(model, tokens[1:])
    joined = of_tensors(two, one, change=lambda tensors: torch.cat([t[:, :, :8] for t in tensors]))
    close(fed(model, joined, tokens[[1, 2, 0], 8:], chunks=[1, 3])[0], wanted[[1, 2, 0]])
    single = of_tensors(two, change=lambda tensors: tensors[0][1:, :, :8])
    close(fed(model, single, tokens[2:, 8:], chunks=[4])[0], wanted[2:])
    repeated = of_tensors(one, change=lambda tensors: tensors[0].expand(3, -1, -1, -1))
    ends = torch.cat([tokens[:1, :8].expand(3, -1), tokens[:, 8:]], 1)
    close(fed(model, repeated, tokens[:, 8:], chunks=[4])[0], uncached(model, ends)[:, 8:])
    # of another that was copied, and one that shares its layers
    other = of_tensors(copy.deepcopy(one))
    shared = copy.copy(one)
    close(fed(model, other, tokens[:1, 8:], chunks=[4])[0], wanted[:1])
    fed(model, one, tokens[:1, 8:], chunks=[2])
    close(fed(model, shared, tokens[:1, 10:], chunks=[2])[0], wanted[:1, 2:])


def test_a_cache_made_from_rows_of_which_one_is_unknown_is_refused(model, tokens):
    put_on(model)
    known = filled(model, tokens[:1, :8])
    with disable_memory(model):
        unknown = filled(model, tokens[1:2, :8])
    reason = "other code filled it, or made it from the tensors of another"
    assert_refused(model, of_tensors(known, unknown), tokens[:2, 8:9], reason)
    longer = of_tensors(known, change=lambda tensors: torch.cat([tensors[0], tensors[0][:, :, :1]], dim=2))
    assert_refused(model, longer, tokens[:1, 8:9], reason)
    overwritten = of_tensors(known, change=lambda tensors: tensors[0].clone())
    layers_of(known)[-1].values[:] = 0.0
    layers_of(overwritten)[-1].values[:] = 0.0
    assert_refused(model, overwritten, tokens[:1, 8:9], reason)


# caches of other kinds


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
