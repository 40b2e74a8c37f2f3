"""Models whose weights accelerate offloads: with a memory, and without, they compute what resident models compute."""

import copy
import logging
import pickle
from operator import attrgetter

import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from knnmoe_hf import attach_memory, calibrate, detach_memory, disable_memory
from knnmoe_hf.errors import MemoryMismatchError, UnsupportedModelError
from knnmoe_hf.models.fingerprint import fingerprint
from knnmoe_hf.models.gates import find_gates, gate_logits
from knnmoe_hf.models.probe import probe_model
from tests.conftest import random_memory, tiny_model
from tests.support.attaching import hooks_of
from tests.support.domain import domain_memory, own_text
from tests.support.families import FAMILIES as ALL_FAMILIES
from tests.support.families import family_model
from tests.support.offloading import OFFLOADS, PARTS, loaded_with_map
from tests.support.training import build


def results(model, tokens) -> dict[str, torch.Tensor]:
    """Logits with the memory and without it, and a generation."""
    with torch.no_grad():
        found = {"with": model(input_ids=tokens).logits}
        with disable_memory(model):
            found["without"] = model(input_ids=tokens).logits
    same = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    found["generated"] = model.generate(tokens[:2], **same)
    return found


def check_same(found: dict, wanted: dict) -> None:
    assert not torch.equal(wanted["with"], wanted["without"])
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def memory(model):
    return random_memory(model, confidence="context")


@pytest.fixture
def wanted(model, memory, tokens):
    resident = copy.deepcopy(model)
    attach_memory(resident, memory)
    return results(resident, tokens)


@pytest.mark.parametrize("way", OFFLOADS)
def test_a_memory_attaches_to_an_offloaded_model(model, memory, wanted, tokens, way):
    offloaded = OFFLOADS[way](model)
    attach_memory(offloaded, memory)
    check_same(results(offloaded, tokens), wanted)
    detach_memory(offloaded)
    with torch.no_grad():
        assert torch.equal(offloaded(input_ids=tokens).logits, wanted["without"])
    assert not hooks_of(offloaded)


@pytest.mark.parametrize("way", OFFLOADS)
def test_a_model_may_be_offloaded_with_its_memory(model, memory, wanted, tokens, way, caplog):
    attach_memory(model, memory)
    with caplog.at_level(logging.WARNING):
        offloaded = OFFLOADS[way](model)
    assert not [text for text in caplog.messages if "does not save the memory" in text]  # nothing was saved
    check_same(results(offloaded, tokens), wanted)


@pytest.mark.parametrize("part", PARTS)
def test_a_model_may_be_loaded_with_any_part_of_it_on_disk(model, memory, wanted, tokens, part, tmp_path):
    model.save_pretrained(tmp_path)
    offloaded = loaded_with_map(tmp_path, part)
    attach_memory(offloaded, memory)
    check_same(results(offloaded, tokens), wanted)


@pytest.mark.parametrize("way", ["cpu_offload", "cpu_offload of whole blocks", "disk_offload"])
def test_offloaded_gates_are_read_as_resident_ones(model, way):
    x = torch.randn(5, 32)
    gates = find_gates(model)
    wanted = fingerprint(gates), [gate_logits(gate, x) for gate in gates]
    gates = find_gates(OFFLOADS[way](model))
    assert all(gate.module.weight.device.type == "meta" for gate in gates)
    assert fingerprint(gates) == wanted[0]
    assert all(torch.equal(gate_logits(gate, x), logits) for gate, logits in zip(gates, wanted[1]))
    assert all(gate.module.weight.device.type == "meta" for gate in gates)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch_model with everything on disk"])
def test_a_memory_of_other_gates_is_refused_of_an_offloaded_model_too(family, way):
    offloaded = OFFLOADS[way](tiny_model(family))
    with pytest.raises(MemoryMismatchError, match="not those that this memory was built for"):
        attach_memory(offloaded, random_memory(tiny_model(family, seed=5)))
    assert not hooks_of(offloaded)


@pytest.mark.parametrize("way", ["cpu_offload", "cpu_offload of whole blocks", "disk_offload"])
def test_a_build_on_an_offloaded_model_gives_the_same_rows(family, way, tmp_path, tokens):
    options = dict(config={"confidence": "rbf"}, builder="candidates")
    wanted = build(tiny_model(family), tmp_path / "resident", **options)
    offloaded = OFFLOADS[way](tiny_model(family))
    found = build(offloaded, tmp_path / "offloaded", **options)
    for layer, rows in wanted.layers.items():
        assert torch.equal(found.layers[layer].decoded_keys, rows.decoded_keys)
        assert torch.equal(found.layers[layer].decoded_values, rows.decoded_values)
    assert all(parameter.requires_grad for parameter in offloaded.parameters())
    attach_memory(offloaded, wanted)  # each fits the other's model
    attach_memory(tiny_model(family), found)


