"""`KNNMoETrainer`: train, evaluate, predict, save and push, as with `Trainer`."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments

from knnmoe_hf import KNNMoEConfig, RoutingMemory, active_memory, attach_memory, detach_memory, disable_memory
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.training.options import BUILDERS
from knnmoe_hf.training.trainer import KNNMoETrainer
from tests.support.models import random_memory, tiny_model
from tests.support.training import build, built, examples, trainer_for


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_training_leaves_the_model_as_it_was_and_the_memory_attached(model, tmp_path, tokens):
    model.train()
    model.model.layers[0].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.config.use_cache = True
    model.model.embed_tokens.weight.requires_grad_(False)
    trainer = trainer_for(model, tmp_path)
    trainer.train()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert flags == {name: module.training for name, module in model.named_modules()}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    assert model.config.use_cache is True
    assert active_memory(model) == "default"
    assert isinstance(trainer.memory, RoutingMemory)


def test_the_memory_helps_on_what_it_was_built_from(family, tmp_path):
    trainer = trainer_for(tiny_model(family), tmp_path, config={"num_neighbors": 1}, allow_overlap=True)
    trainer.train()
    metrics = trainer.evaluate(examples())
    assert metrics["eval_loss"] < metrics["eval_base_loss"] - 0.2


def test_evaluate_reports_the_loss_with_and_without(tmp_path):
    model = tiny_model("olmoe")
    trainer = trainer_for(model, tmp_path, trainer={"eval_dataset": examples(4, seed=8)})
    trainer.train()
    metrics = trainer.evaluate()
    ids = torch.tensor([row["input_ids"] for row in examples(4, seed=8)])
    labels = torch.tensor([row["labels"] for row in examples(4, seed=8)])
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), abs=1e-4)
        with disable_memory(model):
            assert metrics["eval_base_loss"] == pytest.approx(
                model(input_ids=ids, labels=labels).loss.item(), abs=1e-4
            )
    assert trainer.evaluate(metric_key_prefix="test").keys() >= {"test_loss", "test_base_loss"}


def test_the_same_run_twice_gives_the_same_bytes(tmp_path):
    model = tiny_model("gpt_oss")
    for name in ("one", "two"):
        trainer = trainer_for(model, tmp_path)
        trainer.train()
        trainer.save_model(tmp_path / name)
        detach_memory(model)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_save_model_writes_a_memory_and_no_weights(tmp_path):
    trainer = trainer_for(tiny_model("olmoe"), tmp_path)
    with pytest.raises(ValueError, match="call train first"):
        trainer.save_model()
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "out"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "knn_moe"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size < 1.2 * sum(trainer.memory.nbytes_per_layer.values()) + 10_000
    assert len(RoutingMemory.from_pretrained(folder)) == len(trainer.memory) == 5 * 8


def test_only_targets_are_stored_each_with_its_origin(tmp_path):
    rows = examples()
    rows[1] = {"input_ids": rows[1]["input_ids"], "labels": [-100] * 10}
    memory = build(tiny_model("olmoe"), tmp_path, rows=rows)
    source = memory.provenance
    assert source.example_ids.unique().tolist() == [0, 2, 3, 4]
    assert source.positions[source.example_ids == 2].tolist() == list(range(1, 9))
    assert source.tokens()[2].tolist() == rows[2]["input_ids"]


def test_a_batch_without_any_target_is_skipped_and_none_at_all_is_an_error(tmp_path):
    nothing = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 2
    memory = build(tiny_model("olmoe"), tmp_path, rows=nothing + examples(2))
    assert memory.provenance.example_ids.unique().tolist() == [2, 3]
    with pytest.raises(ValueError, match="no example has a target"):
        build(tiny_model("olmoe"), tmp_path, rows=nothing)


@pytest.mark.parametrize(
    "value_space, family", [("assignment", "olmoe"), ("delta", "qwen3_moe"), ("delta", "gpt_oss")]
)
def test_each_value_space_stores_its_own_form_of_the_same_routing(value_space, family, tmp_path):
    model = tiny_model(family)
    memory, logits = build(model, tmp_path, config={"value_space": value_space}), built(family)
    for gate in find_gates(model):
        values, optimized = (of.layers[gate.layer].decoded_values for of in (memory, logits))
        if value_space == "delta":
            bias = getattr(gate.module, "bias", None)
            own = torch.nn.functional.linear(logits.layers[gate.layer].decoded_keys, gate.module.weight, bias)
            torch.testing.assert_close(values, optimized - own, atol=1e-4, rtol=1e-4)
        else:
            assert ((values > 0).sum(-1) == 2).all()
            chosen = values.topk(2).indices.sort().values
            assert torch.equal(chosen, optimized.topk(2).indices.sort().values)


def test_a_second_build_sees_the_frozen_model_and_replaces_the_memory(family, model, tmp_path):
    first = built(family)
    attach_memory(model, random_memory(model), "default")
    trainer = trainer_for(model, tmp_path)
    trainer.train()
    assert torch.equal(trainer.memory.layers[1].decoded_keys, first.layers[1].decoded_keys)
    assert torch.equal(trainer.memory.layers[1].decoded_values, first.layers[1].decoded_values)
    assert active_memory(model) == "default"


def test_gradient_checkpointing_gives_the_same_rows(family, model, tmp_path):
    plain = built(family)
    saved = build(model, tmp_path, gradient_checkpointing=True)
    for layer in plain.layers:
        torch.testing.assert_close(
            saved.layers[layer].decoded_values, plain.layers[layer].decoded_values, atol=1e-4, rtol=1e-4
        )


def test_config_layers_selects_the_layers_that_are_built(tmp_path):
    memory = build(tiny_model("olmoe"), tmp_path, config={"layers": [1]})
    assert list(memory.layers) == [1]
    with pytest.raises(ValueError, match=r"\[7\] have no gate, choose among \[0, 1\]"):
        trainer_for(tiny_model("olmoe"), tmp_path, config={"layers": [0, 7]})


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_peft_model_is_built_with_its_adapter(family, model, tmp_path):
    adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, adapter)
    memory = build(wrapped, tmp_path)
    with wrapped.disable_adapter():
        without = build(wrapped, tmp_path)
    assert not torch.allclose(memory.layers[1].decoded_keys, without.layers[1].decoded_keys)
    torch.testing.assert_close(without.layers[1].decoded_keys, built(family).layers[1].decoded_keys)
    assert memory.origin.base_model_class == type(model).__name__


def test_a_bfloat16_model_is_built_in_its_dtype(tmp_path):
    memory = build(tiny_model("olmoe").bfloat16(), tmp_path, config={"key_dtype": "bfloat16"})
    assert memory.layers[0].key_codes.dtype == torch.bfloat16
    assert memory.provenance.nll_after.mean() < memory.provenance.nll_before.mean()


def test_callbacks_and_logs_get_the_metrics_of_the_build(tmp_path):
    class Watcher(TrainerCallback):
        logs, steps = [], 0

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(logs)

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    watcher = Watcher()
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, trainer={"callbacks": [watcher]}, logging_steps=1)
    metrics = trainer.train().metrics
    assert watcher.steps == 3
    assert watcher.logs[0].keys() >= {
        "loss",
        "nll_before",
        "nll_after",
        "experts_changed",
        "tokens_worse",
        "rows_per_second",
    }
    assert metrics["nll_after"] < metrics["nll_before"]
    assert 0 < metrics["experts_changed"] <= 1
    assert metrics["rows"] == 40
    first = trainer.memory.provenance.nll_before[:16].mean().item()
    assert watcher.logs[0]["nll_before"] == pytest.approx(first, abs=1e-3)


@pytest.mark.parametrize("builder", BUILDERS)
def test_tokens_worse_is_the_share_of_tokens_whose_nll_rose(builder, tmp_path):
    rows = [*examples(4), *examples(1, length=30)]  # batches of different sizes
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, rows=rows, builder=builder, logging_steps=3)
    metrics = trainer.train().metrics
    source = trainer.memory.provenance
    share = (source.nll_after > source.nll_before).float().mean().item()
    assert 0 < share < 1
    assert metrics["tokens_worse"] == pytest.approx(share)
    logged = [logs["tokens_worse"] for logs in trainer.state.log_history if "tokens_worse" in logs]
    assert logged == [pytest.approx(share, abs=1e-4)]


def test_max_steps_stops_the_build_early(tmp_path):
    assert len(build(tiny_model("olmoe"), tmp_path, max_steps=1)) == 2 * 8


def test_one_example_id_for_two_examples_is_refused(tmp_path):
    rows = [row | {"example_id": 7} for row in examples(2)]
    with pytest.raises(ValueError, match="row 1 of train_dataset: example_id 7 comes twice"):
        build(tiny_model("olmoe"), tmp_path, rows=rows)


def test_plain_training_arguments_are_refused(tmp_path):
    model = tiny_model("olmoe")
    with pytest.raises(TypeError, match="KNNMoETrainingArguments"):
        KNNMoETrainer(model=model, args=TrainingArguments(output_dir=str(tmp_path)), train_dataset=examples())


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("stopped")


def test_a_failed_build_leaves_no_hook_behind(tmp_path):
    model = tiny_model("olmoe")
    with pytest.raises(RuntimeError, match="stopped"):
        build(model, tmp_path, trainer={"callbacks": [Stops()]})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_config_belongs_to_the_trainers_memory(tmp_path):
    config = KNNMoEConfig(num_neighbors=3)
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, config=config.options())
    trainer.train()
    assert trainer.memory.config.num_neighbors == 3
    assert trainer.memory.config.layers == [0, 1]


def test_pushing_uploads_only_the_memory(tmp_path, hub):
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, hub_model_id="me/my-memory")
    trainer.train()
    trainer.push_to_hub(commit_message="built")
    assert [commit.title for commit in hub.commits("me/my-memory")] == ["built", "initial commit"]
    files = set(hub.files("me/my-memory"))
    shard = [name for name in files if name.endswith(".safetensors")]
    assert files - {"card.svg"} == {"config.json", "README.md", *shard}
    assert len(shard) == 1


def test_predict_accepts_the_forms_that_train_accepts(tmp_path):
    trainer = trainer_for(tiny_model("olmoe"), tmp_path)
    trainer.train()
    output = trainer.predict(examples(2))
    assert output.metrics.keys() >= {"test_loss", "test_base_loss"}


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"max_steps": 4}, "more than the 3 batches"),
        ({"trainer": {"model_init": lambda: None}}, "pass a loaded model"),
    ],
)
def test_more_than_one_pass_and_more_than_one_model_are_refused(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        trainer_for(tiny_model("olmoe"), tmp_path, **options).train()


def test_save_provenance_false_saves_none(tmp_path):
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, save_provenance="none")
    trainer.train()
    trainer.save_model()
    assert trainer.memory.provenance is not None
    assert RoutingMemory.from_pretrained(tmp_path / "out").provenance is None
