"""What each competitor changes, and what it would ship."""

import pytest
import torch

from benchmarks.effect.competitors import COMPETITORS, KEEPS_WEIGHTS, RATES, tuned
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.models.gates import find_gates
from tests.support.models import FAMILIES, tiny_model
from tests.support.training import examples

_WRAPPED = "base_model.model."


def rows() -> list[dict]:
    return prepare_dataset(examples(count=4, length=12), None, None)


def named(model) -> dict[str, torch.nn.Parameter]:
    """By the names that they have in the model as it was loaded."""
    found = ((name.replace("base_layer.", "").removeprefix(_WRAPPED), one) for name, one in model.named_parameters())
    return {name: one for name, one in found if "lora_" not in name}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in named(model).items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", COMPETITORS)
def test_it_changes_what_it_says_and_the_model_only_while_it_is_applied(name, family):
    model = tiny_model(family)
    before = weights(model)
    found = tuned(name, model, rows(), seed=0, rate=RATES.get(name, (None,))[-1])
    assert not changed(before, weights(model))
    ids = torch.tensor([row["input_ids"] for row in rows()])
    with torch.no_grad(), found.method.apply(model) as adapted:
        differing, after = changed(before, weights(adapted)), adapted(input_ids=ids).logits
    gates = {id(parameter) for gate in find_gates(model) for parameter in gate.module.parameters()}
    gate_names = {name for name, parameter in named(model).items() if id(parameter) in gates}
    expected = {"router-only": gate_names, "full fine-tuning": set(before)}.get(name, set())
    assert differing <= expected and (not expected or differing & gate_names)
    assert (not differing) == (name in KEEPS_WEIGHTS)
    with torch.no_grad():
        assert not torch.allclose(after, model(input_ids=ids).logits, atol=1e-4)


def test_what_it_ships():
    model = tiny_model("olmoe")
    sizes = {name: tuned(name, model, rows(), 0, RATES.get(name, (None,))[0]).nbytes for name in COMPETITORS}
    assert sizes["constant bias"] == 2 * 8 * 4  # layers, experts, bytes
    assert sizes["router-only"] == 2 * 8 * 32 * 4
    assert sizes["full fine-tuning"] == 4 * model.num_parameters()
    attention, experts = 8 * (2 * 32 + 2 * (32 + 16) + 2 * 32), 8 * 8 * ((32 + 32) + (16 + 32))  # rank 8, q k v o
    assert sizes["LoRA"] == 2 * 4 * (attention + experts)


def test_a_lora_is_on_attention_and_experts_of_every_layer():
    found = tuned("LoRA", tiny_model("qwen3_moe"), rows(), 0, 1e-2).method.state()
    for layer in range(2):
        adapted = " ".join(name for name in found if f"layers.{layer}." in name and "lora_B" in name)
        assert all(part in adapted for part in ("q_proj", "k_proj", "v_proj", "o_proj", "experts"))


def test_the_seed_orders_the_batches():
    model = tiny_model("olmoe")
    many = prepare_dataset(examples(count=20, length=8), None, None)
    found = [tuned("router-only", model, many, seed).method.state() for seed in (0, 0, 1)]
    assert not changed(found[0], found[1]) and changed(found[0], found[2])
