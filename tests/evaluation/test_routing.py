"""`record_routing` sees what blocks are given, and the measures of two recordings and of the load."""

import math
import threading

import peft
import pytest
import torch

from knnmoe_hf import attach_override, detach_memory
from knnmoe_hf.evaluation.routing import record_routing
from knnmoe_hf.evaluation.routing_measures import change_of_routes, jensen_shannon, load_of_counts
from knnmoe_hf.models.gates import find_gates
from tests.support.attaching import attached, hooks_of
from tests.support.families import FAMILIES as ALL_FAMILIES
from tests.support.models import FAMILIES, random_memory, tiny_model

IDS = torch.arange(2, 26).view(2, 12)
PADDED = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0))


def shifting(gate, amount=30.0):
    """An override that makes expert 0 far likelier, routed by the family's rule."""

    def shift(x, output, tokens):
        logits = output[0].clone()
        logits[:, 0] += amount
        return logits, *gate.current_rule().routed(logits, gate.top_k, output[1].dtype)

    return shift


def overrides(model):
    return {gate.layer: shifting(gate) for gate in find_gates(model)}


@torch.no_grad()
def recorded(model, **options):
    with record_routing(model, **options) as record:
        model(**PADDED)
    return record


def used_by_blocks(model) -> tuple[dict, list]:
    """What the experts of each layer are called with, and the handles of the hooks."""
    seen, handles = {}, []
    for gate in find_gates(model):
        experts = gate.caller.experts
        hook = experts.register_forward_pre_hook(lambda _, args, i=gate.layer: seen.update({i: args[1:3]}))
        handles.append(hook)
    return seen, handles


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("inside", [False, True], ids=["attached before", "attached inside"])
@torch.no_grad()
def test_recorded_is_what_the_experts_are_called_with(family, wrapped, inside):
    model = tiny_model(family)
    if wrapped:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    seen, handles = used_by_blocks(model)
    if not inside:
        attach_override(model, overrides(model))
    with record_routing(model) as record:
        if inside:
            attach_override(model, overrides(model))
        model(input_ids=IDS)
    detach_memory(model)
    for handle in handles:
        handle.remove()
    for layer, (ids, weights) in seen.items():
        assert torch.equal(record.routes[layer].ids.long(), ids)
        assert torch.equal(record.routes[layer].weights, weights.float())
        assert (ids == 0).any(-1).all()  # the override was in force
    assert hooks_of(model) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_is_recorded_and_an_override_seen(family):
    model = tiny_model(family)
    base = recorded(model)
    assert base.change_to(recorded(model)).is_none
    attach_override(model, overrides(model))
    assert not base.change_to(recorded(model)).is_none


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_changes_routes_and_padding_is_left_out(family):
    model = tiny_model(family)
    base = recorded(model)
    assert base.tokens == PADDED["attention_mask"].sum() == 20
    with attached(model, random_memory(model)):
        change = base.change_to(recorded(model))
    assert not change.is_none and change.tokens == 20
    assert set(change.changed) == {0, 1}
    assert 0 < change.mean_changed <= 1 and 0 < change.mean_divergence <= math.log(2)
    assert base.change_to(recorded(model)).is_none


@torch.no_grad()
def test_a_hook_that_shifts_the_recorded_logits_alone_changes_nothing():
    model = tiny_model("olmoe")
    base = recorded(model)

    def shift(_, args, output):
        return (output[0] + 5.0 * torch.eye(8)[0], *output[1:])

    with record_routing(model) as record:
        handles = [gate.module.register_forward_hook(shift) for gate in find_gates(model)]
        model(**PADDED)
    for handle in handles:
        handle.remove()
    change = base.change_to(record)
    assert change.is_none and change.mean_changed == change.mean_divergence == 0


@torch.no_grad()
def test_a_hook_on_a_gate_that_was_added_inside_is_seen():
    model = tiny_model("olmoe")
    base = recorded(model)
    with record_routing(model) as record:
        gate = find_gates(model)[1].module
        handle = gate.register_forward_hook(lambda _, args, output: (output[0], output[1], (output[2] + 1) % 8))
        model(**PADDED)
        handle.remove()
    change = base.change_to(record)
    assert change.changed[0] == 0 and change.changed[1] > 0.5


@torch.no_grad()
def test_other_weights_for_the_same_experts_are_a_change_of_divergence_alone():
    model = tiny_model("olmoe")
    base = recorded(model)
    attach_override(model, {0: lambda x, output, tokens: (output[0], output[1].flip(-1), output[2])})
    change = base.change_to(recorded(model))
    assert change.changed[0] == 0 and change.divergence[0] > 0 and not change.is_none


