"""`KNNMoETrainingArguments`: the arguments of a builder, and which of `TrainingArguments` a build allows."""

import math
from dataclasses import dataclass, field
from enum import Enum

from transformers import TrainingArguments

from knnmoe_hf.errors import shown

BUILDERS = {"candidates": 10, "topk": 10, "search": 20}
"""The builders by name, with the default of `builder_steps` of each."""


@dataclass
class KNNMoETrainingArguments(TrainingArguments):
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
        save_provenance (`bool`, defaults to `True`):
            `False` makes `save_model` and `push_to_hub` leave out the examples' ids, the positions of the rows in them
            and the examples' tokens.
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

    builder: str = field(default="candidates", metadata={"help": f"How logits are optimised: {', '.join(BUILDERS)}."})
    builder_steps: int | None = field(
        default=None, metadata={"help": "Steps for each batch; 10 by default, 20 with search."}
    )
    num_candidates: int | None = field(
        default=None, metadata={"help": "Experts per token at first; 2 x top-k by default."}
    )
    candidate_steps: int | None = field(
        default=None, metadata={"help": "Steps with num_candidates experts; half by default."}
    )
    max_length: int | None = field(default=1024, metadata={"help": "Longer examples are cut to so many tokens."})
    max_rows: int | None = field(default=None, metadata={"help": "Keep the rows with the largest gains."})
    min_gain: float | None = field(default=None, metadata={"help": "Drop rows that gained fewer nats."})
    num_layers: int | None = field(default=None, metadata={"help": "Keep the so many best layers."})
    save_provenance: bool = field(default=True, metadata={"help": "False: do not save which text the rows are from."})
    learning_rate: float = field(default=0.3, metadata={"help": "Adam's learning rate on the logits."})
    adam_epsilon: float = field(default=1e-4, metadata={"help": "Adam's epsilon, relative to a token's gradient."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "1: every example is optimised once."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Constant: each batch is optimised anew."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: the gradients of a batch are not clipped."})
    save_strategy: str = field(default="no", metadata={"help": "no: save the finished memory with save_model."})
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "Examples in the dataset's order."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many batches."})

    def __post_init__(self):
        super().__post_init__()
        if self.builder not in BUILDERS:
            raise ValueError(f"builder={shown(self.builder)} is not allowed: choose one of {', '.join(BUILDERS)}.")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name}={shown(value)} is not allowed: use an integer of at least {least}.")
        self._check_min_gain()
        if self.builder_steps is None:
            self.builder_steps = BUILDERS[self.builder]
        self._check_candidates()
        if not isinstance(self.learning_rate, (int, float)) or not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={shown(self.learning_rate)} is not allowed: use a number of at least 0.")
        for name, (allowed, reason) in _FIXED.items():
            value = getattr(self, name)
            value = value.value if isinstance(value, Enum) else value
            if value != allowed:
                raise ValueError(f"{name}={shown(value)} is not allowed in a build: {reason}; use {allowed!r}.")
        self._check_trainer_options()

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

    def _check_min_gain(self) -> None:
        gain = self.min_gain
        is_number = isinstance(gain, (int, float)) and not isinstance(gain, bool)
        if gain is not None and not (is_number and math.isfinite(gain)):
            raise ValueError(f"min_gain={shown(gain)} is not allowed: use a finite number, or None.")

    def _check_candidates(self) -> None:
        for name in ("num_candidates", "candidate_steps"):
            if self.builder != "candidates" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not allowed with builder={self.builder!r}: leave it out, or use "
                    "builder='candidates'."
                )
        if self.candidate_steps is not None and self.candidate_steps >= self.builder_steps:
            raise ValueError(
                f"candidate_steps={self.candidate_steps} is not allowed: use fewer than builder_steps="
                f"{self.builder_steps}, so that the last steps run with the model's own top-k."
            )


_COUNTS = {  # smallest allowed value of each integer argument
    "builder_steps": 1,
    "num_candidates": 1,
    "candidate_steps": 0,
    "max_length": 2,
    "max_rows": 1,
    "num_layers": 1,
}
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
    "save_strategy": ("no", "a memory is complete only after the last batch; call save_model after train"),
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
