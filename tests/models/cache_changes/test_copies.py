"""Copies of caches, and caches made from rows of others: each goes on by itself, or is refused."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

from knnmoe_hf import RoutingMemory, attach_memory, disable_memory
from tests.models.cache_changes.helpers import filled, layers_of
from tests.models.test_kv_state import assert_refused
from tests.support.caches import CACHES, close, fed, uncached
from tests.support.models import random_memory, tiny_model
from tests.support.running_means import put_on

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
