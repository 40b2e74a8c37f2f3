"""`KNNMoETrainingArguments`: the arguments of a build, and which of `TrainingArguments` it allows."""

from dataclasses import dataclass, field
from enum import Enum

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from knnmoe_hf.errors import shown
from knnmoe_hf.training.options import BuildOptions


@dataclass
class KNNMoETrainingArguments(BuildOptions, TrainingArguments):
    r"""
    Arguments of `KNNMoETrainer`.

    A build makes one pass over the reference examples. The routing logits of each batch's tokens are optimised for
    `builder_steps` steps and stored as rows; the next batch starts from the gate's own logits again. Arguments of
    `TrainingArguments` that assume trainable weights, several epochs or a schedule raise an error. The defaults of the
    builders were chosen on validation text by `benchmarks/sweeps/builders.py`.

    Args:
        builder (`str`, defaults to `"candidates"`):
            `"candidates"` routes each token to its `num_candidates` experts with the highest logits in the first
            `candidate_steps` steps, and then to the model's own top-k; `"topk"` is the paper's gradient descent with
            the top-k in every step; `"search"` adds random noise to the best logits so far and needs no backward pass.
        builder_steps (`int`, *optional*):
            Steps for each batch. A step is a forward and a backward pass (10 by default); with `"search"` it is a
            forward pass (20 by default).
        num_candidates (`int`, *optional*):
            With `"candidates"`: experts per token in the first steps; twice the model's own top-k if `None`.
        candidate_steps (`int`, *optional*):
            With `"candidates"`: number of steps with `num_candidates` experts; half of `builder_steps` if `None`.
        max_rows (`int`, *optional*):
            Keep at most so many rows, those whose NLL fell most; all if `None`.
        min_gain (`float`, *optional*):
            Keep only rows whose NLL fell by at least so many nats; all if `None`.
        num_layers (`int`, *optional*):
            Keep the rows of so many layers, those that reduce the NLL of held-out references most when used alone; all
            layers if `None`.
        dataset_text_field (`str`, defaults to `"text"`):
            The column that holds the text of a row.
        ignore_columns (`list[str]`, *optional*):
            Columns of the data sets that are left out. Every other column is used, or is an error that names it.
        skip_bad_rows (`bool`, defaults to `False`):
            Leave out rows that cannot be used (no text, token ids outside of the vocabulary, ...) and count them. By
            default the first of them is an error that names the row.
        save_provenance (`str`, defaults to `"text"`):
            What `save_model` writes of the references: `"text"`, their token ids, which explanations and
            calibrations need; `"ids"`, each row's example and position, and hashes by which `evaluate` finds text
            that the memory holds; or `"none"`. `push_to_hub` uploads no more than `"ids"` unless it is asked to.
        save_next_tokens (`bool`, defaults to `False`):
            Let `save_model` keep the token that follows each row where `save_provenance` leaves the text out, four
            bytes a row, which `recall="next_tokens"` and `"both"` need. In the order of the rows these tokens are the
            text of the references. `push_to_hub` uploads them only if it is asked to.
        allow_overlap (`bool`, defaults to `False`):
            Evaluate on examples that overlap the references too. By default `evaluate` leaves them out.
        overwrite (`bool`, defaults to `False`):
            Let `save_model` write over files of its folder that were not written by this library for this model.
        model_name (`str`, *optional*):
            Title of the memory's card; one that names the base model and the data if `None`.
        license (`str`, *optional*):
            Licence of the reference data, as the Hub names it (`"cc-by-4.0"`) or by any other name. The card says "not
            stated" if `None`.
        language (`str` or `list[str]`, *optional*):
            Languages of the reference data, as the Hub names them: `"en"`, `"code"`, `"multilingual"`.
        dataset_name (`str`, *optional*):
            What the card calls the reference data. Data sets of the Hub are named by their repository if `None`, and
            others are not named.
        dataset_tags (`str` or `list[str]`, *optional*):
            Repositories of the reference data on the Hub; found from `train_dataset` where it came from there.
        learning_rate (`float`, defaults to 0.3):
            Adam's learning rate on the logits. `"search"` uses neither this nor `adam_beta1`, `adam_beta2` and
            `adam_epsilon`.
        adam_epsilon (`float`, defaults to 1e-4):
            Adam's epsilon. Each token's gradients are first divided by its largest gradient of the first step, so this
            is relative to that gradient.
        max_length (`int`, *optional*, defaults to 1024):
            Longer examples are cut to so many tokens; `None` cuts none.

    Raises:
        ValueError: for a value that is not allowed, or an argument that only makes sense when weights are trained.
    """

    num_train_epochs: float = field(default=1.0, metadata={"help": "1: every example is optimised once."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Constant: each batch is optimised anew."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: the gradients of a batch are not clipped."})
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "Examples in the dataset's order."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many batches."})

    def __post_init__(self):
        self._check_fixed("load_best_model_at_end")  # which TrainingArguments refuses with other reasons
        super().__post_init__()
        self.check_options()
        self._check_fixed(*_FIXED)
        if self.save_strategy == SaveStrategy.BEST:
            raise ValueError(
                "save_strategy='best' is not allowed in a build: there is no memory to evaluate yet; "
                "use 'steps', 'epoch' or 'no'."
            )
        self._check_trainer_options()

    def _check_fixed(self, *names: str) -> None:
        for name in names:
            allowed, reason = _FIXED[name]
            value = getattr(self, name)
            value = value.value if isinstance(value, Enum) else value
            if value != allowed:
                raise ValueError(f"{name}={shown(value)} is not allowed in a build: {reason}; use {allowed!r}.")

    def _check_trainer_options(self) -> None:
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"accelerator_config with {name}=True is not allowed in a build, whose processes load whole "
                    "batches themselves: leave it out."
                )
        if not self.accelerator_config.even_batches:
            raise ValueError(
                "accelerator_config with even_batches=False is not allowed: a build never repeats examples, and "
                "evaluate would wait forever for processes that have no batch left, so leave it out."
            )
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs with use_reentrant=True is not allowed: it gives no gradient to "
                "routing logits, which are not inputs of a layer, so leave it out."
            )


