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


def merged(model, state: dict, alpha: int, rank: int, is_turned: bool) -> dict[str, torch.Tensor]:
    """The weights W + alpha / rank B A that the updates of a state stand for; those of experts lie turned or not."""
    weights = {}
    for name in (name for name in state if ".lora_A." in name):
        down, up = state[name], state[name.replace(".lora_A.", ".lora_B.")]
        module = name.removeprefix("base_model.model.").split(".lora_A.")[0]
        if "experts" not in module:
            own = model.get_parameter(f"{module}.weight")
            weights[f"{module}.weight"] = own + alpha / rank * up @ down
            continue
        # of several parameters of a module, the updates are nested, the first one inside
        module, which = (part := module.partition(".base_layer"))[0], "gate_up_proj" if part[1] else "down_proj"
        own = model.get_parameter(f"{module}.{which}")
        down = down.reshape(len(own), rank, -1)
        change = torch.einsum("ore,eri->eoi", up.reshape(len(up), rank, len(own)), down)
        change = change.mT if is_turned else change
        weights[f"{module}.{which}"] = own + alpha / rank * change if change.shape == own.shape else None
    return weights


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_of_lora_equals_that_by_hand(family):
    """B begins at 0 and goes a rate against its gradient, alpha / rank G A^T for the gradient G of W; A stays."""
    model, items = tiny_model(family), random_items(4)
    method = make_method("lora", rank=2, alpha=6, learning_rates=[0.01], epochs=1)
    method.fit(model, items)
    state = method.state()
    layers, targets = model.config.num_hidden_layers, 4 + 2  # of the attention and of the experts
    assert len(state) == 2 * layers * targets
    loss = next_token_loss(model, rows_of(items, answer_only=True))
    for name in (name for name in state if ".lora_A." in name and "experts" not in name):
        weight = model.get_parameter(f"{name.removeprefix('base_model.model.').split('.lora_A.')[0]}.weight")
        (gradient,) = torch.autograd.grad(loss(list(range(4))), weight)
        slope = 3 * gradient @ state[name].T
        known = slope.abs() > 1e-4
        step = -0.01 * slope.sign()
        found = state[name.replace(".lora_A.", ".lora_B.")]
        assert int(known.sum()) > 10
        torch.testing.assert_close(found[known], step[known], atol=1e-4, rtol=0)
    ids = torch.tensor([items[0].tokens])
    with torch.no_grad(), method.apply(model) as adapted:
        expected = adapted(input_ids=ids).logits
    before, found = model(input_ids=ids).logits, []
    for is_turned in (False, True):
        weights = merged(model, state, 6, 2, is_turned)
        if all(weight is not None for weight in weights.values()):
            found.append(torch.func.functional_call(model, weights, kwargs={"input_ids": ids}).logits)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert any(torch.allclose(logits, expected, atol=1e-5) for logits in found)


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
