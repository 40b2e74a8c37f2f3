"""All builders: stored logits have the recorded NLL, and examples do not influence each other."""

import pytest
import torch
from torch.nn import functional as F

from knnmoe_hf.training.builders.base import Batch, Best, TokenNLL
from knnmoe_hf.training.options import BUILDERS
from tests.support.models import gate_inputs, tiny_model
from tests.support.training import build, built, examples
from tests.training.builders.helpers import changes, check_recorded


@pytest.mark.parametrize("builder", BUILDERS)
def test_stored_logits_give_the_recorded_nll(family, model, builder):
    check_recorded(model, built(family, builder))


def test_recorded_nll_before_is_the_frozen_models(family, model):
    memory = built(family)
    for index, row in enumerate(examples()):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            nll = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        mine = memory.provenance.example_ids == index
        torch.testing.assert_close(memory.provenance.nll_before[mine], nll[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("builder, gain", [("candidates", 0.5), ("topk", 0.4), ("search", 0.1)])
def test_the_nll_of_no_example_rises_and_of_most_it_falls(family, builder, gain):
    change = changes(built(family, builder))
    assert (change <= 1e-5).all()
    assert change.mean() < -gain


def test_keys_are_the_frozen_gates_inputs(family, model):
    memory = built(family)
    seen = gate_inputs(model, torch.tensor([examples()[3]["input_ids"]]))
    mine = memory.provenance.example_ids == 3
    for layer, rows in memory.layers.items():
        torch.testing.assert_close(rows.decoded_keys[mine], seen[layer][memory.provenance.positions[mine].long()])


@pytest.mark.parametrize("family, builder", [("gpt_oss", "candidates"), ("olmoe", "search")])
def test_rows_do_not_depend_on_the_other_examples_of_a_batch(family, builder, tmp_path):
    model = tiny_model(family)
    together = build(model, tmp_path, rows=examples(), per_device_train_batch_size=5, builder=builder)
    longer = [*examples(), *examples(3, length=17, seed=9)]
    beside_others = build(model, tmp_path, rows=longer, per_device_train_batch_size=8, builder=builder)
    alone = build(model, tmp_path, rows=examples(), per_device_train_batch_size=1, builder=builder)
    rows = len(together)
    for layer in together.layers:
        for other in (alone, beside_others):
            difference = (together.layers[layer].decoded_values - other.layers[layer].decoded_values[:rows]).abs()
            assert difference.max() < 1e-2


@pytest.mark.parametrize("builder, passes", [("topk", 8), ("candidates", 8), ("search", 7)])
def test_number_of_forward_passes_of_a_build(builder, passes, tmp_path):
    model = tiny_model("olmoe")
    calls = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    build(model, tmp_path, rows=examples(2), builder=builder, builder_steps=6, per_device_train_batch_size=2)
    handle.remove()
    probes = 3  # before the build, before attaching, and of the logits, as next tokens are calibrated too
    assert len(calls) == passes + probes


@pytest.mark.parametrize("builder", BUILDERS)
def test_no_logits_are_computed_before_the_first_target(builder, tmp_path):
    model = tiny_model("olmoe")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    rows = [{"input_ids": row["input_ids"], "labels": [-100] * 7 + row["input_ids"][7:]} for row in examples(2)]
    memory = build(model, tmp_path, rows=rows, builder=builder)
    handle.remove()
    probe = (2, 3, 96)  # of what the model does with the output of its head
    assert set(seen) == {(2, 4, 96), probe}  # positions 6 to 9, of which 8 predicts the last target
    assert memory.provenance.positions.tolist() == [6, 7, 8] * 2


def test_best_replaces_all_targets_of_an_example_together():
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch = Batch({"input_ids": labels}, labels, torch.tensor([7, 8]))
    assert batch.example.tolist() == [0, 0, 1, 1] and batch.position.tolist() == [0, 1, 0, 1]
    best = Best(batch, torch.tensor([2.0, 2.0, 2.0, 2.0]), {3: torch.zeros(4, 1)})
    assert best.keep(torch.tensor([0.5, 3.0, 1.0, 3.5]), {3: torch.ones(4, 1)}).tolist() == [True, True, False, False]
    best.keep(torch.tensor([0.5, 3.1, 1.0, 2.5]), {3: torch.full((4, 1), 2.0)})
    best.keep(torch.full((4,), torch.nan), {3: torch.full((4, 1), 3.0)})
    best.keep(torch.full((4,), 9.0), {3: torch.full((4, 1), 4.0)})
    assert best.nll.tolist() == [0.5, 3.0, 1.0, 2.5]
    assert best.logits[3].flatten().tolist() == [1, 1, 2, 2]


def test_the_nll_and_its_gradient_are_those_of_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(6, 9, generator=generator), torch.rand(6, generator=generator)
    targets = torch.tensor([0, 8, 3, -100, 3, 5])
    weights[3] = 0  # the NLL at ignored targets is not used
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    expected = F.cross_entropy(theirs, targets, ignore_index=-100, reduction="none")
    nll = TokenNLL.apply(ours, targets)
    torch.testing.assert_close(nll[targets >= 0], expected[targets >= 0])
    (nll * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
