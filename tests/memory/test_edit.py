"""Memories made of others: some of the rows, the rows of two, rows stored otherwise."""

import copy
from dataclasses import replace

import pytest
import torch

from knnmoe_hf import RoutingMemory
from knnmoe_hf.errors import MemoryMismatchError
from knnmoe_hf.lookup.layer import distance_scale, neighbor_distances
from knnmoe_hf.models.gates import find_gates, gate_logits
from tests.memory.helpers import assert_same, assert_same_tensors, build, full_memory, rows_for
from tests.support.attaching import attached
from tests.support.models import PLAIN, random_memory, tiny_model
from tests.support.stats import with_stats

PCA = dict(key_codec="pca", key_dim=32, key_whitening=0.5)


@pytest.fixture(scope="module")
def olmoe():
    return tiny_model("olmoe")


def gains(memory) -> torch.Tensor:
    return memory.provenance.nll_before - memory.provenance.nll_after


def assert_measured(memory) -> None:
    """Its distances and scales are those of the rows that it has."""
    for rows in memory.layers.values():
        found = neighbor_distances(rows.stored_keys, memory.provenance.example_ids, 4, 2**26)
        assert torch.equal(rows.distances, found) and rows.scale == distance_scale(found)


def assert_rows(memory, of, index) -> None:
    """Its rows are those rows of another, with their provenance and the tokens of their examples."""
    for layer, rows in memory.layers.items():
        assert torch.equal(rows.key_codes, of.layers[layer].key_codes[index])
        assert torch.equal(rows.decoded_values, of.layers[layer].decoded_values[index])
    for name in ("example_ids", "positions", "nll_before", "nll_after"):
        assert torch.equal(getattr(memory.provenance, name), getattr(of.provenance, name)[index])
    left = set(memory.provenance.example_ids.tolist())
    assert set(memory.provenance.tokens()) == left & set(of.provenance.tokens())


# fewer rows


@pytest.mark.parametrize("encoding", [{}, PCA | dict(key_dtype="int8", value_dtype="int8", value_experts=2)])
def test_the_rows_of_the_largest_gains_are_kept_in_their_order(olmoe, encoding):
    memory = full_memory(olmoe, **encoding)
    before = copy.deepcopy(memory)
    best = gains(memory).topk(13).indices.sort().values
    fewer = memory.select_rows(max_rows=13)
    assert len(fewer) == 13
    assert_rows(fewer, memory, best)
    assert_measured(fewer)
    assert fewer.origin.reference_set_hash is None
    assert_same(memory, before)
    for enough in (40, 1000, None):
        assert_rows(memory.select_rows(max_rows=enough), memory, slice(None))


def test_rows_that_gained_too_little_are_dropped_and_of_the_others_the_best_kept(olmoe):
    memory = full_memory(olmoe)
    worse = replace(memory.provenance, nll_after=memory.provenance.nll_after + 0.5)
    memory = replace(memory, provenance=worse)
    gain = gains(memory)
    for bound in (0.25, 0.0, -0.1, -100.0, gain[7].item()):
        kept = (gain >= bound).nonzero().squeeze(-1)
        assert_rows(memory.select_rows(min_gain=bound), memory, kept)
        both = memory.select_rows(max_rows=9, min_gain=bound)
        best = kept[gain[kept].argsort(descending=True)[:9]].sort().values
        assert_rows(both, memory, best)
    assert len(memory.select_rows(min_gain=100.0)) == 0


def test_equal_gains_are_kept_in_the_order_of_rows(olmoe):
    memory = full_memory(olmoe)
    known = memory.provenance
    memory = replace(memory, provenance=replace(known, nll_before=torch.ones(40), nll_after=torch.zeros(40)))
    assert_rows(memory.select_rows(max_rows=5), memory, slice(5))


def test_memories_without_recorded_gains_are_refused(olmoe, tmp_path):
    full_memory(olmoe).save_pretrained(tmp_path, provenance="none")
    for memory in (random_memory(olmoe), RoutingMemory.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="gains of this memory's rows are not recorded.*provenance"):
            memory.select_rows(max_rows=3)


def test_some_rows_are_taken_with_the_distances_of_all(olmoe, tmp_path):
    memory = full_memory(olmoe, value_experts=2)
    keep = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.4
    some = memory.take(keep)
    assert_rows(some, memory, keep)
    for layer, rows in some.layers.items():
        assert torch.equal(rows.distances, memory.layers[layer].distances) and len(rows.distances) == 40
        assert rows.scale == memory.layers[layer].scale
    some.save_pretrained(tmp_path)
    assert_same(RoutingMemory.from_pretrained(tmp_path), some)
    assert some.origin.reference_set_hash is None and memory.origin.reference_set_hash is not None
    assert replace(memory, provenance=None).take(keep).provenance is None


def test_changed_rows_forget_which_index_on_disk_was_theirs(olmoe, tmp_path):
    full_memory(olmoe).save_pretrained(tmp_path)
    opened = RoutingMemory.from_pretrained(tmp_path)
    keep = torch.arange(40) < 30
    assert all(rows.source for rows in opened.layers.values())
    edits = opened.take(keep), opened.remove_examples([1]), opened.select_rows(max_rows=9), opened.merge(opened)
    for changed in edits:
        assert not any(rows.source for rows in changed.layers.values())


# examples taken out, two memories joined


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
    with pytest.raises(ValueError, match=r"\[9\] are not examples"):
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
    memory.save_pretrained(tmp_path, provenance="none")
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


