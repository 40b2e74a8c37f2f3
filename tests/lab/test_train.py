"""The lab's training script, on a few steps."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer

from knnmoe_hf.lab import train as script


class Interrupted(Exception):
    pass


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_an_interrupted_training_goes_on_where_it_was(family, tmp_path, monkeypatch):
    monkeypatch.setitem(script.LAB_MODELS, family, tmp_path / "whole")
    script.train(family, steps=4, rows_per_step=1, work=tmp_path / "work", save_steps=2)
    assert not (tmp_path / "work" / family).exists()

    monkeypatch.setitem(script.LAB_MODELS, family, tmp_path / "resumed")
    plain, steps = Trainer.training_step, []

    def dying(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise Interrupted
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", dying)
    with pytest.raises(Interrupted):
        script.train(family, steps=4, rows_per_step=1, work=tmp_path / "work", save_steps=2)
    script.train(family, steps=4, rows_per_step=1, work=tmp_path / "work", save_steps=2)
    assert len(steps) == 4 + 2  # two of the four steps were saved

    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=2e-2, rtol=2e-2)
    report = json.loads((tmp_path / "resumed" / "held_out.json").read_text())
    assert report.keys() >= {"steps", "tokens", "minutes", "python", "tables", "topics"}
    shutil.rmtree(tmp_path / "work")


def few_steps(family: str, folder, steps: int) -> tuple[torch.nn.Module, script.BalancedTrainer]:
    """A lab model after some steps on random tokens, with its trainer."""
    torch.manual_seed(0)
    rows = Dataset.from_dict({"input_ids": torch.randint(4096, (2 * steps, 32), dtype=torch.int64).tolist()})
    model = script.build(family)
    arguments = script._arguments(folder, steps, rows_per_step=2, save_steps=100)
    trainer = script.BalancedTrainer(model, arguments, script._collate, rows, callbacks=[script.ExpertLoad(model)])
    trainer.train()
    return model, trainer


@pytest.mark.parametrize("family", script.CONFIGS)
def test_every_family_is_trained_routers_and_experts_included(family, tmp_path):
    before = {name: tensor.clone() for name, tensor in script.build(family).state_dict().items()}
    model, trainer = few_steps(family, tmp_path, 2)
    torch.manual_seed(0)
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == set(before)
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "ernie4_5_moe"])
def test_a_step_moves_each_bias_against_the_load_of_its_expert(family, tmp_path):
    model = script.build(family)
    counts = {}

    def count(router, args, output):
        counts[router] = torch.bincount(output[2].flatten(), minlength=16).float()

    for router, bias in script.routers(model):
        assert bias.shape[-1] == 16 and not bias.any()
        router.register_forward_hook(count)
    load, ids = script.ExpertLoad(model), torch.arange(64)[None]
    model(input_ids=ids)
    assert load.shares().mean(1).allclose(torch.ones(3))
    load.on_step_end(None, None, None)
    for router, bias in script.routers(model):
        over = counts[router] - counts[router].mean()
        assert over.any() and torch.equal(bias.flatten(), -script.BIAS_STEP * over.sign())
    load.on_step_end(None, None, None)  # without a forward pass: what was counted is used once
    assert bias.abs().max() == script.BIAS_STEP
    load.remove()
    model(input_ids=ids)
    assert not torch.stack(load.counts).any()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_the_loss_evens_the_load_out_where_no_bias_does(family, tmp_path):
    model, trainer = few_steps(family, tmp_path, 1)
    model.eval()
    ids = torch.arange(32)[None]
    loss, outputs = trainer.compute_loss(model, {"input_ids": ids, "labels": ids}, return_outputs=True)
    plain = model(input_ids=ids, labels=ids, output_router_logits=False).loss
    if family == "deepseek_v3":
        assert loss == plain and trainer.compute_loss(model, {"input_ids": ids, "labels": ids}) == plain
    else:  # the loss of an even load is k
        assert (loss - plain).item() == pytest.approx(4 * script.BALANCING_LOSS, rel=0.5)


def test_weights_are_saved_in_bfloat16_and_correction_biases_are_not():
    for family in ("deepseek_v3", "minimax_m2", "ernie4_5_moe", "olmoe"):
        model = script.build(family)
        for _, bias in script.routers(model):
            if bias is not None:
                bias.data += 0.1001
        state = script._to_bfloat16(model).state_dict()
        biases = {name: tensor for name, tensor in state.items() if name.endswith("e_score_correction_bias")}
        assert {tensor.dtype for name, tensor in state.items() if name not in biases} == {torch.bfloat16}
        assert all(torch.equal(tensor, torch.full_like(tensor, 0.1001)) for tensor in biases.values())
        assert {tensor.dtype for tensor in biases.values()} <= {torch.float32}
        assert bool(biases) == (family != "olmoe")
