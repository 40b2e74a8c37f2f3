"""LoRA and full fine-tuning by Trainer take the steps that the plain loop takes, and come off again."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.tuning import descend, next_token_loss, with_weights
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.tasks.items import rows_of
from tests.baselines.items import random_items
from tests.support.models import FAMILIES, tiny_model

HOW = dict(learning_rates=[1e-3], epochs=2, examples_per_step=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_by_trainer_is_the_plain_loop_on_every_weight(family):
    model, items = tiny_model(family), random_items(5)
    method = make_method("full_fine_tuning", **HOW)
    method.fit(model, items, seed=7)
    weights = dict(model.named_parameters())
    values = {name: weight.detach().clone() for name, weight in weights.items()}
    with with_weights(weights, values):
        loss = next_token_loss(model, rows_of(items, answer_only=True))
        descend(list(weights.values()), len(items), loss, 1e-3, epochs=2, examples_per_step=2, seed=7)
    assert list(method.state()) == list(values)
    assert all(torch.equal(method.state()[name], value) for name, value in values.items())
    assert any(not torch.equal(value, weights[name]) for name, value in values.items())


def test_a_lora_leaves_no_module_and_no_gradient_behind():
    model = tiny_model("qwen3_moe")
    model.lm_head.weight.requires_grad_(False)
    before = [(name, type(module)) for name, module in model.named_modules()]
    wants = [parameter.requires_grad for parameter in model.parameters()]
    method = make_method("lora", **HOW)
    method.fit(model, random_items(4))
    with method.apply(model) as adapted:
        assert any("lora_" in name for name, _ in adapted.named_parameters())
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not hasattr(model, "peft_config")


def test_a_second_adapter_is_refused():
    model = get_peft_model(tiny_model("olmoe"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="merge it with merge_and_unload"):
        make_method("lora", learning_rates=[1e-3]).fit(model, random_items(2))