def test_merging_without_provenance_keeps_the_mean_of_the_scales(model, tmp_path, monkeypatch):
    sides = []
    for seed, examples in ((1, (0, 1)), (2, (2, 3, 4))):
        full_memory(model, examples, seed=seed).save_pretrained(tmp_path / str(seed), provenance="none")
        sides.append(RoutingMemory.from_pretrained(tmp_path / str(seed)))
    one, other = sides
    monkeypatch.setattr("knnmoe_hf.lookup.layer.neighbor_distances", None)  # nothing is measured
    merged = one.merge(other)
    for layer, rows in merged.layers.items():
        mine, theirs = one.layers[layer], other.layers[layer]
        assert rows.scale == pytest.approx((20 * mine.scale + 30 * theirs.scale) / 50)
        assert torch.equal(rows.distances, torch.cat([mine.distances, theirs.distances]))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_merging_without_provenance_takes_a_memory_of_fewer_rows_than_neighbours(olmoe, tmp_path, rows):
    sides = []
    for count in (30, rows):
        build(olmoe, *rows_for(count), num_neighbors=4).save_pretrained(tmp_path / str(count), provenance="none")
        sides.append(RoutingMemory.from_pretrained(tmp_path / str(count)))
    for one, other in (sides, sides[::-1]):
        merged = one.merge(other)
        kept = merged.layers[0].distances
        assert len(merged) == 30 + rows and kept.isfinite().all()
        assert kept.shape == ((33, 2) if rows == 3 else (30, 4))
        merged.save_pretrained(tmp_path / "merged")
        assert_same(RoutingMemory.from_pretrained(tmp_path / "merged"), merged)


# rows stored otherwise


@pytest.mark.parametrize(
    "options",
    [
        dict(PCA, key_dtype="int8"),
        dict(key_codec="logits"),
        dict(key_dtype="bfloat16", value_dtype="float16"),
        dict(PCA, key_dim=5, key_whitening=1.0, value_dtype="int8", value_experts=2),
        dict(num_neighbors=2, gamma=0.8, confidence="context"),
    ],
    ids=str,
)
def test_rows_stored_otherwise_are_as_if_built_so(family, options):
    model = tiny_model(family)
    memory = full_memory(model)
    before = copy.deepcopy(memory)
    recoded, expected = memory.recoded(model, **options), full_memory(model, **options)
    assert_same(recoded, expected)
    assert options.items() <= recoded.config.options().items()
    recoded.check_config()
    assert_same(memory, before)


def test_rows_stored_as_they_were_stay_what_they_are(olmoe, tokens):
    encoding = PCA | dict(key_dtype="int8", value_dtype="int8", value_experts=2)
    memory = full_memory(olmoe, **encoding)
    again = memory.recoded(olmoe)
    for layer, rows in again.layers.items():
        old = memory.layers[layer]
        assert torch.equal(rows.values.codes, old.values.codes) and torch.equal(
            rows.values.experts, old.values.experts
        )
        distances, before = (torch.cdist(keys, keys) for keys in (rows.decoded_keys, old.decoded_keys))
        torch.testing.assert_close(distances, before, rtol=0.05, atol=0.05 * before.max().item())
    logits = []
    for one in (memory, again):
        with attached(olmoe, one), torch.no_grad():
            logits.append(olmoe(input_ids=tokens).logits)
    assert (logits[0] - logits[1]).abs().mean() < 0.05 * logits[0].std()


def test_what_a_codec_has_lost_cannot_be_had_back(olmoe):
    memory = full_memory(olmoe, key_codec="logits")
    for codec in ("raw", "pca"):
        with pytest.raises(ValueError, match=f"key_codec='{codec}' cannot be made of logits: build the memory anew"):
            memory.recoded(olmoe, key_codec=codec)
    small = memory.recoded(olmoe, key_dtype="int8")
    for layer, rows in small.layers.items():
        torch.testing.assert_close(rows.decoded_keys, memory.layers[layer].decoded_keys, rtol=0, atol=0.1)
        gate = find_gates(olmoe)[layer]
        raw = full_memory(olmoe).layers[layer].decoded_keys
        torch.testing.assert_close(rows.encoder.inputs(rows.key_codes), gate_logits(gate, raw), rtol=0, atol=0.1)


def test_recoding_for_another_model_or_into_other_values_is_refused(olmoe):
    memory = full_memory(olmoe)
    with pytest.raises(ValueError, match="value_space='delta' cannot be made of 'logits' values"):
        memory.recoded(olmoe, value_space="delta")
    with pytest.raises(ValueError, match="'codec' is not an option"):
        memory.recoded(olmoe, codec="pca")
    with pytest.raises(ValueError, match="key_dim=0"):
        memory.recoded(olmoe, key_dim=0)
    with pytest.raises(MemoryMismatchError):
        memory.recoded(tiny_model("olmoe", seed=9), key_dtype="int8")


def test_a_recoded_memory_asks_for_a_calibration_of_its_own(olmoe, caplog):
    memory = full_memory(olmoe, confidence="calibrated")
    memory = with_stats(memory)
    recoded = memory.recoded(olmoe, key_dtype="int8")
    assert all(rows.stats is None for rows in recoded.layers.values()) and memory.layers[0].stats is not None
    with attached(olmoe, memory):
        assert "falls back" not in caplog.text
    with attached(olmoe, recoded):
        assert "falls back to 'context'" in caplog.text
