"""Rewiring Experts on the Fly: which layers move, by how much, and when again."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.base import overriding
from knnmoe_hf.baselines.rewiring import Adaptation, Shift
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import RoutingHooks
from tests.baselines.items import logits_of, random_items, routes_of
from tests.support.models import FAMILIES, tiny_model

FOUR = {"olmoe": {"num_experts": 4}, "qwen3_moe": {"num_experts": 4}, "gpt_oss": {"num_local_experts": 4}}
PROMPT = random_items(length=10)[0].prompt


def shifted(model, deltas: list[torch.Tensor]) -> dict[int, Shift]:
    shifts = {gate.layer: Shift(gate) for gate in find_gates(model)}
    for shift, delta in zip(shifts.values(), deltas):
        shift.delta = delta
    return shifts


def loss(model, tokens=PROMPT.tokens) -> float:
    logits = logits_of(model, tokens)[0]
    return F.cross_entropy(logits[:-1], torch.tensor(tokens[1:])).item()


def in_force(model) -> list[torch.Tensor]:
    return [shift.delta for shift in RoutingHooks.of(model).current.values()]


def undecided(model) -> list[float]:
    """C of each layer, from the gates' own logits: the mean over tokens of the mean of -log p of the two largest."""
    found = []
    for gate in find_gates(model):
        gate.module.register_forward_hook(lambda _, args, output: found.append(output[0].softmax(-1)))
    logits_of(model, PROMPT.tokens)
    for gate in find_gates(model):
        gate.module._forward_hooks.clear()
    return [-(p.topk(2).values.log().sum(-1) / 2).mean().item() for p in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shifted_logit_equals_that_by_hand(family):
    """Logits (0, 0, 0, 0) + (2, 1, 0, -1): experts 0 and 1, weighted by the family's rule."""
    model = tiny_model(family, **FOUR[family])
    for gate in find_gates(model):
        for parameter in gate.module.parameters():
            parameter.data.zero_()
    with overriding(model, shifted(model, [torch.tensor([2.0, 1.0, 0.0, -1.0])] * 2)):
        routes = routes_of(model, PROMPT.tokens)[0]
    expected = torch.tensor([0.6439, 0.2369, 0, 0] if family == "olmoe" else [0.7311, 0.2689, 0, 0])
    torch.testing.assert_close(routes, expected.expand_as(routes), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decisive", [False, True])
def test_the_first_step_equals_that_by_hand(family, decisive):
    """Adam's first step is the learning rate against the sign of the gradient, here by differences; in one layer."""
    model = tiny_model(family, **FOUR[family])
    doubt = undecided(model)
    chosen = doubt.index(min(doubt) if decisive else max(doubt))
    slopes = torch.zeros(2, 4)
    for layer, expert in ((layer, expert) for layer in range(2) for expert in range(4)):
        step = torch.zeros(2, 4)
        step[layer, expert] = 2e-3
        with overriding(model, shifted(model, list(step))):
            above = loss(model)
        with overriding(model, shifted(model, list(-step))):
            slopes[layer, expert] = (above - loss(model)) / 4e-3
    with make_method("rewiring", steps=1, decisive=decisive).apply(model, PROMPT):
        deltas = torch.stack(in_force(model))
    assert not deltas[1 - chosen].any()
    known = slopes[chosen].abs() > 2e-3
    assert int(known.sum()) >= 2
    torch.testing.assert_close(deltas[chosen][known], -0.05 * slopes[chosen][known].sign(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_lowers_the_loss_of_the_prompt_and_leaves_the_model_as_it_was(family):
    model = tiny_model(family)
    before, routes, logits = loss(model), routes_of(model, PROMPT.tokens), logits_of(model, PROMPT.tokens)[0]
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    # with the default rate a change of experts, which no gradient foresees, may raise it
    with torch.no_grad(), make_method("rewiring", rate=0.005).apply(model, PROMPT):
        assert loss(model) < before
        after = routes_of(model, PROMPT.tokens)
        assert not any(delta.requires_grad for delta in in_force(model))
    assert any(not torch.equal(routes[layer], after[layer]) for layer in routes)
    with pytest.raises(KeyError), make_method("rewiring").apply(model, PROMPT):
        raise KeyError
    assert torch.equal(logits_of(model, PROMPT.tokens)[0], logits) and RoutingHooks.of(model) is None
    assert not model.model._forward_pre_hooks
    assert trained == {name for name, one in model.named_parameters() if one.requires_grad}
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_of_one_prompt_in_a_batch_are_as_alone(family):
    model, sequences = tiny_model(family), [PROMPT.tokens + more for more in ((), (5,), (6, 7, 8))]
    with make_method("rewiring").apply(model, PROMPT):
        together = logits_of(model, *sequences)
        for tokens, batched in zip(sequences, together):
            torch.testing.assert_close(batched, logits_of(model, tokens)[0], atol=1e-5, rtol=1e-4)


def test_its_cost_is_that_of_its_passes():
    model, method, passes, gradients = tiny_model("olmoe"), make_method("rewiring"), [], []
    hooks = [
        model.model.register_forward_pre_hook(lambda *_: passes.append(1)),
        model.lm_head.register_full_backward_pre_hook(lambda *_: gradients.append(1)),
    ]
    with method.apply(model, PROMPT):
        pass
    for hook in hooks:
        hook.remove()
    assert (len(passes), len(gradients)) == (method.cost.forward, method.cost.backward) == (5, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generated_text_is_adapted_to_again(family):
    """After 4 generated tokens from the vectors of the prompt, after 8 from those; in the same layer."""
    model, steps = tiny_model(family), []
    method, prompt = make_method("rewiring", every=4, steps=2), list(PROMPT.tokens)

    def look(_, args, kwargs, output) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            steps.append(torch.stack(in_force(model)))

    with method.apply(model, PROMPT):
        first = torch.stack(in_force(model))
        handle = model.model.register_forward_hook(look, with_kwargs=True)
        text = model.generate(torch.tensor([prompt]), max_new_tokens=11, do_sample=False)[0].tolist()
        handle.remove()
        logits_of(model, prompt)  # another text begins with what the prompt gave
        assert torch.equal(torch.stack(in_force(model)), first)
    expected = [first]
    for length in (4, 8):
        shifts = shifted(model, list(expected[-1]))
        for shift, delta in zip(shifts.values(), first):
            shift.moves = bool(delta.any())
        adaptation = Adaptation(method, model, list(shifts.values()))
        adaptation.has_chosen = True
        with overriding(model, shifts):
            adaptation.adapt(text[: len(prompt) + length])
        expected.append(torch.stack([shift.delta for shift in shifts.values()]))
    assert len(steps) == 10 and not torch.allclose(expected[0], expected[1], atol=1e-3)
    for deltas, number in zip(steps, [0] * 3 + [1] * 4 + [2] * 3):
        torch.testing.assert_close(deltas, expected[number])


def test_several_sequences_that_are_generated_keep_what_the_prompt_gave():
    model = tiny_model("olmoe")
    with make_method("rewiring", every=2, steps=1).apply(model, PROMPT):
        first = torch.stack(in_force(model))
        model.generate(torch.tensor([PROMPT.tokens] * 2), max_new_tokens=6, do_sample=False)
        assert torch.equal(torch.stack(in_force(model)), first)


def test_it_needs_a_prompt_and_two_tokens_to_learn_from():
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match="pass the prompt"), make_method("rewiring").apply(model):
        pass
    short = random_items(length=1)[0].prompt
    before = logits_of(model, short.tokens)[0]
    with make_method("rewiring").apply(model, short):
        torch.testing.assert_close(logits_of(model, short.tokens)[0], before)


@pytest.mark.slow
def test_it_works_in_bfloat16_and_beside_an_adapter_of_peft():
    model = get_peft_model(tiny_model("gpt_oss").to(torch.bfloat16), LoraConfig(target_modules=["q_proj"]))
    before = logits_of(model, PROMPT.tokens)[0]
    with make_method("rewiring").apply(model, PROMPT):
        assert not torch.equal(logits_of(model, PROMPT.tokens)[0], before)
    assert torch.equal(logits_of(model, PROMPT.tokens)[0], before)