_FIXED = {  # arguments of TrainingArguments with a single allowed value, and the reason
    "gradient_accumulation_steps": (1, "each batch is optimised by itself and shares no gradient with the next"),
    "num_train_epochs": (1, "an example is optimised once and its rows do not change afterwards"),
    "max_grad_norm": (0, "clipping would make a token's logits depend on the other examples of its batch"),
    "weight_decay": (0, "decay would pull logits towards uniform routing and not towards the gate's own"),
    "label_smoothing_factor": (0, "values are optimised for the likelihood of the true next token"),
    "lr_scheduler_type": ("constant", "each batch is optimised anew with a constant learning rate"),
    "lr_scheduler_kwargs": (None, "each batch is optimised anew with a constant learning rate"),
    "optim": (TrainingArguments.optim, "the builder optimises logits with its own Adam"),
    "optim_args": (None, "the builder optimises logits with its own Adam"),
    "optim_target_modules": (None, "the builder optimises logits and no module"),
    "warmup_steps": (0, "each batch is optimised anew with a constant learning rate"),
    "fp16": (False, "loss scaling is for gradients of weights; load the model in the dtype to build in, or use bf16"),
    "fp16_full_eval": (False, "it would change the frozen model's dtype for good; load the model in that dtype"),
    "bf16_full_eval": (False, "it would change the frozen model's dtype for good; load the model in that dtype"),
    "save_only_model": (
        False,
        "a checkpoint is there to be resumed, and a memory is complete only after the last batch",
    ),
    "save_on_each_node": (False, "the first process gathers the rows of all processes and writes the checkpoints"),
    "ignore_data_skip": (False, "an example is optimised once, so the examples of a checkpoint are not read again"),
    "restore_callback_states_from_checkpoint": (False, "checkpoints of a build hold no states of callbacks"),
    "enable_jit_checkpoint": (False, "it would end the build as if the data ended; use save_steps"),
    "eval_strategy": ("no", "a memory is complete only after the last batch; call evaluate after train"),
    "eval_on_start": (False, "there is no memory before the build; call evaluate after train"),
    "load_best_model_at_end": (False, "a build makes one memory, and no checkpoints to choose from"),
    "neftune_noise_alpha": (None, "keys must be the gate inputs of the frozen model"),
    "dataloader_drop_last": (False, "the examples of the last batch would be missing from the memory"),
    "dataloader_in_order": (True, "the rows of a memory are in the order of the examples"),
    "train_sampling_strategy": ("sequential", "the rows of a memory are in the order of the examples"),
    "torch_compile": (
        False,
        "a build changes its overrides in each step, and each change would compile the model again",
    ),
    "auto_find_batch_size": (False, "it would start the build again; set per_device_train_batch_size"),
}
