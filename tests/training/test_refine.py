"""What may follow a build: second keys, fewer rows, fewer layers, each judged on references held out."""

import copy
import logging

import pytest
import torch

from knnmoe_hf import RoutingMemory, active_memory, attach_memory, detach_memory, disable_memory, get_memory
from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.evaluation.scores import score
from knnmoe_hf.models.attach import attached
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import RoutingHooks
from knnmoe_hf.training.refine import best_layers, rekeyed
from tests.conftest import FAMILIES, random_memory, tiny_model
from tests.support.domain import domain, domain_memory
from tests.memory.helpers import assert_same, assert_same_tensors, full_memory
from tests.support.training import trainer_for


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def memory(family):
    return domain_memory(family)


def with_options(memory, model=None, **options) -> RoutingMemory:
    if model is not None:
        return memory.recoded(model, **options)
    changed = copy.copy(memory)
    changed.config = copy.deepcopy(memory.config)
    for name, value in options.items():
        setattr(changed.config, name, value)
    return changed


def gate_inputs(model, ids: list[int]) -> dict[int, torch.Tensor]:
    """What each gate sees at every token of one example."""
    seen = {}
    handles = [
        gate.module.register_forward_pre_hook(lambda _, args, i=gate.layer: seen.update({i: args[0].reshape(-1, 32)}))
        for gate in find_gates(model)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def held_out_nll(model, memory, held) -> float:
    with attached(model, memory):
        return score(model, held.rows, 4).mean_nll


# keys collected again


def test_without_an_effect_the_second_keys_are_the_first(family, model, memory):
    """Rows of unlike lengths and with positions of their own: each key comes from its own token."""
    keep = torch.rand(len(memory), generator=torch.Generator().manual_seed(0)) < 0.7
    shut = with_options(memory.take(keep), context_threshold=9.0)
    _, found = rekeyed(model, shut)
    assert found.nll_first == pytest.approx(found.nll_second, abs=1e-6)
    assert set(found.drift) == {0, 1} and max(found.drift.values()) < 1e-9


def test_each_second_key_is_what_the_gate_sees_with_a_memory_of_the_other_parts(family, model, memory, monkeypatch):
    calls = []
    monkeypatch.setattr(
        RoutingMemory,
        "with_inputs",
        lambda self, base, inputs, own=RoutingMemory.with_inputs: calls.append(inputs) or own(self, base, inputs),
    )
    _, found = rekeyed(model, memory)
    (inputs,) = calls
    known, tokens = memory.provenance, memory.provenance.tokens()
    names = list(tokens)
    for name in (0, 6, 17, 47):
        part = names[names.index(name) % 4 :: 4]
        own = known.example_ids == name
        others = memory.take(~torch.isin(known.example_ids, torch.tensor(part)))
        with attached(model, others):
            seen = gate_inputs(model, tokens[name].tolist())
        for layer, x in seen.items():
            torch.testing.assert_close(inputs[layer][own], x[known.positions[own].long()], rtol=1e-4, atol=1e-5)
    for layer, rows in memory.layers.items():
        moved = (inputs[layer] - rows.decoded_keys).square().sum(-1).mean() / rows.scale
        assert found.drift[layer] == pytest.approx(moved.item(), abs=1e-6)
    assert found.drift[0] < 1e-6 and found.drift[1] > 0.1  # what the first gate sees, no memory has changed


@pytest.mark.parametrize("options", [dict(confidence="rbf"), dict(confidence="rbf", gamma=0.5), {}], ids=str)
def test_second_keys_are_kept_only_if_held_out_references_fare_better(model, memory, options, caplog):
    memory = with_options(memory, **options)
    before = copy.deepcopy(memory)
    with caplog.at_level(logging.INFO, "knnmoe_hf"):
        chosen, found = rekeyed(model, memory)
    assert "second pass: Rekeying(" in caplog.text and "drift=" in caplog.text
    assert_same(memory, before)
    held = hold_out(memory)
    about = dict(abs=5e-3)  # which of several equally near rows are neighbours may differ from run to run
    assert found.nll_first == pytest.approx(held_out_nll(model, memory.take(held.rest), held), **about)
    assert found.kept == (found.nll_second < found.nll_first)
    if not found.kept:
        assert chosen is memory
        return
    assert found.nll_second == pytest.approx(held_out_nll(model, chosen.take(held.rest), held), **about)
    for layer, rows in chosen.layers.items():
        assert torch.equal(rows.decoded_values, memory.layers[layer].decoded_values)
        moved = (rows.decoded_keys - memory.layers[layer].decoded_keys).square().sum(-1).mean() / memory.layers[
            layer
        ].scale
        assert found.drift[layer] == pytest.approx(moved.item(), abs=1e-6)
    assert chosen.provenance is memory.provenance and chosen.origin == memory.origin


def test_here_second_keys_are_kept_at_times_and_at_times_not():
    memories = {family: with_options(domain_memory(family), confidence="rbf") for family in ("olmoe", "qwen3_moe")}
    kept = [rekeyed(tiny_model(family), memory)[1].kept for family, memory in memories.items()]
    assert kept == [False, True]


@pytest.mark.parametrize(
    "options",
    [dict(key_codec="pca", key_dim=12, key_dtype="int8", value_dtype="int8"), dict(key_codec="logits")],
    ids=["pca", "logits"],
)
def test_any_codec_s_keys_can_be_collected_again(model, memory, options, tmp_path):
    encoded = with_options(memory, model, **options)
    chosen, found = rekeyed(model, encoded)
    assert set(found.drift) == {0, 1} and found.drift[1] > 1e-4
    chosen.check_config()
    for layer, rows in chosen.layers.items():
        assert rows.key_codes.dtype == encoded.layers[layer].key_codes.dtype
        torch.testing.assert_close(rows.decoded_values, encoded.layers[layer].decoded_values, rtol=1e-4, atol=1e-4)
    chosen.save_pretrained(tmp_path)
    assert_same(RoutingMemory.from_pretrained(tmp_path), chosen)


def test_too_few_references_keep_their_keys(model, memory, caplog):
    for few in (memory.remove_examples(range(7, 48)), random_memory(model)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "knnmoe_hf"):
            same, found = rekeyed(model, few)
        assert same is few and found is None
        assert f"{len(few)} rows hold too few examples to hold any out" in caplog.text
    assert rekeyed(model, memory.remove_examples(range(8, 48)))[1] is not None


def test_a_second_pass_leaves_model_and_attached_memories_alone(model, memory):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = rekeyed(model, memory)[1]
    assert RoutingHooks.of(model) is None
    mine = random_memory(model)
    attach_memory(model, mine, "mine")
    model.train()
    assert rekeyed(model, memory)[1] == found
    best_layers(model, memory, 1)
    assert active_memory(model) == "mine" and get_memory(model) is mine
    assert all(part.training for part in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    detach_memory(model)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# fewer layers


def test_the_layer_that_alone_gains_most_on_held_out_references_is_kept(model, memory, caplog):
    held = hold_out(memory)
    nll = {}
    for layer in memory.layers:
        alone = copy.copy(memory.take(held.rest))
        alone.layers = {layer: alone.layers[layer]}
        nll[layer] = held_out_nll(model, alone, held)
    before = copy.deepcopy(memory)
    with caplog.at_level(logging.INFO, "knnmoe_hf"):
        fewer = best_layers(model, memory, 1)
    best = min(nll, key=nll.get)
    assert list(fewer.layers) == fewer.config.layers == [best]
    assert "gain of each layer alone" in caplog.text
    assert_same_tensors(fewer.layers[best].tensors(), memory.layers[best].tensors())
    assert_same(memory, before)


def test_the_best_layers_come_in_the_model_s_order(tmp_path):
    model = tiny_model("olmoe", num_hidden_layers=4)
    memory = full_memory(model, examples=tuple(range(16)))
    fewer = best_layers(model, memory, 3)
    assert len(fewer.layers) == 3 and list(fewer.layers) == sorted(fewer.layers) == fewer.config.layers
    assert set(best_layers(model, memory, 2).layers) < set(fewer.layers)
    fewer.save_pretrained(tmp_path)
    loaded = RoutingMemory.from_pretrained(tmp_path)
    assert_same(loaded, fewer)
    with attached(model, loaded):
        assert set(RoutingHooks.of(model).current) == set(fewer.layers)


def test_all_layers_stay_where_all_are_asked_for_or_nothing_can_be_held_out(model, memory):
    few = memory.remove_examples(range(7, 48))
    for same, count in ((memory, 2), (memory, 5), (few, 1)):
        assert best_layers(model, same, count) is same


def test_the_base_of_a_layer_s_gain_is_the_model_without_any_memory(model, memory, caplog):
    attach_memory(model, random_memory(model))
    held = hold_out(memory)
    with disable_memory(model):
        base = score(model, held.rows, 4).mean_nll
    with caplog.at_level(logging.INFO, "knnmoe_hf"):
        fewer = best_layers(model, memory, 1)
    (layer,) = fewer.layers
    gain = base - held_out_nll(model, fewer.take(held.rest), held)
    assert f"{layer}: {gain:.4f}"[:-2] in caplog.text
    detach_memory(model)


# by way of the trainer


def built(model, tmp_path, **arguments):
    references = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in domain(24, 0, length=10)]
    config = dict(confidence="context", num_neighbors=4, gamma=0.1)
    options = dict(per_device_train_batch_size=24, builder_steps=3)
    trainer = trainer_for(model, tmp_path, references, config, **(options | arguments))
    trainer.train()
    assert get_memory(model) is trainer.memory
    detach_memory(model)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = built(tiny_model("olmoe"), tmp_path_factory.mktemp("whole"))
    assert trainer.rekeying is None and trainer.calibration is None
    return trainer.memory


def test_a_build_keeps_the_rows_that_its_arguments_ask_for(tmp_path, whole):
    model = tiny_model("olmoe")
    gain = whole.provenance.nll_before - whole.provenance.nll_after
    assert len(whole) == 24 * 9 and list(whole.layers) == [0, 1]
    assert_same(built(model, tmp_path, max_rows=50).memory, whole.select_rows(max_rows=50))
    some = built(model, tmp_path, min_gain=0.5).memory
    assert 0 < len(some) == int((gain >= 0.5).sum()) < len(whole)
    assert_same(some, whole.select_rows(min_gain=0.5))
    merged = built(model, tmp_path, merge_distance=0.3).memory
    assert_same(merged, whole.merge_duplicates(model, 0.3))
    assert len(merged) < len(whole)


def test_what_follows_a_build_comes_in_order_and_is_saved(tmp_path, whole):
    model = tiny_model("olmoe")
    trainer = built(model, tmp_path, rekey=True, max_rows=120, merge_distance=0.2, num_layers=1)
    chosen, found = rekeyed(model, whole, 24)
    wanted = chosen.select_rows(max_rows=120).merge_duplicates(model, 0.2)
    assert trainer.rekeying == found and len(wanted) < 120
    assert_same(trainer.memory, best_layers(model, wanted, 1, 24))
    trainer.save_model(str(tmp_path / "saved"))
    assert_same(RoutingMemory.from_pretrained(tmp_path / "saved"), trainer.memory)


def test_keys_are_collected_again_with_the_context_and_the_calibration_comes_last(tmp_path, whole):
    model, ordinary = tiny_model("olmoe"), domain(6, 5)
    text = [{"input_ids": [40 + i for i in one["input_ids"]], "labels": one["labels"]} for one in ordinary]
    references = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in domain(24, 0, length=10)]
    config = dict(confidence="calibrated", num_neighbors=4, gamma=0.1)
    arguments = dict(per_device_train_batch_size=24, builder_steps=3, rekey=True, max_rows=100)
    trainer = trainer_for(model, tmp_path, references, config, dict(ordinary_dataset=text), **arguments)
    trainer.train()
    detach_memory(model)
    chosen, found = rekeyed(model, whole, 24)
    assert trainer.rekeying == found and trainer.memory.config.confidence == "calibrated"
    for layer, rows in chosen.select_rows(max_rows=100).layers.items():
        assert_same_tensors(trainer.memory.layers[layer].tensors(), rows.tensors())
        assert (trainer.memory.layers[layer].stats is None) == (trainer.calibration is None)