def test_an_offloaded_model_calibrates_as_a_resident_one(tmp_path):
    memory, found = domain_memory("olmoe", "calibrated"), []
    for way in (lambda model: model, OFFLOADS["cpu_offload"]):
        model = way(tiny_model("olmoe"))
        fitted, record = calibrate(model, memory, {"other": own_text(tiny_model("olmoe"), 9, 1)})
        found.append((repr(record), repr({layer: rows.stats for layer, rows in fitted.layers.items()})))
    assert found[0] == found[1]


def test_weights_that_come_back_are_used_again(model, memory, wanted, tokens):
    attach_memory(model, memory)
    offloaded = OFFLOADS["cpu_offload"](model)
    with torch.no_grad():
        offloaded(input_ids=tokens)
    remove_hook_from_module(offloaded, recurse=True)
    check_same(results(offloaded, tokens), wanted)


def test_a_model_without_weights_is_refused_with_the_way_out(family, memory):
    model = tiny_model(family).to("meta")
    with pytest.raises(UnsupportedModelError, match="on the meta device.*from_pretrained"):
        attach_memory(model, memory)
    with pytest.raises(UnsupportedModelError, match="on the meta device.*from_pretrained"):
        probe_model(model)
    assert not hooks_of(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_what_was_probed_holds_nothing_of_the_model(model, copied):
    probed = probe_model(model)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(probed).values())
    twin = copied(probed)
    assert (twin.routers, twin.devices) == (probed.routers, probed.devices)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_family_may_be_offloaded_and_its_gates_are_watched(name, tokens):
    if name == "longcat_flash":
        pytest.skip("computes something else when it is offloaded, without a memory as well")
    resident, tokens = family_model(name), tokens[:2, :10] % 90
    memory = random_memory(resident)
    offloaded = OFFLOADS["cpu_offload with buffers"](copy.deepcopy(resident))
    attach_memory(resident, memory)
    attach_memory(offloaded, memory)
    with torch.no_grad():
        wanted = resident(input_ids=tokens).logits
        assert torch.equal(offloaded(input_ids=tokens).logits, wanted)
        assert torch.equal(copy.deepcopy(resident)(input_ids=tokens).logits, wanted)
        gate = find_gates(resident)[-1]
        holder = gate.caller if gate.family.bias_of_caller else gate.module
        changed = [gate.weight] if gate.current_rule().bias is None else [gate.weight, bias_of(gate.family, holder)]
        for tensor in changed:
            kept = tensor.data.clone()
            tensor.data.add_(torch.randn_like(tensor))
            with pytest.raises(MemoryMismatchError):
                resident(input_ids=tokens)
            tensor.data.copy_(kept)
            assert torch.equal(resident(input_ids=tokens).logits, wanted)


def bias_of(family, holder: torch.nn.Module) -> torch.Tensor:
    """The correction bias in a gate, or in the block that calls it."""
    return attrgetter(family.bias)(holder)


@pytest.mark.parametrize("switch", ["before", "after", "before and back"])
def test_a_memory_attaches_whatever_attention_is_chosen_for_continuous_batching(model, tokens, switch):
    memory = random_memory(model, confidence="context")
    attach_memory(model, memory)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.set_attn_implementation("eager")
    wanted = model.generate(tokens[:2], generation_config=config)[:, tokens.shape[1] :].tolist()
    detach_memory(model)
    if "before" in switch:
        model.set_attn_implementation("paged|eager")
    attach_memory(model, memory)
    assert model.config._attn_implementation == ("paged|eager" if "before" in switch else "eager")
    if switch == "before and back":
        model.set_attn_implementation("eager")
        found = model.generate(tokens[:2], generation_config=config)[:, tokens.shape[1] :].tolist()
    else:
        if switch == "after":
            model.set_attn_implementation("paged|eager")
        bounds = ContinuousBatchingConfig(use_cuda_graph=False, page_size=16, max_batch_tokens=64, num_blocks=64)
        results = model.generate_batch(
            tokens[:2].tolist(), generation_config=config, continuous_batching_config=bounds, progress_bar=False
        )
        found = [results[name].generated_tokens for name in sorted(results)]
    assert found == wanted


def test_a_model_loaded_for_continuous_batching_is_read_as_another(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="paged|eager")
    assert probe_model(loaded).routers == probe_model(model).routers
    attach_memory(loaded, random_memory(model))
    with pytest.raises(ValueError, match="without a paged attention cache"):  # what transformers itself refuses
        loaded(torch.arange(5)[None])
