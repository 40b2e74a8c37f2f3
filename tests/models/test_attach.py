"""Attaching, naming, disabling and detaching memories: the model's outputs, and the hooks left on it."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from knnmoe_hf import active_memory, attach_memory, detach_memory, disable_memory, set_memory, use_memory
from knnmoe_hf.errors import MemoryMismatchError, UnsupportedModelError
from knnmoe_hf.models.attach import get_memory, watch_lookups
from knnmoe_hf.models.gates import find_gates
from tests.conftest import random_memory, tiny_model


def logits_of(model, tokens, **options):
    with torch.no_grad():
        return model(input_ids=tokens, **options).logits


def traces(model) -> list:
    """All attributes of each module by name, and all hooks by identity, to compare before and after."""
    found = []
    for name, module in model.named_modules():
        tables = {k: list(map(id, v.values())) for k, v in vars(module).items() if k.endswith("_hooks")}
        tables |= {k: dict(v) for k, v in vars(module).items() if "_hooks_" in k and isinstance(v, dict)}
        found.append(
            (name, type(module), sorted(dir(module)), sorted(vars(module)), vars(module).get("forward"), tables)
        )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_memory_changes_logits_in_every_dtype_and_detaching_restores_them(family, tokens, dtype):
    model = tiny_model(family).to(dtype)
    memory = random_memory(model)
    weights = copy.deepcopy(model.state_dict())
    base = logits_of(model, tokens)
    attach_memory(model, memory)
    changed = logits_of(model, tokens)
    assert changed.dtype == dtype and changed.isfinite().all()
    assert not torch.equal(changed, base)
    detach_memory(model)
    assert torch.equal(logits_of(model, tokens), base)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_qwen3_moe_attaches_with_either_norm_topk_prob(tokens, norm_topk_prob):
    model = tiny_model("qwen3_moe", norm_topk_prob=norm_topk_prob)
    base = logits_of(model, tokens)
    attach_memory(model, random_memory(model))
    assert not torch.equal(logits_of(model, tokens), base)


def test_a_memory_built_in_float32_attaches_to_the_same_model_in_half_precision(family, tokens):
    memory = random_memory(tiny_model(family))
    for dtype in (torch.bfloat16, torch.float16):
        attach_memory(tiny_model(family).to(dtype), memory)


def lora(model, **options):
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options)).eval()


def test_a_memory_works_inside_peft_and_survives_merge_and_unload(family, tokens):
    model = lora(tiny_model(family), target_modules=["q_proj", "v_proj"])
    memory = random_memory(tiny_model(family))  # built for the base model: LoRA on attention leaves its gates alone
    base = logits_of(model, tokens)
    attach_memory(model, memory)
    with disable_memory(model):
        assert torch.equal(logits_of(model, tokens), base)
    changed = logits_of(model, tokens)
    assert (changed - base).abs().max() > 0.1
    merged = model.merge_and_unload()
    assert active_memory(merged) == "default" and get_memory(merged) is memory
    torch.testing.assert_close(logits_of(merged, tokens), changed, atol=1e-3, rtol=1e-3)
    detach_memory(merged)
    torch.testing.assert_close(logits_of(merged, tokens), base, atol=1e-3, rtol=1e-3)


def test_a_memory_works_beside_lora_on_the_gates_themselves(family, tokens):
    model = tiny_model(family)
    name = find_gates(model)[0].name.split(".", 3)[3] + ".weight"
    model = lora(model, target_modules=["q_proj"], target_parameters=[name])
    assert [gate.layer for gate in find_gates(model)] == [0, 1]
    assert all(gate.name.endswith("base_layer") for gate in find_gates(model))  # PEFT wraps each gate
    memory = random_memory(model)
    base = logits_of(model, tokens)
    attach_memory(model, memory)
    changed = logits_of(model, tokens)
    assert (changed - base).abs().max() > 0.1
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, tokens), changed, atol=1e-3, rtol=1e-3)
    with disable_memory(merged):
        torch.testing.assert_close(logits_of(merged, tokens), base, atol=1e-3, rtol=1e-3)


def test_of_several_memories_the_last_attached_or_set_is_in_force(model, tokens):
    memories = {name: random_memory(model, seed=seed) for seed, name in enumerate(("law", "medicine"), start=1)}
    base, alone = logits_of(model, tokens), {}
    for name, memory in memories.items():
        attach_memory(model, memory, name=name)
        alone[name] = logits_of(model, tokens)
        assert active_memory(model) == name and get_memory(model) is memory
    assert not torch.equal(alone["law"], alone["medicine"])
    set_memory(model, "law")
    assert active_memory(model) == "law" and get_memory(model, "medicine") is memories["medicine"]
    assert torch.equal(logits_of(model, tokens), alone["law"])
    detach_memory(model, "medicine")
    assert torch.equal(logits_of(model, tokens), alone["law"])
    attach_memory(model, memories["medicine"], name="medicine")
    detach_memory(model, "medicine")  # the one in force: none takes its place
    assert active_memory(model) is None
    assert torch.equal(logits_of(model, tokens), base)
    with pytest.raises(ValueError, match="call set_memory with one of \\['law'\\]"):
        get_memory(model)
    set_memory(model, "law")
    assert torch.equal(logits_of(model, tokens), alone["law"])


def test_disabling_nests_and_ends_with_an_exception(model, tokens):
    base = logits_of(model, tokens)
    with disable_memory(model):  # nothing attached: does nothing
        assert active_memory(model) is None
    attach_memory(model, random_memory(model))
    changed = logits_of(model, tokens)
    with pytest.raises(KeyError), disable_memory(model):
        with disable_memory(model):
            assert torch.equal(logits_of(model, tokens), base)
        assert active_memory(model) is None
        set_memory(model, "default")  # takes effect when the context ends
        assert torch.equal(logits_of(model, tokens), base)
        raise KeyError
    assert active_memory(model) == "default"
    assert torch.equal(logits_of(model, tokens), changed)


def test_detaching_leaves_nothing_behind(model, tokens):
    logits_of(model, tokens)  # transformers sets some attributes of its own in a first forward
    before = traces(model)
    memory = random_memory(model)
    attach_memory(model, memory)
    attach_memory(model, memory, name="again")
    assert traces(model) != before
    with watch_lookups(model, lambda event: None):
        logits_of(model, tokens, attention_mask=torch.ones_like(tokens))
    gone = weakref.ref(memory)
    table = weakref.ref(memory.layers[0].decoded_keys)
    detach_memory(model, "default")
    assert traces(model) != before
    detach_memory(model)
    assert traces(model) == before
    del memory
    gc.collect()
    assert gone() is None and table() is None


def test_names_that_are_taken_or_unknown_are_errors(model):
    memory = random_memory(model)
    for call in (detach_memory, lambda m: set_memory(m, "law"), get_memory):
        with pytest.raises(ValueError, match=f"no memory is attached to this {type(model).__name__}"):
            call(model)
    attach_memory(model, memory, name="law")
    with pytest.raises(ValueError, match="'law' is already attached"):
        attach_memory(model, memory, name="law")
    for call in (detach_memory, set_memory, get_memory):
        with pytest.raises(ValueError, match="no memory named 'medicine' is attached: choose among \\['law'\\]"):
            call(model, "medicine")
    assert active_memory(model) == "law"
    with pytest.raises(TypeError, match="RoutingMemory.from_pretrained"):
        attach_memory(model, "me/my-memory")


def test_a_name_that_is_no_string_is_a_type_error_wherever_it_is_given():
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model), name="law")
    for call in (set_memory, get_memory, detach_memory, lambda *given: use_memory(*given).__enter__()):
        for name in (3, ["law"], b"law", *([None] if call is set_memory else [])):
            with pytest.raises(TypeError, match="is not the name of a memory: use a string"):
                call(model, name)
    assert active_memory(model) == "law"


def test_inside_a_context_whose_memory_was_detached_elsewhere_other_names_are_not_attached():
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model), name="law")
    with use_memory(model, "law"):
        thread = threading.Thread(target=detach_memory, args=(model,))
        thread.start()
        thread.join()
        assert active_memory(model) == "law"
        with pytest.raises(ValueError, match="no memory is attached to this OlmoeForCausalLM"):
            set_memory(model, "medicine")


def foreign_memories(model, family):
    """Memories that do not fit `model`, and what the error says."""
    yield random_memory(tiny_model(family, seed=5)), "not those that this memory was built for"
    yield (
        random_memory(tiny_model(family, hidden_size=64)),
        "hidden size 64 and 8 experts in layer 0, the model has 32",
    )
    experts = {"num_local_experts" if family == "gpt_oss" else "num_experts": 4}
    yield random_memory(tiny_model(family, **experts)), "hidden size 32 and 4 experts"
    yield random_memory(tiny_model(family, num_hidden_layers=3)), "in layer 2, the model has no gate there"
    other = {"olmoe": "qwen3_moe", "qwen3_moe": "gpt_oss", "gpt_oss": "olmoe"}[family]
    yield random_memory(tiny_model(other)), "not those that this memory was built for"
    changed = random_memory(model)
    changed.config.value_space = "delta"
    yield changed, "built with value_space='logits'"


def test_a_failed_attach_leaves_the_model_as_it_was(family, model, tokens):
    base, before = logits_of(model, tokens), traces(model)
    for memory, message in foreign_memories(model, family):
        with pytest.raises(MemoryMismatchError, match=message):
            attach_memory(model, memory)
        assert traces(model) == before
    for option, value in {"routing_width": 9, "num_neighbors": 0, "gamma": -1.0}.items():
        memory = random_memory(model)
        setattr(memory.config, option, value)
        with pytest.raises(ValueError, match=option):
            attach_memory(model, memory)
        assert traces(model) == before
    assert torch.equal(logits_of(model, tokens), base)


def test_a_failed_attach_leaves_the_memory_in_force_there(family, model, tokens):
    attach_memory(model, random_memory(model), name="law")
    changed, before = logits_of(model, tokens), traces(model)
    with pytest.raises(MemoryMismatchError):
        attach_memory(model, random_memory(tiny_model(family, seed=5)), name="other")
    assert traces(model) == before and active_memory(model) == "law"
    assert torch.equal(logits_of(model, tokens), changed)


def test_reported_router_logits_are_those_that_routed(family, tokens):
    for recorded_first in (False, True):
        model = tiny_model(family)
        memory = random_memory(model)
        base = logits_of(model, tokens, output_router_logits=recorded_first)
        attach_memory(model, memory)
        used = {}
        for gate in find_gates(model):
            gate.module.register_forward_hook(lambda _, a, out, i=gate.layer, used=used: used.update({i: out[0]}))
        out = model(input_ids=tokens, output_router_logits=True)
        assert not torch.equal(out.logits, base)
        for layer, reported in enumerate(out.router_logits):
            assert torch.equal(reported.reshape(-1, 8), used[layer])
        with disable_memory(model):
            own = model(input_ids=tokens, output_router_logits=True).router_logits
        assert not torch.equal(own[0], out.router_logits[0])


def test_a_copy_of_the_gate_in_an_adapter_is_refused_with_the_reason(model):
    name = "router" if type(model).__name__.startswith("Gpt") else "gate"
    memory = random_memory(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=[name]), adapter_name="v7")
    with pytest.raises(UnsupportedModelError, match="layer 0 has two gates.*merge_and_unload"):
        attach_memory(wrapped, memory)
