"""The random-search builder: forward passes only, the model's own top-k, separate noise for each example."""

import pytest
import torch

from tests.support.models import tiny_model
from tests.support.training import build, built, examples


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no backward pass here")


def values(memory) -> torch.Tensor:
    return torch.cat([rows.decoded_values for rows in memory.layers.values()], dim=-1)


def test_the_model_needs_no_backward_pass(tmp_path):
    model = tiny_model("olmoe")
    model.model.norm.register_forward_hook(lambda _, args, out: NoBackward.apply(out))
    with pytest.raises(RuntimeError, match="no backward pass here"):
        build(model, tmp_path, builder="candidates")
    source = build(model, tmp_path, builder="search").provenance
    assert source.nll_after.mean() < source.nll_before.mean() - 0.01


def test_no_autograd_graph_is_made(tmp_path):
    model = tiny_model("olmoe")
    graphs = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: out.detach().requires_grad_())
    model.lm_head.register_forward_hook(lambda _, args, out: graphs.append(out.grad_fn))
    build(model, tmp_path, builder="search")
    assert graphs and not any(graphs)


def test_every_pass_runs_the_models_own_top_k(model, tmp_path):
    widths = set()
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(
        lambda _, args, out: widths.update(a.shape[-1] for a in args if not a.is_floating_point())
    )
    memory = build(model, tmp_path, builder="search")
    assert widths == {2}
    assert (memory.provenance.nll_after != memory.provenance.nll_before).any()


def test_tokens_without_target_keep_the_gates_own_routing(tmp_path):
    model = tiny_model("olmoe")
    rows = [{"input_ids": row["input_ids"], "labels": [-100] * 9 + row["input_ids"][9:]} for row in examples()]
    seen = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(
        lambda _, args, out: seen.append(args[2].view(-1, 10, 2) if len(out) == 50 else None)
    )
    build(model, tmp_path, rows=rows, per_device_train_batch_size=5, builder="search")
    frozen, *others = [weights for weights in seen if weights is not None]
    assert others
    for weights in others:
        assert torch.equal(weights[:, :8], frozen[:, :8])  # position 8 predicts the only target
        assert not torch.equal(weights[:, 8], frozen[:, 8])


def test_more_passes_find_better_routing(tmp_path):
    model = tiny_model("gpt_oss")
    nll = [build(model, tmp_path, builder="search", builder_steps=n).provenance.nll_after.mean() for n in (1, 4, 24)]
    assert nll[0] > nll[1] > nll[2]


def test_a_round_starts_from_the_best_logits_of_the_last(tmp_path):
    model, config = tiny_model("olmoe"), {"value_space": "delta"}

    def moved(passes: int) -> float:
        return values(build(model, tmp_path, config=config, builder="search", builder_steps=passes)).std().item()

    assert moved(40) > 1.5 * moved(4)


def test_the_noise_depends_on_the_seed(tmp_path):
    model = tiny_model("olmoe")
    one, again, other = (values(build(model, tmp_path, builder="search", seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_noise_of_an_example_depends_on_its_id_only(tmp_path):
    model = tiny_model("olmoe")
    row = examples(1)[0]
    both = build(model, tmp_path, rows=[row | {"example_id": 5}, row | {"example_id": 6}], builder="search")
    first, second = values(both).chunk(2)
    assert not torch.allclose(first, second)
    later = build(model, tmp_path, rows=[row | {"example_id": 6}], builder="search")
    torch.testing.assert_close(values(later), second, atol=1e-2, rtol=0)


def test_a_token_picks_only_draws_that_lowered_its_own_nll():
    source = built("olmoe", "search").provenance
    better = (source.nll_after < source.nll_before).float().mean()
    assert better > 0.7  # a draw for all tokens at once raises the NLL of about half of them
