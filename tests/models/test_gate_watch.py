"""A gate that was changed after attaching is refused at the next forward; what leaves its logits alone is not."""

import copy
import functools
import gc
import io
import pickle
import weakref
from types import MethodType

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel
from torch import nn

from knnmoe_hf import active_memory, attach_memory, attach_override, detach_memory, disable_memory
from knnmoe_hf.errors import MemoryMismatchError, UnsupportedModelError
from knnmoe_hf.models.gates import find_gates
from tests.conftest import random_memory, tiny_model
from tests.models.test_attach import logits_of, lora
from tests.support.offloading import OFFLOADS


def gate_of(model, layer: int = 1) -> nn.Module:
    return find_gates(model)[layer].module


def parent_of(model, layer: int = 1) -> tuple[nn.Module, str]:
    holder, _, name = find_gates(model)[layer].name.rpartition(".")
    return model.get_submodule(holder), name


def other_weights(model) -> torch.Tensor:
    return torch.randn_like(gate_of(model).weight) * 0.3


def optimizer_step(model):
    gate = gate_of(model)
    gate.weight.requires_grad_(True)
    gate.weight.grad = torch.randn_like(gate.weight)
    torch.optim.AdamW([gate.weight], lr=1e-4, weight_decay=0.0).step()


def replaced_parameter(model):
    gate_of(model).weight = nn.Parameter(other_weights(model))


def patched_forward(model):
    gate = gate_of(model)
    gate.forward = MethodType(lambda self, x: type(self).forward(self, 2 * x), gate)


def routing_otherwise(model):
    gate = gate_of(model)

    def forward(self, x):
        logits, weights, ids = type(self).forward(self, x)
        return logits, weights.flip(-1), ids

    gate.forward = MethodType(forward, gate)


def one_number(model):
    gate_of(model).weight.data[3, 5] += 0.1


def another_top_k(model):
    gate_of(model).top_k = 3


def another_renormalisation(model):
    gate = gate_of(model)
    if not hasattr(gate, "norm_topk_prob"):
        pytest.skip("this family renormalises by its rule alone")
    gate.norm_topk_prob = not gate.norm_topk_prob


def another_bias(model):
    gate = gate_of(model)
    if getattr(gate, "bias", None) is None:
        pytest.skip("this family's gates have no bias")
    gate.bias.data += 0.5


def parametrised(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(gate_of(model), "weight", Doubled())


def lora_on_the_gates(model):
    name = find_gates(model)[0].name.split(".", 3)[3] + ".weight"
    lora(model, target_modules=["q_proj"], target_parameters=[name])


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(with_other_gates(model).state_dict()),
    "weight.copy_": lambda model: gate_of(model).weight.detach().copy_(other_weights(model)),
    "weight.data.copy_": lambda model: gate_of(model).weight.data.copy_(other_weights(model)),
    "weight.data.mul_": lambda model: gate_of(model).weight.data.mul_(1.001),
    "weight.data of one expert": lambda model: gate_of(model).weight.data[2].zero_(),
    "weight.data of one number": one_number,
    "weight.data =": lambda model: setattr(gate_of(model).weight, "data", other_weights(model)),
    "another parameter": replaced_parameter,
    "an optimizer step": optimizer_step,
    "initialised anew": lambda model: nn.init.normal_(gate_of(model).weight),
    "another forward": patched_forward,
    "other weights of experts": routing_otherwise,
    "top_k": another_top_k,
    "norm_topk_prob": another_renormalisation,
    "bias": another_bias,
    "a parametrization": parametrised,
    "LoRA on the gates": lora_on_the_gates,
}


def with_other_gates(model):
    other = copy.deepcopy(model)
    if active_memory(other) is not None:
        detach_memory(other)
    for gate in find_gates(other):
        nn.init.normal_(gate.module.weight)
    return other


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


UNCHANGED = {
    "the same weights": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "the same weights, other tensors": lambda model: model.load_state_dict(
        copy.deepcopy(model.state_dict()), assign=True
    ),
    "another parameter of the same values": lambda model: setattr(
        gate_of(model), "weight", nn.Parameter(gate_of(model).weight.detach().clone())
    ),
    "train": lambda model: model.train(),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "gradients": lambda model: setattr(gate_of(model).weight, "grad", torch.ones_like(gate_of(model).weight)),
    "to": lambda model: model.to("cpu"),
    "offloaded": lambda model: cpu_offload(model, torch.device("cpu")),
    "LoRA elsewhere": functools.partial(lora, target_modules=["o_proj"]),
    "a hook": lambda model: gate_of(model).register_forward_hook(lambda *_: None),
    "gradient checkpointing": lambda model: model.gradient_checkpointing_enable(),
    "attention implementation": lambda model: model.set_attn_implementation("eager"),
    "experts implementation": lambda model: model.set_experts_implementation("batched_mm"),
    "resized embeddings": lambda model: model.resize_token_embeddings(96),
    "a wrapped forward": lambda model: setattr(
        gate_of(model), "forward", functools.partial(type(gate_of(model)).forward, gate_of(model))
    ),
}


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
