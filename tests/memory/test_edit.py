"""Memories made of others: some rows, rows that say the same as one, rows stored otherwise."""

import copy
from dataclasses import replace

import pytest
import torch

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.errors import MemoryMismatchError
from knnmoe_hf.lookup.layer import distance_scale, neighbor_distances
from knnmoe_hf.models.gates import find_gates, gate_logits
from tests.conftest import PLAIN, random_memory, tiny_model
from tests.memory.helpers import assert_same, assert_same_tensors, full_memory
from tests.support.attaching import attached
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
        chosen = (gain >= bound).nonzero().squeeze(-1)
        assert_rows(memory.select_rows(min_gain=bound), memory, chosen)
        both = memory.select_rows(max_rows=9, min_gain=bound)
        best = chosen[gain[chosen].argsort(descending=True)[:9]].sort().values
        assert_rows(both, memory, best)
    assert len(memory.select_rows(min_gain=100.0)) == 0


def test_equal_gains_are_kept_in_the_order_of_rows(olmoe):
    memory = full_memory(olmoe)
    known = memory.provenance
    memory = replace(memory, provenance=replace(known, nll_before=torch.ones(40), nll_after=torch.zeros(40)))
    assert_rows(memory.select_rows(max_rows=5), memory, slice(5))


def test_gains_that_were_not_recorded_are_asked_for(olmoe, tmp_path):
    full_memory(olmoe).save_pretrained(tmp_path, provenance=False)
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
    assert replace(memory, provenance=None).take(keep).provenance is None


# rows that say the same

DISTINCT = 20


def with_duplicates(model, copies, examples=None, **options) -> RoutingMemory:
    """Twenty rows far apart, and for each of `copies` one more: (row, change of key by layer, change of values)."""
    gates, tables = find_gates(model), ({}, {})
    for gate in gates:
        generator = torch.Generator().manual_seed(gate.layer)
        keys = 10 * torch.randn(DISTINCT, gate.hidden_size, generator=generator)
        values = torch.randn(DISTINCT, gate.num_experts, generator=generator)
        more = [(keys[row] + moved.get(gate.layer, 0), values[row] + change) for row, moved, change in copies]
        for table, rows, place in zip(tables, (keys, values), (0, 1)):
            table[gate.layer] = torch.cat([rows, torch.stack([one[place] for one in more])])
    config = KNNMoEConfig(**(PLAIN | dict(num_neighbors=4) | options))
    return RoutingMemory.from_rows(config, *tables, model, examples)


def test_rows_that_say_the_same_become_one_with_the_mean_of_their_values(model):
    memory = with_duplicates(model, [(3, {}, 0.3), (3, {}, 0.6), (11, {}, 0.2)])  # all experts alike: the same ones
    before = copy.deepcopy(memory)
    merged = memory.merge_duplicates(model, 0.01)
    assert len(merged) == DISTINCT
    for layer, rows in merged.layers.items():
        old = memory.layers[layer]
        assert torch.equal(rows.decoded_keys, old.decoded_keys[:DISTINCT])
        wanted = old.decoded_values[:DISTINCT].clone()
        wanted[3] += 0.3
        wanted[11] += 0.1
        torch.testing.assert_close(rows.decoded_values, wanted)
    assert_measured(merged)
    assert_same(memory, before)


def test_the_earliest_row_stands_for_the_others_with_where_it_came_from(model):
    near = {0: 1e-3, 1: 1e-3}
    memory = with_duplicates(model, [(5, near, 0)], examples=range(100, 121))
    merged = memory.merge_duplicates(model, 0.01)
    assert_rows(merged, memory, torch.arange(DISTINCT))
    assert merged.provenance.example_ids.tolist() == list(range(100, 120))


@pytest.mark.parametrize("space", ["logits", "delta", "assignment"])
def test_rows_that_choose_other_experts_are_never_one(model, space):
    other = torch.zeros(8)
    other[5] = 50.0
    memory = with_duplicates(model, [(4, {}, other), (9, {}, 0.0)])
    keys = {layer: rows.decoded_keys for layer, rows in memory.layers.items()}
    values = {layer: rows.decoded_values for layer, rows in memory.layers.items()}
    if space == "assignment":
        values = {layer: table.softmax(-1) for layer, table in values.items()}
    memory = RoutingMemory.from_rows(KNNMoEConfig(**(PLAIN | dict(value_space=space))), keys, values, model)
    merged = memory.merge_duplicates(model, 0.5)
    assert len(merged) == DISTINCT + 1
    for layer, rows in merged.layers.items():
        torch.testing.assert_close(rows.decoded_values, memory.layers[layer].decoded_values[: DISTINCT + 1])


def test_experts_beyond_the_model_s_own_number_are_of_no_account(model):
    memory = with_duplicates(model, [(4, {}, torch.zeros(8))])
    for rows in memory.layers.values():
        least = rows.decoded_values[4].argmin()
        rows.values.codes[DISTINCT, least] -= 5.0  # who is third to eighth may differ
    assert len(memory.merge_duplicates(model, 0.01)) == DISTINCT


