"""
The arguments of `TrainingArguments` that a build has on the command line, and those that it has not, with the reason.

This module imports no other library. A test compares it with the real class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from knnmoe_hf.cli.values import number, one_of, text, whole

REPORTERS = (
    "none all azure_ml clearml codecarbon comet_ml dagshub dvclive flyte kubeflow mlflow neptune swanlab "
    "tensorboard trackio wandb"
).split()


@dataclass(frozen=True)
class Inherited:
    """
    An argument of `TrainingArguments`.

    Attributes:
        default: the same as there.
        convert: from a word; None for an option that is on or off.
        help: what it does in a build.
        alias: another name of the option.
        many: whether it takes several values.
    """

    default: Any
    convert: Callable[[str], Any] | None
    help: str
    alias: str | None = None
    many: bool = False


INHERITED = {
    "per_device_train_batch_size": Inherited(8, whole(1), "Examples per batch.", alias="batch_size"),
    "max_steps": Inherited(-1, whole(-1), "Stop after so many batches of each process; -1, the default, for all."),
    "seed": Inherited(42, whole(0, below=2**32), "Seed of what is random: the noise of --builder search."),
    "full_determinism": Inherited(False, None, "Use deterministic operations alone, which are slower."),
    "adam_beta1": Inherited(0.9, number(0, below=1), "Adam's decay of the mean of gradients."),
    "adam_beta2": Inherited(0.999, number(0, below=1), "Adam's decay of the mean of squared gradients."),
    "bf16": Inherited(False, None, "Run the model in mixed precision with bfloat16."),
    "tf32": Inherited(None, None, "Multiply float32 matrices in TF32, on GPUs that can."),
    "activation_checkpointing": Inherited(
        None, None, "Compute activations twice, to need less memory.", alias="gradient_checkpointing"
    ),
    "use_cpu": Inherited(False, None, "Build on the CPU where there is a GPU too."),
    "dataloader_num_workers": Inherited(0, whole(0, below=2**16), "Processes that prepare batches."),
    "logging_steps": Inherited(10, whole(1), "Report figures every so many batches."),
    "logging_first_step": Inherited(False, None, "Report figures of the first batch too."),
    "save_strategy": Inherited(
        "steps",
        one_of(("no", "steps", "epoch")),
        "When checkpoints are written: every --save-steps batches and every two minutes, after the last batch, or no.",
    ),
    "save_steps": Inherited(500, whole(1), "Write a checkpoint every so many batches of each process at least."),
    "report_to": Inherited(
        "none",
        one_of(REPORTERS, "TOOL"),
        "Where figures of the build are reported to: tensorboard, wandb, ... or all.",
        many=True,
    ),
    "run_name": Inherited(None, text, "Name of the build where it is reported to."),
    "ddp_timeout": Inherited(1800, whole(1), "Seconds after which a process stops waiting for the others."),
    "hub_private_repo": Inherited(None, None, "Make the repository of --push-to-hub a private one."),
    "hub_revision": Inherited(None, text, "Branch of the repository to upload to."),
}
"""The inherited arguments that a build has, by name."""

LEFT_OUT = {
    "a build optimises each batch anew and changes no weights, which leaves it one value": """
        num_train_epochs lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules
        weight_decay gradient_accumulation_steps max_grad_norm label_smoothing_factor fp16 fp16_full_eval
        bf16_full_eval neftune_noise_alpha eval_strategy eval_on_start load_best_model_at_end
        dataloader_drop_last dataloader_in_order train_sampling_strategy torch_compile auto_find_batch_size""",
    "it belongs to an argument that a build cannot change": """
        torch_compile_backend torch_compile_mode eval_steps eval_delay metric_for_best_model greater_is_better
        save_only_model save_on_each_node enable_jit_checkpoint data_seed length_column_name ignore_data_skip
        restore_callback_states_from_checkpoint do_train do_eval do_predict
        average_tokens_across_devices include_num_input_tokens_seen torch_empty_cache_steps
        debug remove_unused_columns label_names use_cache use_liger_kernel liger_kernel_config""",
    "a build does not evaluate; knnmoe evaluate does": """
        per_device_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object
        eval_accumulation_steps include_for_metrics batch_eval_metrics""",
    "--resume goes on with an interrupted build, of which one checkpoint is kept": """
        resume_from_checkpoint save_total_limit""",
    "FSDP, DeepSpeed and tensor parallelism are not supported": "fsdp fsdp_config deepspeed parallelism_config",
    "the launcher (torchrun) and the model without gradients decide it": """
        local_rank accelerator_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
        ddp_static_graph ddp_backend""",
    "the other options decide it": """
        output_dir push_to_hub hub_model_id hub_strategy hub_always_push logging_strategy disable_tqdm log_level
        log_level_replica log_on_each_node logging_nan_inf_filter skip_memory_metrics dataloader_pin_memory
        gradient_checkpointing""",
    "the token is that of hf auth login, of the variable HF_TOKEN, or --token": "hub_token",
    "it is for Python, where KNNMoETrainingArguments takes it": """
        activation_checkpointing_kwargs gradient_checkpointing_kwargs dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_multiprocessing_context project trackio_space_id trackio_bucket_id
        trackio_static_space_id""",
}
"""The inherited arguments that a build does not have on the command line, by the reason."""

REASONS = {name: reason for reason, names in LEFT_OUT.items() for name in names.split()}
"""The reason for each."""
