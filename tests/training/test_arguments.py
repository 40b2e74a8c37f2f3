"""`KNNMoETrainingArguments`: what a build does not allow is refused with the reason, bad values are named."""

import re

import pytest
from transformers import HfArgumentParser, TrainingArguments

from knnmoe_hf import KNNMoETrainingArguments


def arguments(tmp_path, **options) -> KNNMoETrainingArguments:
    return KNNMoETrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)


def test_the_defaults_are_a_build():
    args = KNNMoETrainingArguments(output_dir="out")
    assert isinstance(args, TrainingArguments)
    assert (args.builder, args.builder_steps, args.max_length) == ("candidates", 10, 1024)
    assert args.num_candidates is None and args.candidate_steps is None
    assert (args.learning_rate, args.num_train_epochs, args.gradient_accumulation_steps) == (0.3, 1, 1)
    assert (args.max_grad_norm, args.weight_decay, args.warmup_steps) == (0, 0, 0)
    assert args.lr_scheduler_type == "constant" and args.train_sampling_strategy == "sequential"
    assert args.save_strategy == "steps" and args.save_steps == 500 and args.eval_strategy == "no"


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("gradient_accumulation_steps", 2, "shares no gradient"),
        ("num_train_epochs", 3, "optimised once"),
        ("num_train_epochs", 0.5, "optimised once"),
        ("max_grad_norm", 1.0, "other examples of its batch"),
        ("weight_decay", 0.01, "uniform routing"),
        ("label_smoothing_factor", 0.1, "true next token"),
        ("lr_scheduler_type", "linear", "constant learning rate"),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, "constant learning rate"),
        ("warmup_steps", 5, "constant learning rate"),
        ("warmup_steps", 0.1, "constant learning rate"),
        ("optim", "adafactor", "with its own Adam"),
        ("optim_args", "betas=0", "with its own Adam"),
        ("optim_target_modules", "all-linear", "logits and no module"),
        ("fp16", True, "loss scaling"),
        ("fp16_full_eval", True, "frozen model's dtype"),
        ("bf16_full_eval", True, "frozen model's dtype"),
        ("save_strategy", "best", "no memory to evaluate"),
        ("save_only_model", True, "there to be resumed"),
        ("save_on_each_node", True, "first process"),
        ("ignore_data_skip", True, "optimised once"),
        ("restore_callback_states_from_checkpoint", True, "no states of callbacks"),
        ("enable_jit_checkpoint", True, "use save_steps"),
        ("eval_strategy", "epoch", "evaluate"),
        ("eval_on_start", True, "no memory before the build"),
        ("load_best_model_at_end", True, "makes one memory"),
        ("neftune_noise_alpha", 5.0, "frozen model"),
        ("auto_find_batch_size", True, "start the build again"),
        ("dataloader_in_order", False, "in the order of the examples"),
        ("train_sampling_strategy", "random", "in the order of the examples"),
    ],
)
def test_an_argument_that_a_build_does_not_allow_is_refused_with_the_reason(tmp_path, name, value, reason):
    with pytest.raises(ValueError, match=f"^{name}={re.escape(repr(value))} is not allowed in a build: .*{reason}"):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize("name, value", [("split_batches", True), ("dispatch_batches", True), ("even_batches", False)])
def test_splitting_batches_with_accelerate_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^accelerator_config with {name}={value} is not allowed.*out.$"):
        arguments(tmp_path, accelerator_config={name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("builder", "greedy"),
        ("builder_steps", 0),
        ("builder_steps", 2.5),
        ("builder_steps", True),
        ("num_candidates", 0),
        ("candidate_steps", -1),
        ("candidate_steps", 10),
        ("max_length", 1),
        ("max_length", "long"),
        ("learning_rate", -0.1),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
    ],
)
def test_a_bad_value_is_named(tmp_path, name, value):
    with pytest.raises(ValueError) as error:
        arguments(tmp_path, **{name: value})
    message = str(error.value)
    assert message.startswith(f"{name}={value!r}") and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    "options",
    [
        {"builder": "topk", "builder_steps": 1},
        {"builder": "search", "builder_steps": 1},
        {"candidate_steps": 0},
        {"candidate_steps": 9, "num_candidates": 64},
        {"max_length": None},
        {"learning_rate": 0},
        {"bf16": True},
        {"activation_checkpointing": True},
        {"max_steps": 3},
        {"dataloader_num_workers": 1},
    ],
)
def test_other_values_are_accepted(tmp_path, options):
    args = arguments(tmp_path, **options)
    assert {name: getattr(args, name) for name in options} == options


@pytest.mark.parametrize("builder, steps", [("candidates", 10), ("topk", 10), ("search", 20)])
def test_each_builder_has_its_own_number_of_steps(tmp_path, builder, steps):
    assert arguments(tmp_path, builder=builder).builder_steps == steps
    assert arguments(tmp_path, builder=builder, builder_steps=3).builder_steps == 3


@pytest.mark.parametrize("builder", ["topk", "search"])
@pytest.mark.parametrize("name", ["num_candidates", "candidate_steps"])
def test_arguments_of_candidates_are_refused_with_another_builder(tmp_path, builder, name):
    reason = f"^{name}=3 is not allowed with builder='{builder}': .*builder='candidates'.$"
    with pytest.raises(ValueError, match=reason):
        arguments(tmp_path, builder=builder, **{name: 3})


def test_arguments_are_read_from_a_command_line(tmp_path):
    parser = HfArgumentParser(KNNMoETrainingArguments)
    words = f"--output_dir {tmp_path} --builder_steps 4 --num_candidates 6 --learning_rate 0.5 --builder candidates"
    (args,) = parser.parse_args_into_dataclasses(words.split())
    assert (args.builder_steps, args.num_candidates, args.learning_rate, args.builder) == (4, 6, 0.5, "candidates")
    assert (args.candidate_steps, args.max_length) == (None, 1024)
    assert "Steps for each batch" in parser.format_help()


def test_to_dict_can_be_parsed_again(tmp_path):
    args = arguments(tmp_path, builder_steps=4, max_length=None)
    again = HfArgumentParser(KNNMoETrainingArguments).parse_dict(args.to_dict(), allow_extra_keys=True)[0]
    assert (again.builder_steps, again.max_length) == (4, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much", True], ids=str)
def test_a_min_gain_that_is_not_a_finite_number_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match=f"min_gain={value!r} is not allowed: use a finite number, or None."):
        arguments(tmp_path, min_gain=value)
