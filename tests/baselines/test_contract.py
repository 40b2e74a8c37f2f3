"""What every method promises: an effect inside `apply`, none outside, and what was fitted comes back from a state."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from knnmoe_hf import attach_memory
from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.base import Cost
from knnmoe_hf.evaluation.routing import record_routing
from knnmoe_hf.models.gates import find_decoder, find_gates
from tests.baselines.items import random_items
from tests.support.models import random_memory, tiny_model
from tests.support.tokenizers import byte_tokenizer

FAMILIES = ("olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v2_groups")
"""The three rules of the larger labs; a sigmoid with a correction bias and groups; a softmax with groups."""
OPTIONS = {
    "constant_bias": dict(learning_rates=[0.3], epochs=2),
    "dsmoe": dict(num_experts=6, strength=3.0),
    "steermoe": dict(share_on=0.15, share_off=0.3),
    "laser": dict(confident=9.0, threshold=0.0),
    "router_only": dict(learning_rates=[0.03], epochs=2),
    "roma": dict(learning_rates=[0.03], lambdas=[1.0], epochs=1),
    "lora": dict(learning_rates=[0.03], epochs=2),
    "full_fine_tuning": dict(learning_rates=[0.03], epochs=1),
}
IDS = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(8))


def model_for(family: str, dtype=torch.float32):
    return tiny_model(family, vocab_size=300, max_position_embeddings=512).to(dtype)


def fitted(name: str, model, items=None):
    method = make_method(name, **OPTIONS[name])
    method.fit(model, items or random_items(8, choices=1), seed=1, tokenizer=byte_tokenizer())
    return method


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def weights(model) -> dict:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same(before: dict, after: dict) -> bool:
    return list(before) == list(after) and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def quick(name: str, family: str) -> bool:
    """Every method on one family, and every family once; SteerMoE reads this machine's text for seconds."""
    return family == "olmoe" or name == "dsmoe"


CASES = [
    pytest.param(name, family, marks=() if quick(name, family) else pytest.mark.slow)
    for name in OPTIONS
    for family in FAMILIES
    if not (name == "lora" and family.startswith("deepseek"))  # whose attention has other names: see target_modules
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_routes_change_inside_and_everything_is_bit_identical_outside(name, family):
    model = model_for(family)
    kept, expected = weights(model), logits(model)
    with record_routing(model) as before:
        logits(model)
    method = fitted(name, model)
    assert same(kept, weights(model)) and torch.equal(logits(model), expected)
    runs = []
    counting = find_decoder(model, find_gates(model)).register_forward_hook(lambda *_: runs.append(1))
    with method.apply(model) as adapted, record_routing(model) as record:
        found = logits(adapted)
    counting.remove()
    assert len(runs) == 1 and method.cost == Cost()  # nothing runs beside the scoring
    assert before.change_to(record).mean_changed > 0
    assert not torch.equal(found, expected)
    assert same(kept, weights(model)) and torch.equal(logits(model), expected)
    with pytest.raises(KeyError), method.apply(model):
        raise KeyError
    assert same(kept, weights(model)) and torch.equal(logits(model), expected)
    other = make_method(name, **OPTIONS[name])
    other.restore(model, (), {part: tensor.clone() for part, tensor in method.state().items()})
    with other.apply(model) as adapted:
        assert torch.equal(logits(adapted), found)
    assert other.nbytes == method.nbytes and bool(method.nbytes) == (name != "laser")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_memory_that_is_attached_has_no_part_in_it_and_is_in_force_again_afterwards(name):
    model = model_for("olmoe")
    method = fitted(name, model)
    with method.apply(model) as adapted:
        expected = logits(adapted)
    attach_memory(model, random_memory(model))
    remembering = logits(model)
    with method.apply(model) as adapted:
        assert torch.equal(logits(adapted), expected) == (name != "laser")  # which keeps what is in force
    assert torch.equal(logits(model), remembering)  # the watch on the gates has nothing to say
    again = fitted(name, model)
    assert all(torch.equal(tensor, again.state()[part]) for part, tensor in method.state().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_method_works_in_bfloat16_and_beside_an_adapter_of_peft(name):
    model = get_peft_model(model_for("gpt_oss", torch.bfloat16), LoraConfig(target_modules=["q_proj"]))
    expected = logits(model)
    if name == "lora":
        model = model.unload()
    method = fitted(name, model)
    with method.apply(model) as adapted:
        assert not torch.equal(logits(adapted), expected)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "laser"])
def test_before_a_fit_there_is_nothing_to_apply(name):
    with pytest.raises(ValueError, match="has not been fitted: call fit or restore first"):
        with make_method(name).apply(tiny_model("olmoe")):
            pass
    with pytest.raises(ValueError, match="0 references are too few"):
        make_method(name, **OPTIONS[name]).fit(tiny_model("olmoe"), [], tokenizer=byte_tokenizer())