@torch.no_grad()
def test_slots_of_weight_zero_are_no_experts():
    model = tiny_model("olmoe")
    base = recorded(model)

    def wider(x, output, tokens):
        logits, weights, ids = output
        return logits, torch.cat([weights, torch.zeros_like(weights)], -1), torch.cat([ids, (ids + 3) % 8], -1)

    attach_override(model, {0: wider, 1: wider})
    change = base.change_to(recorded(model))
    assert change.is_none and change.mean_changed == 0


@torch.no_grad()
def test_routes_are_kept_up_to_a_limit_and_the_load_counts_all():
    model = tiny_model("olmoe")
    whole, short = recorded(model), recorded(model, max_tokens=7)
    assert torch.equal(short.routes[1].ids, whole.routes[1].ids[:7]) and short.tokens == 20
    assert short.load() == whole.load()
    assert short.change_to(recorded(model, max_tokens=7)).tokens == 7
    with pytest.raises(ValueError, match="do not pair"):
        whole.change_to(short)
    with pytest.raises(ValueError, match="max_tokens=0 is not allowed"), record_routing(model, max_tokens=0):
        pass


def test_several_calls_batches_and_generation_are_recorded_in_their_order():
    model = tiny_model("olmoe")
    with record_routing(model) as record, torch.no_grad():
        model(input_ids=IDS[:1])
        model(input_ids=IDS[1:])
    with record_routing(model) as together, torch.no_grad():
        model(input_ids=IDS)
    assert together.change_to(record).mean_changed == 0
    with record_routing(model) as record:
        model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert record.tokens == 12 + 3


def test_what_other_threads_run_and_what_checkpointing_repeats_are_left_out():
    model = tiny_model("olmoe").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with record_routing(model) as record:
        other = threading.Thread(target=lambda: model(input_ids=IDS, use_cache=False))
        other.start()
        other.join()
        assert record.tokens == 0
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert record.tokens == 24
    with record_routing(model) as record:
        pass
    with pytest.raises(ValueError, match=r"nothing was recorded in layers \[0, 1\]"):
        record.load()


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_recorded():
    model = tiny_model("olmoe")
    base = recorded(model)
    compiled = torch.compile(model, backend="eager")
    compiled(**PADDED)
    assert base.change_to(recorded(compiled)).mean_changed == 0
    assert hooks_of(model) == []


def test_divergence_equals_that_by_hand():
    tables = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    others = torch.tensor([[0.5, 0.0, 0.5], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    log2 = math.log(2)
    assert jensen_shannon(tables, others).tolist() == pytest.approx([log2 / 2, log2, log2, 0.0], abs=1e-15)
    assert torch.equal(jensen_shannon(tables, others), jensen_shannon(others, tables))
    p = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.4, 0.6]], dtype=torch.float64)
    by_hand = 0.5 * (0.9 * math.log(0.9 / 0.65) + 0.1 * math.log(0.1 / 0.35))
    by_hand += 0.5 * (0.4 * math.log(0.4 / 0.65) + 0.6 * math.log(0.6 / 0.35))
    assert jensen_shannon(p, q).item() == pytest.approx(by_hand, abs=1e-15)


def test_change_equals_that_by_hand():
    ids, new_ids = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 0]])
    weights = torch.full((2, 2), 0.5)
    change = change_of_routes({4: (ids, weights, new_ids, weights, 4)})
    assert change.changed == {4: 0.5} and not change.is_none
    assert change.divergence == {4: pytest.approx(math.log(2) / 4)}
    with pytest.raises(ValueError, match="no token"):
        change_of_routes({0: (ids[:0], weights[:0], ids[:0], weights[:0], 4)})


def test_load_equals_that_by_hand():
    even = load_of_counts(torch.tensor([5, 5, 5, 5]))
    assert (even.variation, even.max_over_mean, even.entropy) == pytest.approx((0, 1, 1))
    one = load_of_counts(torch.tensor([8, 0, 0, 0]))
    assert (one.variation, one.max_over_mean, one.entropy) == pytest.approx((math.sqrt(3), 4, 0))
    some = load_of_counts(torch.tensor([3, 1]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert (some.variation, some.max_over_mean, some.entropy) == pytest.approx((0.5, 1.5, entropy))
    with pytest.raises(ValueError, match="no load"):
        load_of_counts(torch.zeros(4))
