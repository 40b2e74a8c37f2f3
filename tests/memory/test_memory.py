"""`RoutingMemory`: made of rows, stored in every form, opened again, and bound to its model."""

import itertools

import pytest
import torch

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.errors import MemoryMismatchError
from knnmoe_hf.lookup.layer import distance_scale, neighbor_distances
from knnmoe_hf.lookup.options import KEY_CODECS, KEY_DTYPES, VALUE_DTYPES, VALUE_SPACES
from tests.memory.helpers import assert_same, build, full_memory, rows_for, tiny_tokenizer
from tests.support.attaching import attached
from tests.support.models import PLAIN, random_memory, tiny_model


@pytest.fixture(scope="module")
def olmoe():
    return tiny_model("olmoe")


def test_length_and_bytes(olmoe):
    memory = build(olmoe, *rows_for(), **PLAIN | {"key_dtype": "float16"})
    distances = 6 * 5 * 4  # of each row to the five others
    assert len(memory) == 6 and memory.nbytes_per_layer == {i: 6 * (32 * 2 + 8 * 4) + distances for i in (0, 1)}
    assert "6 rows" in repr(memory) and memory.config.layers == [0, 1]
    codecs = 32 * 32 * 4 + 3 * 32 * 4 + 2 * 8 * 4  # axes, bias, mean and step of keys, step and offset of values
    memory = build(olmoe, *rows_for())
    assert memory.nbytes_per_layer == {i: 6 * (32 + 8) + codecs + distances for i in (0, 1)}
    assert memory.nbytes == sum(memory.nbytes_per_layer.values())


def test_rows_are_copied_and_the_config_too(olmoe):
    keys, values = rows_for()
    config = KNNMoEConfig(**PLAIN)
    memory = RoutingMemory.from_rows(config, keys, values, olmoe)
    expected = memory.layers[0].decoded_keys.clone(), memory.layers[0].decoded_values.clone()
    keys[0].zero_(), values[0].zero_()
    config.gamma = 9.0
    assert torch.equal(memory.layers[0].decoded_keys, expected[0]) and torch.equal(
        memory.layers[0].decoded_values, expected[1]
    )
    assert memory.config.gamma == 0.3 and config.layers is None


@pytest.mark.parametrize("options", [{}, PLAIN], ids=["default", "plain"])
def test_distances_and_scale_are_between_examples(olmoe, options):
    keys, values = rows_for(40)
    for ids in (None, [0] * 40, [i // 5 for i in range(40)]):
        memory = build(olmoe, keys, values, ids, num_neighbors=4, **options)
        for rows in memory.layers.values():
            named = torch.arange(40) if ids is None else torch.tensor(ids)
            found = neighbor_distances(rows.stored_keys, named, 4, 2**26)
            assert torch.equal(rows.distances, found) and rows.scale == distance_scale(found)


@pytest.mark.parametrize("options", [{}, PLAIN], ids=["default", "plain"])
def test_one_tensor_for_two_layers_can_be_saved(olmoe, tmp_path, options):
    key, value = torch.randn(6, 32), torch.randn(6, 8)
    memory = build(olmoe, {0: key, 1: key}, {0: value, 1: value}, **options)
    memory.save_pretrained(tmp_path)
    assert_same(RoutingMemory.from_pretrained(tmp_path), memory)


@pytest.mark.parametrize(
    "family, key_dtype, space",
    [("olmoe", "bfloat16", "assignment"), ("qwen3_moe", "float16", "delta"), ("gpt_oss", "float32", "logits")],
)
def test_round_trip(family, key_dtype, space, tmp_path):
    memory = full_memory(tiny_model(family), key_dtype=key_dtype, value_space=space, tokenizer=tiny_tokenizer())
    memory.save_pretrained(tmp_path)
    loaded = RoutingMemory.from_pretrained(tmp_path)
    assert loaded.layers[0].key_codes.dtype == getattr(torch, key_dtype)
    assert_same(loaded, memory)
    loaded.check_model(tiny_model(family))


KEYS = list(itertools.product(KEY_CODECS, KEY_DTYPES))
VALUES = list(itertools.product(VALUE_SPACES, VALUE_DTYPES, (None, 1, 2, 8)))


@pytest.mark.parametrize("index", range(len(VALUES)))
def test_every_way_of_storage_keeps_its_bits_and_what_the_model_makes_of_them(olmoe, tokens, index, tmp_path):
    (codec, key_dtype), (space, value_dtype, experts) = KEYS[(index + index // 12) % len(KEYS)], VALUES[index]
    stored = dict(key_codec=codec, key_dtype=key_dtype, key_dim=9, value_dtype=value_dtype, value_experts=experts)
    memory = full_memory(olmoe, value_space=space, **stored)
    for rows in memory.layers.values():
        assert rows.key_codes.dtype == getattr(torch, key_dtype) and rows.values.codes.dtype == getattr(
            torch, value_dtype
        )
        assert rows.key_codes.shape == (40, {"raw": 32, "pca": 9, "logits": 8}[codec])
        assert rows.values.codes.shape == (40, experts or 8) and rows.decoded_values.shape == (40, 8)
    memory.save_pretrained(tmp_path)
    loaded = RoutingMemory.from_pretrained(tmp_path)
    assert_same(loaded, memory)
    found = []
    for one in (memory, loaded):
        with attached(olmoe, one), torch.no_grad():
            found.append(olmoe(input_ids=tokens).logits)
    assert torch.equal(*found) and not torch.equal(found[0], olmoe(input_ids=tokens).logits)


@pytest.mark.parametrize("key_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("codec", ["raw", "pca", "logits"])
def test_an_empty_memory_builds_saves_and_loads(family, codec, key_dtype, tmp_path):
    memory = build(tiny_model(family), *rows_for(rows=0), key_codec=codec, key_dtype=key_dtype, value_experts=2)
    memory.save_pretrained(tmp_path)
    loaded = RoutingMemory.from_pretrained(tmp_path)
    assert len(loaded) == 0 and loaded.layers[0].scale == 1.0
    assert_same(loaded, memory)
    assert len(loaded.merge(memory)) == 0


def test_a_subfolder_options_and_a_part_of_the_layers(olmoe, tmp_path):
    memory = full_memory(olmoe)
    memory.save_pretrained(tmp_path / "a" / "b")
    loaded = RoutingMemory.from_pretrained(tmp_path, subfolder="a/b", layers=[1], num_neighbors=2, gamma=0.9)
    assert list(loaded.layers) == [1] and loaded.config.num_neighbors == 2 and loaded.config.gamma == 0.9
    loaded.save_pretrained(tmp_path / "part")
    assert_same(RoutingMemory.from_pretrained(tmp_path / "part"), loaded)
    for bad, words in (
        (dict(layers=[1, 5]), r"\[5\] have no rows here"),
        (dict(neighbours=3), "'neighbours' is not an option"),
        (dict(gamma=-1), "gamma=-1"),
        (dict(routing_width="union"), "routing_width='union'"),
    ):
        with pytest.raises(ValueError, match=words):
            RoutingMemory.from_pretrained(tmp_path / "a" / "b", **bad)


def test_a_memory_belongs_to_its_model_only(family):
    memory = random_memory(tiny_model(family))
    memory.check_model(tiny_model(family).bfloat16())
    others = [tiny_model(family, seed=3), tiny_model(family, hidden_size=64), tiny_model(family, num_hidden_layers=1)]
    for other in others:
        with pytest.raises(MemoryMismatchError, match="attach it to"):
            memory.check_model(other)
