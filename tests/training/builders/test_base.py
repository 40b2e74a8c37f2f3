"""All builders: stored logits have the recorded NLL, and examples do not influence each other."""

import pytest
import torch
from torch.nn import functional as F

from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.training.arguments import BUILDERS
from knnmoe_hf.training.builders.base import Batch, Best, TokenNLL
from tests.support.models import gate_inputs, tiny_model
from tests.support.training import build, built, examples


def replay(model, memory, row: dict, example: int) -> torch.Tensor:
    """NLL of an example's targets when hooks of this test make every gate route by the stored logits."""
    mine = memory.provenance.example_ids == example
    positions = memory.provenance.positions[mine].long()
    handles = []
    for gate in find_gates(model):

        def force(_, args, output, gate=gate):
            logits = output[0].clone()
            logits[positions] = memory.layers[gate.layer].decoded_values[mine]
            return (logits, *gate.rule(logits, gate.top_k))

        handles.append(gate.module.register_forward_hook(force))
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    for handle in handles:
        handle.remove()
    return F.cross_entropy(logits[positions], ids[0, positions + 1], reduction="none")


def changes(memory) -> torch.Tensor:
    """(5,) recorded change of each example's NLL."""
    source = memory.provenance
    return torch.zeros(5).index_add(0, source.example_ids, source.nll_after - source.nll_before)


def check_recorded(model, memory) -> None:
    for index, row in enumerate(examples()):
        recorded = memory.provenance.nll_after[memory.provenance.example_ids == index]
        torch.testing.assert_close(replay(model, memory, row, index), recorded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("builder", BUILDERS)
def test_stored_logits_give_the_recorded_nll(family, model, builder):
    check_recorded(model, built(family, builder))


def test_a_step_with_more_experts_is_never_kept(tmp_path):
    model = tiny_model("olmoe")
    # with all experts running, about half of the examples have a lower NLL whatever the logits are
    options = dict(num_candidates=8, candidate_steps=3, learning_rate=1e-3)
    check_recorded(model, build(model, tmp_path, **options))


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


@pytest.mark.parametrize("builder", ["candidates", "topk"])
def test_an_absurd_learning_rate_keeps_the_frozen_routing(builder, tmp_path):
    memory = build(tiny_model("qwen3_moe"), tmp_path, learning_rate=1e4, builder=builder)
    assert (changes(memory) <= 1e-5).all()


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


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "gpt_oss"]
)  # OLMoE's softmax gives all other experts a common gradient
def test_topk_does_not_change_logits_of_experts_that_were_never_selected(family, tmp_path):
    frozen = build(tiny_model(family), tmp_path, builder="topk", learning_rate=1e-9)
    moved = {
        builder: [
            built(family, builder).layers[i].decoded_values.sub(rows.decoded_values).abs() > 1e-3
            for i, rows in frozen.layers.items()
        ]
        for builder in ("topk", "candidates")
    }
    by_topk, by_candidates = (torch.cat(moved[name]).float().sum(-1).mean() for name in ("topk", "candidates"))
    assert by_topk < by_candidates  # an expert that does not run has no gradient
    assert by_topk < 4  # two of eight are selected, and a few more in later steps


@pytest.mark.parametrize("builder, passes", [("topk", 8), ("candidates", 8), ("search", 7)])
def test_number_of_forward_passes_of_a_build(builder, passes, tmp_path):
    model = tiny_model("olmoe")
    calls = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    build(model, tmp_path, rows=examples(2), builder=builder, builder_steps=6, per_device_train_batch_size=2)
    handle.remove()
    probes = 2  # before the build, and before attaching
    assert len(calls) == passes + probes


@pytest.mark.parametrize("builder", BUILDERS)
def test_no_logits_are_computed_before_the_first_target(builder, tmp_path):
    model = tiny_model("olmoe")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    rows = [{"input_ids": row["input_ids"], "labels": [-100] * 7 + row["input_ids"][7:]} for row in examples(2)]
    memory = build(model, tmp_path, rows=rows, builder=builder)
    handle.remove()
    assert set(seen) == {(2, 4, 96)}  # positions 6 to 9, of which 8 predicts the last target
    assert memory.provenance.positions.tolist() == [6, 7, 8] * 2


def test_tokens_without_target_keep_the_gates_own_experts_while_candidates_run(tmp_path):
    model = tiny_model("qwen3_moe")
    prompt_only = [{"input_ids": row["input_ids"], "labels": [-100] * 9 + row["input_ids"][9:]} for row in examples()]
    seen = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_hook(lambda _, args, out: seen.append((args[1].clone(), args[2].clone())))
    build(model, tmp_path, rows=prompt_only, per_device_train_batch_size=5)
    handle.remove()
    wide = [(ids, weights) for ids, weights in seen if ids.shape[1] == 4]
    assert wide
    for _, weights in wide:
        weights = weights.view(5, 10, 4)
        assert (weights[:, :8, 2:] == 0).all()  # position 8 predicts the only target
        assert (weights[:, 8, 2:] > 0).all()


def test_small_gradients_are_optimised_as_far_as_large_ones(tmp_path):
    model = tiny_model("olmoe")

    def moved() -> float:
        frozen = build(model, tmp_path, learning_rate=1e-9, builder="topk")
        memory = build(model, tmp_path)
        return torch.stack(
            [(memory.layers[i].decoded_values - frozen.layers[i].decoded_values).abs().mean() for i in (0, 1)]
        ).mean()

    before = moved()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    assert moved() > before / 2


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