@pytest.mark.parametrize("layer", [0, 1])
def test_keys_must_be_near_in_every_layer_and_the_bound_is_in_units_of_its_scale(model, layer):
    probe = with_duplicates(model, [(7, {}, 0.0)])
    apart = (0.2 * probe.layers[layer].scale) ** 0.5 / 32**0.5  # of each of 32 numbers
    memory = with_duplicates(model, [(7, {layer: apart}, 0.0)])
    found = (
        memory.layers[layer].decoded_keys[7] - memory.layers[layer].decoded_keys[-1]
    ).square().sum() / memory.layers[layer].scale
    assert found.item() == pytest.approx(0.2, rel=0.1)
    assert len(memory.merge_duplicates(model, found.item() * 1.01)) == DISTINCT
    assert len(memory.merge_duplicates(model, found.item() * 0.99)) == DISTINCT + 1


def test_what_is_near_a_row_that_goes_is_not_thereby_near_the_one_that_stays(model):
    scale = with_duplicates(model, [(7, {}, 0.0)]).layers[0].scale
    step = (0.2 * scale / 32) ** 0.5  # 7 and the copy are 0.2 apart, as the copies are; 7 and the second copy 0.8
    chain = [(7, {0: step, 1: step}, 0.1), (7, {0: 2 * step, 1: 2 * step}, 0.2)]
    memory = with_duplicates(model, chain)
    merged = memory.merge_duplicates(model, 0.3)
    assert len(merged) == DISTINCT + 1
    for layer, rows in merged.layers.items():
        old = memory.layers[layer]
        assert torch.equal(rows.decoded_keys[-1], old.decoded_keys[-1]) and torch.equal(
            rows.decoded_values[-1], old.decoded_values[-1]
        )
        torch.testing.assert_close(rows.decoded_values[7], old.decoded_values[[7, DISTINCT]].mean(0))


def test_many_copies_of_a_row_are_one_and_all_count(model):
    memory = with_duplicates(model, [(2, {}, 0.1 * i) for i in range(1, 30)])
    merged = memory.merge_duplicates(model, 0.01)
    assert len(merged) == DISTINCT
    torch.testing.assert_close(merged.layers[0].decoded_values[2], memory.layers[0].decoded_values[2] + 0.1 * 29 / 2)


def test_encoded_rows_are_merged_as_what_they_stand_for(olmoe, tmp_path):
    encoding = PCA | dict(key_dtype="int8", value_dtype="int8", value_experts=2)
    memory = with_duplicates(olmoe, [(3, {}, 0.4), (8, {}, -0.4)], **encoding)
    merged = memory.merge_duplicates(olmoe, 0.01)
    assert len(merged) == DISTINCT
    for layer, rows in merged.layers.items():
        old = memory.layers[layer]
        assert rows.values.codes.dtype == torch.int8 and rows.values.codes.shape == (DISTINCT, 2)
        torch.testing.assert_close(
            rows.decoded_values[3], old.decoded_values[[3, DISTINCT]].mean(0), rtol=0, atol=0.03
        )
        torch.testing.assert_close(rows.decoded_values[0], old.decoded_values[0], rtol=0, atol=0.03)
    merged.save_pretrained(tmp_path)
    assert_same(RoutingMemory.from_pretrained(tmp_path), merged)


def test_nothing_is_merged_where_nothing_is_alike_or_there_is_nothing(model):
    memory = random_memory(model)
    assert_same(memory.merge_duplicates(model, 0.0), memory.remove_examples([]))
    for rows in (0, 1):
        assert len(memory.remove_examples(range(rows, 40)).merge_duplicates(model, 1.0)) == rows
    with pytest.raises(MemoryMismatchError):
        memory.merge_duplicates(tiny_model("olmoe", seed=9), 0.1)


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
    recoded, wanted = memory.recoded(model, **options), full_memory(model, **options)
    assert_same(recoded, wanted)
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
    with pytest.raises(ValueError, match="'codec' is no option"):
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


def test_other_inputs_give_other_keys_to_the_same_values(olmoe):
    memory = full_memory(olmoe, **PCA, key_dtype="int8", value_experts=2)
    inputs = {layer: torch.randn(40, 32, generator=torch.Generator().manual_seed(layer)) for layer in (0, 1)}
    moved = memory.with_inputs(olmoe, inputs)
    wanted = RoutingMemory.from_rows(
        memory.config,
        inputs,
        {i: r.decoded_values for i, r in memory.layers.items()},
        olmoe,
        memory.provenance.example_ids,
    )
    for layer, rows in moved.layers.items():
        assert_same_tensors(rows.tensors(), wanted.layers[layer].tensors())
        torch.testing.assert_close(rows.decoded_values, memory.layers[layer].decoded_values)
    assert moved.provenance is memory.provenance
