"""What each competitor changes, and what it would ship."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from benchmarks.effect.competitors import COMPETITORS, KEEPS_WEIGHTS, RATES, tuned
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.models.gates import find_gates
from tests.support.models import FAMILIES, tiny_model
from tests.support.training import examples


def rows() -> list[dict]:
    return prepare_dataset(examples(count=4, length=12), None, None)


def weights(model) -> dict[str, torch.Tensor]:
    """By the names that they have in the model as it was loaded."""
    named = ((name.replace("base_layer.", ""), tensor) for name, tensor in model.named_parameters())
    return {name: tensor.detach().clone() for name, tensor in named if "lora_" not in name}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", COMPETITORS)
def test_it_changes_what_it_says_and_never_the_model_that_it_was_given(name, family):
    model = tiny_model(family)
    before = weights(model)
    found = tuned(name, model, rows(), seed=0, rate=RATES.get(name, (None,))[-1])
    assert not changed(before, weights(model))
    differing = changed(before, weights(found.model))
    gates = {id(parameter) for gate in find_gates(found.model) for parameter in gate.module.parameters()}
    gate_names = {name for name, parameter in found.model.named_parameters() if id(parameter) in gates}
    expected = {"router-only": gate_names, "full fine-tuning": set(before)}.get(name, set())
    assert differing <= expected and (not expected or differing & gate_names)
    assert (not differing) == (name in KEEPS_WEIGHTS)
    ids = torch.tensor([row["input_ids"] for row in rows()])
    with torch.no_grad():
        assert not torch.allclose(found.model(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)


def test_what_it_ships():
    model = tiny_model("olmoe")
    sizes = {name: tuned(name, model, rows(), 0, RATES.get(name, (None,))[0]).nbytes for name in COMPETITORS}
    assert sizes["constant bias"] == 2 * 8 * 4  # layers, experts, bytes
    assert sizes["router-only"] == 2 * 8 * 32 * 4
    assert sizes["full fine-tuning"] == 4 * model.num_parameters()
    attention, experts = 8 * (2 * 32 + 2 * (32 + 16) + 2 * 32), 8 * 8 * ((32 + 32) + (16 + 32))  # rank 8, q k v o
    assert sizes["LoRA"] == 2 * 4 * (attention + experts)


def test_a_lora_is_on_attention_and_experts_of_every_layer_and_comes_off():
    model = tiny_model("qwen3_moe")
    found = tuned("LoRA", model, rows(), 0, 1e-2)
    layers = [[name for name, _ in found.model.named_parameters() if f"layers.{i}." in name] for i in range(2)]
    for names in layers:
        adapted = " ".join(name for name in names if "lora_B" in name)
        assert all(part in adapted for part in ("q_proj", "k_proj", "v_proj", "o_proj", "experts"))
    ids = torch.tensor([row["input_ids"] for row in rows()])
    with torch.no_grad():
        for module in found.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(False)
        torch.testing.assert_close(found.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_seed_orders_the_batches():
    model = tiny_model("olmoe")
    many = prepare_dataset(examples(count=20, length=8), None, None)
    found = [weights(tuned("router-only", model, many, seed).model) for seed in (0, 0, 1)]
    assert not changed(found[0], found[1]) and changed(found[0], found[2])
