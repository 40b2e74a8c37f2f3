"""A gate that was changed after attaching is refused at the next forward; what leaves its logits alone is not."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from peft import PeftModel

from knnmoe_hf import attach_memory, attach_override, detach_memory, disable_memory
from knnmoe_hf.errors import MemoryMismatchError, UnsupportedModelError
from knnmoe_hf.models.gates import find_gates
from tests.conftest import random_memory, tiny_model
from tests.models.changed_gates import CHANGES, UNCHANGED, gate_of, parent_of, replaced_parameter, with_other_gates
from tests.models.test_attach import logits_of, lora
from tests.support.offloading import OFFLOADS


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_gate_is_refused_at_the_next_forward(model, tokens, change):
    attach_memory(model, random_memory(model))
    logits_of(model, tokens)
    CHANGES[change](model)
    for _ in range(2):  # and stays refused
        with pytest.raises(MemoryMismatchError, match="gate of layer [01].*detach_memory.*attach_memory"):
            logits_of(model, tokens)
    with disable_memory(model):
        logits_of(model, tokens)
    with pytest.raises(MemoryMismatchError):
        model.generate(tokens[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("change", ["load_state_dict", "weight.data.copy_", "another parameter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_refused_in_half_precision_too(family, tokens, change, dtype):
    model = tiny_model(family).to(dtype)
    attach_memory(model, random_memory(model))
    CHANGES[change](model)
    with pytest.raises(MemoryMismatchError, match="computes other logits"):
        logits_of(model, tokens)


def test_the_way_out_says_whether_the_memory_still_belongs_to_the_model(model, tokens):
    memory = random_memory(model)
    kept = copy.deepcopy(gate_of(model).state_dict())
    attach_memory(model, memory)
    wanted = logits_of(model, tokens)
    replaced_parameter(model)
    detach_memory(model)
    with pytest.raises(MemoryMismatchError, match="not those that this memory was built for"):
        attach_memory(model, memory)
    gate_of(model).load_state_dict(kept)
    attach_memory(model, memory)
    assert torch.equal(logits_of(model, tokens), wanted)


def test_weights_that_are_put_back_are_right_again(model, tokens):
    attach_memory(model, random_memory(model))
    wanted, kept = logits_of(model, tokens), gate_of(model).weight.detach().clone()
    gate_of(model).weight.data.zero_()
    with pytest.raises(MemoryMismatchError):
        logits_of(model, tokens)
    gate_of(model).weight.data.copy_(kept)
    assert torch.equal(logits_of(model, tokens), wanted)


def test_a_gate_that_was_replaced_is_refused(model, tokens):
    attach_memory(model, random_memory(model))
    block, name = parent_of(model)
    new = type(gate_of(model))(model.config)
    new.load_state_dict(gate_of(model).state_dict())
    setattr(block, name, new)
    with pytest.raises(UnsupportedModelError, match="was replaced after attaching"):
        logits_of(model, tokens)


@pytest.mark.parametrize("what", UNCHANGED)
def test_what_leaves_the_gates_alone_is_not_refused(model, tokens, what):
    attach_memory(model, random_memory(model))
    logits_of(model, tokens)
    UNCHANGED[what](model)
    for _ in range(2):
        logits_of(model, tokens)
    if what != "offloaded":  # a change is noticed afterwards as well
        gate_of(model).weight.data.zero_()
        with pytest.raises(MemoryMismatchError):
            logits_of(model, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_no_change_and_changes_after_it_are_noticed(family, tokens, dtype):
    model = tiny_model(family)
    attach_memory(model, random_memory(model))
    model.to(dtype)
    assert logits_of(model, tokens).isfinite().all()
    model.float()
    logits_of(model, tokens)
    gate_of(model).weight.data.mul_(1.1)
    with pytest.raises(MemoryMismatchError):
        logits_of(model, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_the_gates_may_be_merged_unmerged_and_merged_for_good(family, tokens, dtype):
    model = tiny_model(family).to(dtype)
    name = find_gates(model)[0].name.split(".", 3)[3] + ".weight"
    model = lora(model, target_modules=["q_proj"], target_parameters=[name])
    attach_memory(model, random_memory(model))
    logits_of(model, tokens)
    model.merge_adapter()
    logits_of(model, tokens)
    model.unmerge_adapter()
    logits_of(model, tokens)
    logits_of(model.merge_and_unload(), tokens)


def test_an_adapter_of_the_gates_that_comes_goes_or_is_trained_is_a_change(family, tokens, tmp_path):
    model = tiny_model(family)
    name = find_gates(model)[0].name.split(".", 3)[3] + ".weight"
    model = lora(model, target_modules=["q_proj"], target_parameters=[name])
    model.save_pretrained(tmp_path)
    attach_memory(model, random_memory(model))
    wanted = logits_of(model, tokens)
    with model.disable_adapter(), pytest.raises(MemoryMismatchError, match="computes other logits"):
        logits_of(model, tokens)
    assert torch.equal(logits_of(model, tokens), wanted)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name and "mlp" in parameter_name:
                parameter.add_(0.1)
    with pytest.raises(MemoryMismatchError, match="computes other logits"):
        logits_of(model, tokens)
    plain = tiny_model(family)
    attach_memory(plain, random_memory(plain))
    adapted = PeftModel.from_pretrained(plain, tmp_path).eval()
    with pytest.raises(MemoryMismatchError, match="computes other logits"):
        logits_of(adapted, tokens)


@pytest.mark.parametrize(
    "way", ["cpu_offload", "disk_offload", "cpu_offload of whole blocks", "two hooks on each module"]
)
def test_offloaded_gates_are_watched_where_they_are_kept(family, tokens, way):
    model = tiny_model(family)
    memory = random_memory(model)
    changed = with_other_gates(model)
    attach_memory(model, memory)
    offloaded = OFFLOADS[way](model)
    for _ in range(2):
        logits_of(offloaded, tokens)
    other = OFFLOADS[way](changed)
    for module, new in zip(offloaded.modules(), other.modules()):
        if hasattr(new, "_hf_hook"):
            module._hf_hook = new._hf_hook  # as if other weights were put in the offload folder
    with pytest.raises(MemoryMismatchError, match="computes other logits"):
        logits_of(offloaded, tokens)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("way", COPIES)
def test_a_copied_model_watches_gates_of_its_own(model, tokens, way):
    attach_memory(model, random_memory(model))
    wanted = logits_of(model, tokens)
    twin = COPIES[way](model)
    assert torch.equal(logits_of(twin, tokens), wanted)
    gate_of(twin).weight.data.zero_()
    with pytest.raises(MemoryMismatchError):
        logits_of(twin, tokens)
    assert torch.equal(logits_of(model, tokens), wanted)
    second = COPIES[way](model)
    gate_of(model).weight.data.zero_()
    with pytest.raises(MemoryMismatchError):
        logits_of(model, tokens)
    assert torch.equal(logits_of(second, tokens), wanted)


def test_a_copy_does_not_keep_the_model_alive(model, tokens):
    memory = random_memory(model)
    one = copy.deepcopy(model)
    attach_memory(one, memory)
    logits_of(one, tokens)
    twin, gone = copy.deepcopy(one), weakref.ref(gate_of(one))
    del one
    gc.collect()
    assert gone() is None
    logits_of(twin, tokens)


def test_overrides_that_are_no_memories_follow_any_gate(model, tokens):
    attach_override(model, {0: lambda x, output, tokens: None})
    replaced_parameter(model)
    logits_of(model, tokens)


@pytest.mark.parametrize("backend, value_space", [("torch", "logits"), ("ivf", "delta"), ("auto", "assignment")])
def test_a_change_is_noticed_in_a_compiled_model_too(model, tokens, backend, value_space):
    model.set_experts_implementation("batched_mm")
    attach_memory(model, random_memory(model, search_backend=backend, value_space=value_space))
    wanted = logits_of(model, tokens)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, tokens), wanted)
    for change in ("weight.data.copy_", "weight.data of one number", "an optimizer step", "top_k"):
        kept = copy.deepcopy(gate_of(model).state_dict())
        CHANGES[change](model)
        with pytest.raises(MemoryMismatchError, match="gate of layer 1"):
            logits_of(compiled, tokens)
        gate_of(model).load_state_dict(kept)
        gate_of(model).weight.grad, gate_of(model).top_k = None, 2
        torch.testing.assert_close(logits_of(compiled, tokens), wanted)
    with disable_memory(model):
        gate_of(model).weight.data.zero_()
        logits_of(compiled, tokens)


def test_what_is_no_change_is_none_in_a_compiled_model(model, tokens):
    model.set_experts_implementation("batched_mm")
    attach_memory(model, random_memory(model))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits_of(compiled, tokens)
    model.to(torch.bfloat16)
    assert logits_of(compiled, tokens).isfinite().all()
    gate_of(model).weight.data.mul_(1.1)
    with pytest.raises(MemoryMismatchError):
        logits_of(compiled, tokens)


def test_gradients_pass_through_a_compiled_model_that_is_watched(model, tokens):
    model.set_experts_implementation("batched_mm")
    attach_memory(model, random_memory(model))
    gradients = []
    for one in (model, torch.compile(model, backend="eager", fullgraph=True)):
        model.zero_grad()
        one(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append(gate_of(model).weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0
