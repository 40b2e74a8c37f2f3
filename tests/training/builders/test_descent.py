"""The builders `"candidates"` and `"topk"`: gradients of the routing logits, at first with more experts."""

import pytest
import torch

from tests.support.models import tiny_model
from tests.support.training import build, built, examples
from tests.training.builders.helpers import changes, check_recorded


def test_a_step_with_more_experts_is_never_kept(tmp_path):
    model = tiny_model("olmoe")
    # with all experts running, about half of the examples have a lower NLL whatever the logits are
    options = dict(num_candidates=8, candidate_steps=3, learning_rate=1e-3)
    check_recorded(model, build(model, tmp_path, **options))


@pytest.mark.parametrize("builder", ["candidates", "topk"])
def test_an_absurd_learning_rate_keeps_the_frozen_routing(builder, tmp_path):
    memory = build(tiny_model("qwen3_moe"), tmp_path, learning_rate=1e4, builder=builder)
    assert (changes(memory) <= 1e-5).all()


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
