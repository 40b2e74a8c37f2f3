"""`RoutingMemory`: built from rows, saved and opened, joined and cut, to and from the Hub."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.errors import MemoryMismatchError
from knnmoe_hf.lookup.layer import distance_scale, neighbor_distances
from knnmoe_hf.lookup.options import KEY_CODECS, KEY_DTYPES, VALUE_DTYPES, VALUE_SPACES
from knnmoe_hf.memory import folder as folder_files
from tests.conftest import PLAIN, random_memory, tiny_model
from tests.memory.helpers import assert_same, assert_same_tensors, build, full_memory, rows_for, tiny_tokenizer
from tests.support.attaching import attached


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
    wanted = memory.layers[0].decoded_keys.clone(), memory.layers[0].decoded_values.clone()
    keys[0].zero_(), values[0].zero_()
    config.gamma = 9.0
    assert torch.equal(memory.layers[0].decoded_keys, wanted[0]) and torch.equal(
        memory.layers[0].decoded_values, wanted[1]
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
        (dict(neighbours=3), "'neighbours' is no option"),
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


def test_removing_examples_takes_their_rows_tokens_and_refits_the_scale(olmoe):
    memory = full_memory(olmoe)
    before = copy.deepcopy(memory).layers
    smaller = memory.remove_examples(torch.tensor([1, 3]))
    keep = torch.isin(memory.provenance.example_ids, torch.tensor([0, 2]))
    assert len(smaller) == 20 and sorted(smaller.provenance.tokens()) == [0, 2]
    assert torch.equal(smaller.provenance.positions, memory.provenance.positions[keep])
    for layer, rows in smaller.layers.items():
        assert torch.equal(rows.decoded_keys, memory.layers[layer].decoded_keys[keep])
        assert torch.equal(rows.decoded_values, memory.layers[layer].decoded_values[keep])
        found = neighbor_distances(rows.stored_keys, smaller.provenance.example_ids, 4, 2**26)
        assert torch.equal(rows.distances, found) and rows.scale == distance_scale(found) != before[layer].scale
        assert_same_tensors(memory.layers[layer].tensors(), before[layer].tensors())
    assert smaller.origin.reference_set_hash is None and memory.origin.reference_set_hash is not None
    assert len(memory.remove_examples(range(4))) == 0
    with pytest.raises(ValueError, match=r"\[9\] are no examples"):
        memory.remove_examples([0, 9])


def test_merging_takes_shared_examples_once_and_renumbers_clashes(olmoe):
    memory = full_memory(olmoe, examples=(0, 1, 2))
    shared = memory.remove_examples([0])  # 1 and 2, the same tokens
    other = full_memory(olmoe, examples=(2, 3), seed=8)  # another 2
    assert len(memory.merge(shared)) == 30
    merged = memory.merge(other)
    assert len(merged) == 50 and len(memory) == 30 and len(other) == 20
    ids = merged.provenance.example_ids
    assert ids.unique().tolist() == [0, 1, 2, 3, 4]  # the other's 2 is now 4
    tokens = merged.provenance.tokens()
    assert torch.equal(tokens[4], other.provenance.tokens()[2]) and torch.equal(
        tokens[3], other.provenance.tokens()[3]
    )
    assert torch.equal(merged.layers[1].decoded_keys[ids == 4], other.layers[1].decoded_keys[:10])
    assert torch.equal(merged.layers[1].decoded_values[ids == 2], memory.layers[1].decoded_values[20:])
    found = neighbor_distances(merged.layers[0].stored_keys, ids, 4, 2**26)
    assert torch.equal(merged.layers[0].distances, found) and merged.layers[0].scale == distance_scale(found)
    assert_same(merged.remove_examples([3, 4]), memory.remove_examples([]))


def test_merging_without_tokens_never_mistakes_two_examples_for_one(olmoe):
    keys, values = rows_for()
    one, other = build(olmoe, keys, values), build(olmoe, *rows_for())
    assert one.merge(other).provenance.example_ids.tolist() == list(range(12))


def test_memories_that_differ_in_kind_do_not_merge(olmoe, tmp_path):
    memory = random_memory(olmoe)
    memory.save_pretrained(tmp_path, provenance=False)
    others = {
        "value_space": random_memory(olmoe, value_space="delta"),
        "key_dtype": random_memory(olmoe, key_dtype="float16"),
        "value_dtype": random_memory(olmoe, value_dtype="int8"),
        "key_codec": random_memory(olmoe, key_codec="pca", key_dim=8),
        "layers": build(olmoe, *rows_for(layers=(1,)), **PLAIN),
        "different models": random_memory(tiny_model("olmoe", seed=5)),
        "no provenance": RoutingMemory.from_pretrained(tmp_path),
    }
    for words, other in others.items():
        for pair in ((memory, other), (other, memory)):
            with pytest.raises(MemoryMismatchError, match=words):
                pair[0].merge(pair[1])
    bare = others["no provenance"]
    assert len(bare.merge(bare)) == 80 and bare.merge(bare).provenance is None


def test_push_makes_the_repository_and_uploads_the_folder(olmoe, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            calls.append(("create_repo", repo_id, kwargs))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def create_branch(self, repo_id, **kwargs):
            calls.append(("create_branch", repo_id, kwargs))

        def upload_folder(self, *, repo_id, folder_path, delete_patterns, **kwargs):
            assert_same(RoutingMemory.from_pretrained(folder_path), memory)
            assert all(pattern.startswith("memory") for pattern in delete_patterns)
            calls.append(("upload_folder", repo_id, kwargs))
            return "commit"

    memory = random_memory(olmoe)
    monkeypatch.setattr(folder_files, "HfApi", Api)
    options = dict(path_in_repo="sub", revision="v1", private=True, token="t", commit_message="m")
    assert memory.push_to_hub("name", **options) == "commit"
    upload = dict(path_in_repo="sub", revision="v1", token="t", commit_message="m", create_pr=False)
    assert calls == [
        ("create_repo", "name", dict(exist_ok=True, private=True, token="t")),
        ("create_branch", "me/name", dict(branch="v1", token="t", exist_ok=True)),
        ("upload_folder", "me/name", upload),
    ]


def test_pulling_downloads_a_memory_s_files_at_a_revision(olmoe, monkeypatch, tmp_path):
    memory, calls = random_memory(olmoe), []
    memory.save_pretrained(tmp_path / "sub")

    def download(repo_id, **kwargs):
        calls.append((repo_id, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(folder_files, "snapshot_download", download)
    place = dict(revision="v1", token="t", cache_dir="c", local_files_only=True, force_download=True)
    assert_same(RoutingMemory.from_pretrained("me/name", subfolder="sub", **place), memory)
    ((repo_id, asked),) = calls
    assert repo_id == "me/name" and place.items() <= asked.items()
    assert {"sub/*.json", "sub/*.safetensors"} <= set(asked["allow_patterns"])
    assert asked["ignore_patterns"] == ["sub/*/*.safetensors"]
    assert not any(pattern.endswith((".bin", ".py", ".pkl", "*")) for pattern in asked["allow_patterns"])


def test_a_repository_that_cannot_be_read_is_named_in_one_line(monkeypatch):
    def download(repo_id, **kwargs):
        raise LocalEntryNotFoundError("first line\n\nsecond line")

    monkeypatch.setattr(folder_files, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="'me/gone' is neither a folder nor.*first line second line") as caught:
        RoutingMemory.from_pretrained("me/gone")
    assert "\n" not in str(caught.value)


def test_merging_without_provenance_keeps_the_mean_of_the_scales(model, tmp_path):
    sides = []
    for seed, examples in ((1, (0, 1)), (2, (2, 3, 4))):
        full_memory(model, examples, seed=seed).save_pretrained(tmp_path / str(seed), provenance=False)
        sides.append(RoutingMemory.from_pretrained(tmp_path / str(seed)))
    one, other = sides
    merged = one.merge(other)
    for layer, rows in merged.layers.items():
        mine, theirs = one.layers[layer], other.layers[layer]
        assert rows.scale == pytest.approx((20 * mine.scale + 30 * theirs.scale) / 50)
        assert torch.equal(rows.distances, torch.cat([mine.distances, theirs.distances]))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_merging_without_provenance_takes_a_memory_of_fewer_rows_than_neighbours(olmoe, tmp_path, rows):
    sides = []
    for count in (30, rows):
        build(olmoe, *rows_for(count), num_neighbors=4).save_pretrained(tmp_path / str(count), provenance=False)
        sides.append(RoutingMemory.from_pretrained(tmp_path / str(count)))
    for one, other in (sides, sides[::-1]):
        merged = one.merge(other)
        kept = merged.layers[0].distances
        assert len(merged) == 30 + rows and kept.isfinite().all()
        assert kept.shape == ((33, 2) if rows == 3 else (30, 4))
        merged.save_pretrained(tmp_path / "merged")
        assert_same(RoutingMemory.from_pretrained(tmp_path / "merged"), merged)
